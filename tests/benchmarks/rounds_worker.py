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

import factory
import sqlalchemy as sa
from factory.alchemy import SQLAlchemyModelFactory
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
    """The same factories without tidyrows, the same commits, and DELETEs in the right order.

    At READ COMMITTED: at MariaDB's default such cleanups deadlock with each other.
    """
    if engine.dialect.name != "sqlite":
        engine = engine.execution_options(isolation_level="READ COMMITTED")
    session = orm.Session(engine, expire_on_commit=False)
    worker = time.time_ns()

    class Plain(SQLAlchemyModelFactory):
        class Meta:
            abstract = True
            sqlalchemy_session = session
            sqlalchemy_session_persistence = "flush"

    class OrgFactory(Plain):
        class Meta:
            model = shop.Org

        name = factory.Sequence(lambda n: f"org-{worker}-{n}")

    class UserFactory(Plain):
        class Meta:
            model = shop.User

        email = factory.Sequence(lambda n: f"user-{worker}-{n}@example.test")
        org = factory.SubFactory(OrgFactory)

    class LineFactory(Plain):
        class Meta:
            model = shop.Line

        order = None

    class OrderFactory(Plain):
        class Meta:
            model = shop.Order

        user = factory.SubFactory(UserFactory)
        lines = factory.RelatedFactoryList(LineFactory, factory_related_name="order", size=2)

    def work() -> None:
        org = OrgFactory()
        session.commit()
        users = UserFactory.create_batch(5, org=org)
        session.commit()
        orders = []
        for user in users[:2]:
            orders += OrderFactory.create_batch(2, user=user)
            session.commit()
        session.close()
        with engine.begin() as connection:
            for column, rows in (
                (shop.Line.order_id, orders),
                (shop.Order.id, orders),
                (shop.User.id, users),
                (shop.Org.id, [org]),
            ):
                ids = [row.id for row in rows]
                connection.execute(sa.delete(column.table).where(column.in_(ids)))

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
