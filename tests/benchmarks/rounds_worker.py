"""One process of the benchmark of rounds: ``python rounds_worker.py '{"url": ..., ...}'``.

It waits for a line on its standard input, runs its rounds, and prints how many seconds they took.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import sqlalchemy as sa
from sqlalchemy import orm

from storm import shop
from storm.worker import engine_of
from tidyrows import CleanupManager, ResourceTracker


def with_tidyrows(engine: sa.Engine, *, verify: bool) -> Callable[[], None]:
    def work() -> None:
        with CleanupManager(ResourceTracker(engine), verify=verify):
            org = shop.OrgFactory()
            users = shop.UserFactory.create_batch(5, org=org)
            for user in users[:2]:
                shop.OrderFactory.create_batch(2, user=user)

    return work


def by_hand(engine: sa.Engine) -> Callable[[], None]:
    """The same objects and the same commits in a session, and DELETEs in the right order."""
    made: dict[str, str] = {}
    count = iter(range(10**9))

    def work() -> None:
        with orm.Session(engine, expire_on_commit=False) as session:
            org = shop.Org(name=f"org {worker} {next(count)}")
            session.add(org)
            session.commit()
            users = [shop.User(email=f"{worker} {next(count)}", org=org) for _ in range(5)]
            session.add_all(users)
            session.commit()
            lines, orders = [], []
            for user in users[:2]:
                two = [shop.Order(user=user) for _ in range(2)]
                lines += [shop.Line(order=order) for order in two for _ in range(2)]
                orders += two
                session.add_all([*two, *lines])
                session.commit()
        with engine.begin() as connection:
            for model, rows in (
                (shop.Line, lines),
                (shop.Order, orders),
                (shop.User, users),
                (shop.Org, [org]),
            ):
                table = model.__table__
                ids = [row.id for row in rows]
                connection.execute(sa.delete(table).where(table.c.id.in_(ids)))

    worker = f"{id(made)} {time.time_ns()}"
    return work


def main(url: str, kind: str, rounds: int) -> None:
    engine = engine_of(url)
    if kind == "by hand":
        work = by_hand(engine)
    else:
        work = with_tidyrows(engine, verify=kind == "verified")
    for _ in range(3):
        work()
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    for _ in range(rounds):
        work()
    print(json.dumps(time.perf_counter() - began), flush=True)
    engine.dispose()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
