"""Whatever the schema and whatever happens: exactly our rows go, and nobody else's is touched.

More examples, and other ones each time: ``TIDYROWS_EXAMPLES=500 python -m pytest
tests/properties``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import sqlalchemy as sa
from hypothesis import given, note
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from harness.bystanders import snapshot
from harness.databases import Database
from properties.examples import emptied, of_strangers
from properties.schemas import TableSpec, schemas, tables_of
from properties.stories import OURS, Actor, World
from tidyrows import CleanupManager, ResourceTracker

chance = st.randoms(use_true_random=False)


@given(schema=schemas(), random=chance)
def test_exactly_our_rows_go_whatever_the_schema(
    database: Database, schema: tuple[TableSpec, ...], random: Random
) -> None:
    with emptied(database) as empty:
        engine = empty.engine()
        world = World(schema, tables_of(schema, empty.backend), empty.engine(), random)
        world.found()
        with world.stranger() as stranger:
            for _ in range(random.randint(0, 4)):
                stranger.insert()
        tracker = ResourceTracker(engine)
        # Circles of NOT NULL keys cannot be deleted on the MySQL family in any other way.
        off = empty.backend == "mysql"
        with CleanupManager(tracker, allow_foreign_keys_off=off) as cleanup:
            for _ in range(random.randint(1, 5)):
                transaction(world, engine)
                with world.stranger() as stranger:
                    for _ in range(random.randint(0, 2)):
                        stranger.act()
            ours = world.keys_of(OURS)
            tracked = {(row.table.name, row.key) for row in tracker.rows()}
            assert tracked == ours
            expected = of_strangers(world.outside, world.tables)
            note(f"plan:\n{cleanup.plan()}")
        assert snapshot(world.outside) == expected
        assert cleanup.report.total_deleted + sum(cleanup.report.already_gone.values()) == len(ours)
        assert len(tracker) == 0


def transaction(world: World, engine: sa.Engine) -> None:
    """One of ours: through a connection, a session or without a transaction; it ends somehow."""
    random = world.random
    kind = random.choice(("connection", "session", "autocommit"))
    end = random.choice(("commit", "commit", "commit", "rollback", "close"))
    note(f"{kind} begins")
    with contextmanager(_doer)(engine, kind) as does:
        us = Actor(world, does, OURS, autocommit=kind == "autocommit")
        for _ in range(random.randint(1, 15)):
            us.act()
            if world.backend == "postgresql" and random.randrange(4) == 0:
                # Where writers do not wait for each other, strangers commit in between too.
                with world.stranger() as stranger:
                    stranger.insert(numbers=world.numbers)
        if end != "close":
            world.end(does, end)


def _doer(engine: sa.Engine, kind: str) -> Iterator[sa.Connection | Session]:
    if kind == "session":
        with Session(engine) as session:
            yield session
        return
    with engine.connect() as connection:
        if kind == "autocommit":
            connection.execution_options(isolation_level="AUTOCOMMIT")
        yield connection
