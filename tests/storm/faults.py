"""What works against the workers, in threads of one process: ``python faults.py '{...}'``.

It goes on until its standard input is closed, and prints what it did.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

done: Counter[str] = Counter()
over = threading.Event()


def crossing(engine: sa.Engine) -> None:
    """Parents first, then their children, or the other way round: one of them crosses a cleanup."""
    with engine.connect() as connection:
        users = connection.exec_driver_sql(
            "SELECT id, org_id FROM users ORDER BY id DESC LIMIT 8"
        ).all()
        if users:
            user, org = random.choice(users)
            locks = [
                f"SELECT id FROM orgs WHERE id = {org} FOR UPDATE",
                f"SELECT id FROM users WHERE id = {user} FOR UPDATE",
                f"SELECT id FROM orders WHERE user_id = {user} FOR UPDATE",
                (
                    "SELECT id FROM order_lines WHERE order_id IN "
                    f"(SELECT id FROM orders WHERE user_id = {user}) FOR UPDATE"
                ),
            ]
            for lock in random.choice((locks, locks[::-1])):
                connection.exec_driver_sql(lock).all()
                over.wait(random.uniform(0.0, 0.03))
            done["crossings"] += 1
        connection.rollback()
    over.wait(0.005)


def holding(engine: sa.Engine) -> None:
    """Rows of somebody's, longer than anybody waits for one lock."""
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT id FROM users ORDER BY id DESC LIMIT 4 FOR UPDATE").all()
        over.wait(random.uniform(0.5, 3.0))
        connection.rollback()
        done["locks held"] += 1
    over.wait(random.uniform(0.1, 0.5))


def writing(engine: sa.Engine) -> None:
    """SQLite's one write lock."""
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        over.wait(random.uniform(0.2, 1.5))
        connection.rollback()
        done["locks held"] += 1
    over.wait(random.uniform(0.1, 0.5))


def killing(engine: sa.Engine) -> None:
    """A connection of a worker's, whatever it does: no more than some for each round.

    On a busy machine a cleanup would else be cut off until its deadline.
    """
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            asked = "SELECT pid FROM pg_stat_activity WHERE application_name = 'storm'"
            kill = "SELECT pg_terminate_backend({})"
        else:
            asked = "SELECT id FROM information_schema.processlist WHERE user = 'storm'"
            kill = "KILL {}"
        pids = connection.exec_driver_sql(asked).scalars().all()
        audits = connection.exec_driver_sql("SELECT count(*) FROM audit").scalar_one()
        if pids and done["connections killed"] < 8 + audits:  # two a round
            connection.exec_driver_sql(kill.format(random.choice(pids)))
            done["connections killed"] += 1
        connection.rollback()
    over.wait(random.uniform(0.05, 0.3))


KINDS = {"deadlocks": crossing, "locks": holding, "kills": killing}


def again(work: Any, engine: sa.Engine) -> None:
    while not over.is_set():
        try:
            work(engine)
        except (sa.exc.DBAPIError, ConnectionError):
            done["errors of its own"] += 1  # it is a victim too, or the server is away
            over.wait(0.02)


def main(url: str, faults: list[str]) -> None:
    engine = sa.create_engine(url, poolclass=NullPool)
    if engine.dialect.name == "sqlite":
        works: list[Any] = [writing] if "locks" in faults else []
    else:
        works = [KINDS[kind] for kind in faults if kind in KINDS]
        works += [crossing] * (crossing in works)
    threads = [threading.Thread(target=again, args=(work, engine)) for work in works]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    over.set()
    for thread in threads:
        thread.join()
    print(json.dumps(done))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
