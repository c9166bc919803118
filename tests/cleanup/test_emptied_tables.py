"""Somebody empties a table, or makes it anew, while a block has rows in it."""

from __future__ import annotations

from contextlib import suppress

import pytest
import sqlalchemy as sa

from harness.ledgers import Worker, sweep
from tidyrows import CleanupError, CleanupManager, Dependents, LeftoverKind, ResourceTracker

pytestmark = pytest.mark.slow

metadata = sa.MetaData()
plans = sa.Table(
    "plans",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(30)),
)
parts = sa.Table(
    "parts",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("plan_id", sa.ForeignKey("plans.id"), nullable=False),
)
lines = sa.Table("plan_lines", metadata, sa.Column("text", sa.String(30)))


@pytest.fixture(autouse=True)
def tables(outside):
    metadata.create_all(outside)


def truncate(engine):
    with engine.begin() as connection:
        match engine.dialect.name:
            case "postgresql":
                names = ", ".join(table.name for table in metadata.sorted_tables)
                connection.exec_driver_sql(f"TRUNCATE {names} RESTART IDENTITY")
            case "sqlite":
                for table in reversed(metadata.sorted_tables):
                    connection.execute(sa.delete(table))
            case _:
                connection.exec_driver_sql("SET foreign_key_checks = 0")
                for table in metadata.sorted_tables:
                    connection.exec_driver_sql(f"TRUNCATE TABLE {table.name}")
                connection.exec_driver_sql("SET foreign_key_checks = 1")


def recreate(engine):
    metadata.drop_all(engine)
    metadata.create_all(engine)


@pytest.fixture(params=[truncate, recreate])
def begin_anew(request):
    return request.param


def write(engine, table, *rows):
    """Insert rows; the database makes their keys."""
    with engine.begin() as connection:
        for row in rows:
            connection.execute(sa.insert(table).values(row))


def names_in(engine, table=plans):
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.select(table).order_by(*table.columns))]


FREE, GOLD = {"name": "free"}, {"name": "gold"}
SEED = [(1, "free"), (2, "gold")]


def cleanup(tracker, **options):
    """The report, and the keys of what is left over by table; all of them are uncertain."""
    manager = CleanupManager(tracker, **options)
    with suppress(CleanupError):
        manager.cleanup()
    left = manager.report.leftovers
    assert {each.kind for each in left} <= {LeftoverKind.UNCERTAIN}
    return manager.report, [(each.table.name, each.row and each.row.key[0]) for each in left]


@pytest.fixture
def tracker(engine):
    tracker = ResourceTracker(engine)
    tracker.start()
    yield tracker
    tracker.stop()
    tracker.dismiss_leak_warning()


def is_known_to_be_dropped(engine, begin_anew):
    return begin_anew is recreate and engine.dialect.name == "postgresql"


def test_a_seed_under_our_keys_stays(engine, outside, tracker, begin_anew):
    write(engine, plans, *[{"name": f"of a test {n}"} for n in range(3)])
    write(engine, plans, {"name": "of a test"})
    begin_anew(outside)
    write(outside, plans, FREE, GOLD)
    report, left = cleanup(tracker)
    assert names_in(outside) == SEED
    assert not report.total_deleted
    dropped = is_known_to_be_dropped(engine, begin_anew)
    assert left == ([] if dropped else [("plans", 1), ("plans", 2)])
    assert list(report.already_gone.values()) == [4 if dropped else 2]


def test_so_does_what_references_the_seed(engine, outside, tracker, begin_anew):
    """The application's rows that reference our key now reference somebody else's row."""
    write(engine, plans, {"name": "of a test"})
    begin_anew(outside)
    write(outside, plans, FREE)
    write(outside, parts, {"plan_id": 1})
    for policy in Dependents:
        report, left = cleanup(tracker, dependents=policy)
        assert names_in(outside) == SEED[:1]
        assert names_in(outside, parts) == [(1, 1)]
        assert not report.total_deleted
        assert not report.detached
        assert not left or left == [("plans", 1)]


def test_rows_of_other_tables_go(engine, outside, tracker):
    """One table is emptied; our rows in the table that it references go all the same."""
    write(engine, plans, {"name": "of a test"})
    write(engine, parts, {"plan_id": 1})
    write(outside, plans, {"name": "of another test"})
    with outside.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.execute(sa.delete(parts))
        else:
            connection.exec_driver_sql("TRUNCATE TABLE parts")
            if engine.dialect.name == "postgresql":
                connection.exec_driver_sql("ALTER SEQUENCE parts_id_seq RESTART")
    write(outside, parts, {"plan_id": 2})
    report, left = cleanup(tracker)
    assert names_in(outside) == [(2, "of another test")]
    assert names_in(outside, parts) == [(1, 2)]
    assert left == [("parts", 1)]
    assert report.total_deleted == 1


def test_rows_inserted_in_the_next_block_go(engine, outside, begin_anew):
    """The engine has known the table before it was emptied between two blocks."""
    for _block in range(3):
        with CleanupManager(ResourceTracker(engine)) as manager:
            write(engine, plans, *[{"name": "of a test"}] * 3)
        assert manager.report.total_deleted == 3
        assert names_in(outside) == SEED * (_block > 0)
        begin_anew(outside)
        write(outside, plans, FREE, GOLD)


def test_our_rows_of_the_new_table_go(engine, outside, tracker, begin_anew):
    """The block has rows of both, the later ones under the keys of the earlier."""
    write(engine, plans, *[{"name": "of a test"}] * 3)
    begin_anew(outside)
    write(engine, plans, *[{"name": "of a test"}] * 3)
    write(outside, plans, FREE)
    report, left = cleanup(tracker)
    assert names_in(outside) == [(4, "free")]
    assert report.total_deleted == 3
    assert not left


def test_equal_rows_without_a_key_stay(engine, outside, tracker, begin_anew):
    write(engine, lines, {"text": "equal"}, {"text": "equal"})
    begin_anew(outside)
    write(outside, lines, {"text": "equal"})
    if engine.dialect.name == "sqlite":
        return  # nothing tells them apart
    report, left = cleanup(tracker)
    assert names_in(outside, lines) == [("equal",)]
    assert not report.total_deleted
    assert left == ([] if is_known_to_be_dropped(engine, begin_anew) else [("plan_lines", None)])


def test_a_table_that_is_rebuilt_keeps_its_rows_and_they_are_said(engine, outside, tracker):
    """VACUUM FULL and OPTIMIZE TABLE look as TRUNCATE does: all of the table has moved."""
    write(engine, plans, *[{"name": "of a test"}] * 3)
    rebuild = {"postgresql": "VACUUM FULL plans", "sqlite": "VACUUM"}
    with outside.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        sql = rebuild.get(engine.dialect.name, "OPTIMIZE TABLE plans")
        connection.exec_driver_sql(sql).close()
    report, left = cleanup(tracker)
    assert report.total_deleted + len(left) == 3
    if left:
        assert "emptied or rebuilt" in str(report.leftovers[0])
        assert CleanupManager(tracker, trust_keys=True).cleanup().total_deleted == 3
    assert names_in(outside) == []


def set_next_key(engine, number):
    """Make a number the next one that the database generates for ``plans``."""
    ddl = {
        "postgresql": f"SELECT setval('plans_id_seq', {number}, false)",
        "sqlite": "SELECT 1",  # which gives the highest key again by itself
    }
    with engine.begin() as connection:
        alter = f"ALTER TABLE plans AUTO_INCREMENT = {number}"
        connection.exec_driver_sql(ddl.get(engine.dialect.name, alter)).close()


def restart(engine):
    with engine.begin() as connection:
        ddl = {"postgresql": "ALTER SEQUENCE plans_id_seq RESTART", "sqlite": "SELECT 1"}
        alter = "ALTER TABLE plans AUTO_INCREMENT = 1"
        connection.exec_driver_sql(ddl.get(engine.dialect.name, alter)).close()


@pytest.mark.parametrize("again", [restart, lambda engine: set_next_key(engine, 1)])
def test_a_key_that_is_generated_again_is_not_ours(engine, outside, tracker, again):
    """Somebody deletes our rows, sets the numbers back, and inserts his own."""
    write(engine, plans, *[{"name": "of a test"}] * 3)
    with outside.begin() as connection:
        connection.execute(sa.delete(plans))
    again(outside)
    write(outside, plans, FREE, GOLD)
    report, left = cleanup(tracker)
    assert names_in(outside) == SEED
    assert left == [("plans", 1), ("plans", 2)]
    assert list(report.already_gone.values()) == [1]
    assert not report.total_deleted


def test_keys_that_the_test_has_given_are_no_matter_of_the_generator(engine, outside, tracker):
    write(engine, plans, {"id": 1000, "name": "of a test"}, {"name": "of a test"})
    report, left = cleanup(tracker)
    assert report.total_deleted == 2
    assert not left


def test_a_generator_that_counts_downwards_is_believed(database, engine, outside, tracker):
    if database.backend != "postgresql":
        return
    with outside.begin() as connection:
        connection.exec_driver_sql("ALTER SEQUENCE plans_id_seq INCREMENT -1 MINVALUE -9 START -1")
        connection.exec_driver_sql("ALTER SEQUENCE plans_id_seq RESTART")
    write(engine, plans, *[{"name": "of a test"}] * 3)
    report, left = cleanup(tracker)
    assert report.total_deleted == 3
    assert not left


def test_fewer_rows_of_the_new_table_than_of_the_former_go(engine, outside, tracker, begin_anew):
    write(engine, plans, *[{"name": "of a test"}] * 5)
    begin_anew(outside)
    write(engine, plans, *[{"name": "of a test"}] * 2)
    write(outside, plans, {"id": 4, "name": "free"})
    report, left = cleanup(tracker)
    assert names_in(outside) == [(4, "free")]
    assert report.total_deleted == 2
    assert left == ([] if is_known_to_be_dropped(engine, begin_anew) else [("plans", 4)])


moving = sa.MetaData()
codes = sa.Table("codes", moving, sa.Column("code", sa.String(9), primary_key=True))
uses = sa.Table(
    "uses",
    moving,
    sa.Column("n", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column(
        "code", sa.ForeignKey("codes.code", onupdate="CASCADE"), primary_key=True, nullable=False
    ),
)


def test_a_key_that_on_update_cascade_has_moved_is_followed(engine, outside, tracker):
    """Somebody takes the old key."""
    moving.create_all(outside)
    write(engine, codes, {"code": "old"})
    write(engine, uses, {"n": 1, "code": "old"}, {"n": 2, "code": "old"})
    with engine.begin() as connection:
        connection.execute(sa.update(codes).where(codes.c.code == "old").values(code="new"))
    write(outside, codes, {"code": "old"})
    write(outside, uses, {"n": 1, "code": "old"})
    assert {row.key for row in tracker.rows()} == {("new",), (1, "new"), (2, "new")}
    report = CleanupManager(tracker).cleanup()
    assert names_in(outside, codes) == [("old",)]
    assert names_in(outside, uses) == [(1, "old")]
    assert report.total_deleted == 3


def test_a_sweep_follows_it_too(database, outside, ledgers):
    moving.create_all(outside)
    worker = Worker(database, ledgers)
    worker.writes((codes, [{"code": "old"}]), (uses, [{"n": 1, "code": "old"}]))
    with worker.engine.begin() as connection:
        connection.execute(sa.update(codes).where(codes.c.code == "old").values(code="new"))
    worker.dies()
    write(outside, codes, {"code": "old"})
    write(outside, uses, {"n": 1, "code": "old"})
    assert sweep(outside).total_deleted == 2
    assert names_in(outside, uses) == [(1, "old")]


def test_rows_that_the_user_named_are_those_of_the_table_as_it_was(
    database, outside, ledgers, tracker, begin_anew
):
    """The tracker was told of them before the table was emptied; so was a worker that dies."""
    if database.backend == "sqlite":
        return  # a row that the user named is ours whatever its values are
    write(outside, plans, FREE, GOLD)
    worker = Worker(database, ledgers)
    with worker:
        worker.tracker.track_rows(plans, [1])
    worker.dies()
    tracker.track_rows(plans, [2])
    begin_anew(outside)
    write(outside, plans, FREE, GOLD)
    assert sweep(outside).total_deleted == 0
    report, left = cleanup(tracker)
    assert names_in(outside) == SEED
    assert not report.total_deleted
    assert left == ([] if is_known_to_be_dropped(outside, begin_anew) else [("plans", 2)])
