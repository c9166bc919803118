"""Whatever the schema and whatever the application wrote: what goes is what the design says.

More examples, and other ones each time: ``TIDYROWS_EXAMPLES=500 python -m pytest
tests/properties``.
"""

from __future__ import annotations

from random import Random

import sqlalchemy as sa
from hypothesis import event, given, note
from hypothesis import strategies as st

from harness.databases import Database
from harness.targets import WITHOUT_FOREIGN_KEYS, on
from properties.endings import Foretold, links_of, read
from properties.examples import emptied
from properties.schemas import TableSpec, schemas, tables_of
from properties.stories import OURS, Actor, World
from tidyrows import CleanupError, CleanupManager, Dependents, ResourceTracker

APPLICATION = "app"
chance = st.randoms(use_true_random=False)
# Deleting is what makes keys come back, and that has tests of its own.
ACTS = (Actor.insert, Actor.insert, Actor.insert, Actor.point_elsewhere)


def write(world: World, engine: sa.Engine, owner: str, times: int) -> None:
    """Rows at random, committed one act at a time."""
    for _ in range(times):
        with engine.connect() as connection, connection.begin() as transaction:
            world.random.choice(ACTS)(Actor(world, connection, owner))
            world.end(transaction, "commit")


@on("sqlite", WITHOUT_FOREIGN_KEYS, "postgresql+psycopg", "mysql+pymysql")
@given(schema=schemas(), random=chance, policy=st.sampled_from(Dependents), named=st.booleans())
def test_what_the_application_wrote_ends_as_the_design_says(
    database: Database,
    schema: tuple[TableSpec, ...],
    random: Random,
    policy: Dependents,
    named: bool,
) -> None:
    with emptied(database) as empty:
        tables = tables_of(schema, empty.backend)
        world = World(schema, tables, empty.engine(), random)
        world.found()
        with world.stranger() as stranger:
            for _ in range(3):
                stranger.insert()
        engine = empty.engine()
        tracker = ResourceTracker(engine)
        tracker.start()
        try:
            for _ in range(random.randint(1, 4)):
                write(world, engine, OURS, random.randint(1, 3))
                write(world, world.outside, APPLICATION, random.randint(2, 8))
        finally:
            tracker.stop()
        rows = read(world.outside, tables)
        ours = {row for row, values in rows.items() if values["owner"] == OURS}
        kinds = ["own", "protect", "neither", "neither"]
        numbers = {at: random.choice(kinds) if named else "neither" for at in range(len(tables))}
        without_ours = set(numbers) - {number for number, _key in ours}
        own = [at for at, kind in numbers.items() if kind == "own"]
        protect = [at for at in without_ours if numbers[at] == "protect"]
        note(f"{policy}, own {own}, protect {protect}")
        ending = Foretold(
            rows, links_of(schema, tables), ours, policy, frozenset(own), frozenset(protect)
        ).ending()
        event(f"deleted {bool(ending.dependents)}, detached {bool(ending.detached)}")
        event(f"kept {bool(ending.kept)}")
        cleanup = CleanupManager(
            tracker,
            dependents=policy,
            own=[tables[at] for at in own],
            protect=[tables[at] for at in protect],
            # Circles of NOT NULL keys cannot be deleted on the MySQL family in any other way.
            allow_foreign_keys_off=empty.backend == "mysql",
        )
        note(f"plan:\n{cleanup.plan()}")
        left: set[object] = set()
        try:
            cleanup.cleanup()
        except CleanupError as error:
            left = {(each.table.name, each.row.key) for each in error.leftovers if each.row}
            note(str(error))

        def by_name(some: set[tuple[int, tuple[object, ...]]]) -> set[object]:
            return {(tables[number].name, key) for number, key in some}

        report = cleanup.report
        assert read(world.outside, tables) == ending.rows
        assert left == by_name(ending.kept)
        assert {(row.table.name, row.key) for row in tracker.rows()} == by_name(ending.kept)
        for found, expected in (
            (report.dependents, ending.dependents),
            (report.detached, ending.detached),
        ):
            said = [(row.table.name, row.key) for each in found.values() for row in each]
            assert len(said) == sum(map(len, found.values()))
            assert set(said) == by_name(expected)
        assert report.total_deleted == len(ours) - len(ending.kept)
        assert not report.already_gone
