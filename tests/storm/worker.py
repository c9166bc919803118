"""One worker of the storm: ``python worker.py '{"url": ..., "rounds": ...}'``.

It prints one line of JSON at its end: what it met, and every error that reached it.
"""

from __future__ import annotations

import json
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import sqlalchemy as sa

from storm import shop
from tidyrows import (
    Attempt,
    CleanupManager,
    ResourceTracker,
    RetryPolicy,
    with_retries,
)
from tidyrows.dialects import Fault, dialect_for


class Application:
    """Writes beside the worker's tests: to their rows, and to everybody's.

    Attributes:
        counted: how often it has counted up a bystander, by id.
        unsure: the same where the answer to the COMMIT was lost.
        audits: how many audit rows it has written for sure, and perhaps.
    """

    def __init__(self, engine: sa.Engine, bystanders: list[int], policy: RetryPolicy) -> None:
        self.engine, self.bystanders, self.policy = engine, bystanders, policy
        self.counted: Counter[int] = Counter()
        self.unsure: Counter[int] = Counter()
        self.audits = [0, 0]

    def write(self, user: int, name: str) -> None:
        """One transaction: what hangs on our user, and a bystander's count."""
        org = random.choice(self.bystanders)

        def work(connection: sa.Connection) -> None:
            order = connection.execute(
                sa.insert(shop.Order.__table__).values(user_id=user)
            ).inserted_primary_key[0]
            connection.execute(sa.insert(shop.Line.__table__), [{"order_id": order}] * 2)
            connection.execute(sa.insert(shop.Audit.__table__).values(text=name, user_id=user))
            table = shop.Org.__table__
            connection.execute(sa.update(table).where(table.c.id == org).values(v=table.c.v + 1))

        try:
            with_retries(self.engine, work, retry=self.policy)
        except sa.exc.DBAPIError as error:
            if not any("nobody knows" in note for note in getattr(error, "__notes__", ())):
                raise
            self.unsure[org] += 1
            self.audits[1] += 1
        else:
            self.counted[org] += 1
            self.audits[0] += 1


def engine_of(url: str) -> sa.Engine:
    engine = sa.create_engine(url, pool_size=2, max_overflow=2)
    if engine.dialect.name == "sqlite":
        sa.event.listen(
            engine, "connect", lambda raw, _record: raw.execute("PRAGMA foreign_keys = ON")
        )
    # A server that an engine has never reached is not waited for; the storm may rage already.
    RetryPolicy(attempts=100, deadline=60).run(
        lambda: engine.connect().close(),
        is_transient=lambda error: isinstance(error, sa.exc.DBAPIError),
    )
    return engine


def main(url: str, rounds: int, bystanders: list[int], seconds: float, number: int) -> None:
    met: Counter[str] = Counter()
    engine = engine_of(url)
    dialect = dialect_for(engine)

    def heard(where: str) -> Any:
        def hear(attempt: Attempt) -> None:
            if dialect.fault(attempt.error) is Fault.LOST:
                kind = "lost connections"
            else:
                kind = "timeouts" if dialect.is_timeout(attempt.error) else "deadlocks"
            met[f"{kind} in {where}"] += 1

        return hear

    def policy(where: str) -> RetryPolicy:
        return RetryPolicy(attempts=1000, deadline=120, on_attempt=heard(where))

    application = Application(engine_of(url), bystanders, policy("the application"))
    cleaning: list[float] = []
    failures: list[str] = []
    until = time.monotonic() + seconds
    done = 0
    began = time.monotonic()
    while done < rounds and time.monotonic() < until:
        tracker = ResourceTracker(engine, retry=policy("creation"))
        cleanup = CleanupManager(tracker, retry=policy("cleanup"), lock_timeout=1.0, deadline=120)
        try:
            with cleanup:
                boss = shop.UserFactory(tagged=True)
                user = shop.UserFactory(org=boss.org, manager=boss)
                shop.OrderFactory.create_batch(2, user=user)
                for _ in range(2):
                    application.write(user.id, f"worker {number} round {done}")
        except Exception:  # noqa: BLE001 -- what reached the test is what the storm is about
            failures.append(f"worker {number}, round {done}:\n{traceback.format_exc()}")
        report = cleanup.last_report
        if report is not None:
            cleaning.append(report.seconds)
            met["retries of cleanup"] += report.retries
        done += 1
    took = time.monotonic() - began
    engine.dispose()
    application.engine.dispose()
    said = {
        "rounds": done,
        "seconds": took,
        "met": met,
        "cleaning": cleaning,
        "failures": failures,
        "counted": application.counted,
        "unsure": application.unsure,
        "audits": application.audits,
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
