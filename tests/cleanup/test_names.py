"""Tables and columns that are called as our own SQL calls things are cleaned like any other.

Each test has all names at once: where it fails, it says which tables kept their rows.
"""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from harness.blocks import INTEGER, left_over, reference, table, tracked
from harness.bystanders import Bystanders
from harness.keykinds import keyed
from harness.ledgers import Worker, entries, ids, sweep
from harness.loops import insert_loop
from harness.models import OWN_NAMES, OWN_TABLES
from harness.strangers import strangers
from harness.targets import ALL_DRIVERS, WITHOUT_FOREIGN_KEYS, on
from tidyrows import CleanupManager, Dependents, ResourceTracker
from tidyrows.audit.tables import reflected
from tidyrows.dialects import dialect_for

CATALOGUES = (*"abcdfilmnoprwx", "me", "pid")  # aliases in questions to catalogues
RESERVED = ("select", "order", "key", "row")
NAMES = (*OWN_NAMES, *CATALOGUES, *RESERVED)
MANY = range(0, 1560, 3)  # 520 keys: no run of integers, and too many for IN
FEW = (1, 3)
every_driver = on(*ALL_DRIVERS, WITHOUT_FOREIGN_KEYS)
everywhere = on("sqlite", WITHOUT_FOREIGN_KEYS, "postgresql+psycopg", "mysql+pymysql")
strictly_everywhere = on("sqlite", "postgresql+psycopg", "mysql+pymysql")


def one(name):
    """A column is called as its table, and one as the keys."""
    yield sa.Column("id", sa.Integer, **INTEGER)
    yield sa.Column(name, sa.Integer)
    if name != "tidyrows_keys":
        yield sa.Column("tidyrows_keys", sa.Integer)


def composite(_name):
    """The columns are called as those of our keys, in another order."""
    yield sa.Column("k1", sa.Integer, **INTEGER)
    yield sa.Column("k0", sa.String(20), primary_key=True)
    yield sa.Column("key_0", sa.Integer, **INTEGER)
    yield sa.Column("value", sa.Integer)


def keyless(_name):
    """The columns are called as those of our own WITH once were."""
    yield sa.Column("at", sa.Integer)
    yield sa.Column("place", sa.String(20))


VALUES = {
    one: lambda number: {"id": number},
    composite: lambda number: {"k1": number, "k0": f"k{number}", "key_0": 7},
    keyless: lambda number: {"at": number, "place": "same"},
}


def add(engine, *batches):
    with engine.begin() as connection:
        for each, rows in batches:
            connection.execute(sa.insert(each), rows)


def sized(rows):
    return {name.name: len(found) for name, found in rows.items()}


def counted(rows):
    return {name.name: count for name, count in rows.items()}


@every_driver
@pytest.mark.parametrize("shape", VALUES)
def test_rows_of_every_shape_of_key_go(engine, shape):
    metadata = sa.MetaData()
    tables = [sa.Table(name, metadata, *shape(name)) for name in NAMES]
    metadata.create_all(engine)
    values = VALUES[shape]
    add(engine, *((each, [values(1000), values(1001)]) for each in tables))
    bystanders = Bystanders(engine)
    numbers = {name: MANY if name in OWN_NAMES and shape is not keyless else FEW for name in NAMES}
    with CleanupManager(ResourceTracker(engine)) as cleanup:
        add(engine, *((each, [values(n) for n in numbers[each.name]]) for each in tables))
    assert counted(cleanup.report.deleted) == {name: len(numbers[name]) for name in NAMES}
    bystanders.assert_untouched()


@on(*ALL_DRIVERS, WITHOUT_FOREIGN_KEYS, fixture="zoo_database")
def test_circles_of_rows_go(zoo_engine):
    bystanders = strangers(zoo_engine, 1)
    tracker = ResourceTracker(zoo_engine)
    with zoo_engine.begin() as connection:
        for each in OWN_TABLES:
            insert_loop(connection, (each, [{"id": 1, "id_1": 2}, {"id": 2, "id_1": 1}]))
    for each in OWN_TABLES:
        tracker.track_rows(each, [1, 2])
    with CleanupManager(tracker) as cleanup:
        pass
    assert counted(cleanup.report.deleted) == dict.fromkeys(OWN_NAMES, 2)
    bystanders.assert_untouched()


def pairs(engine, **options):
    """Each table, and another with the name of its anonymous alias: they reference each other."""
    metadata = sa.MetaData()
    names = [name for name in OWN_NAMES if name != "parent_1"]  # the other one of parent
    found = [
        (
            table(metadata, name, reference("id_1", f"{name}_1.id", nullable=True, use_alter=True)),
            table(metadata, f"{name}_1", reference("id_1", f"{name}.id", **options)),
        )
        for name in names
    ]
    metadata.create_all(engine)
    return found


@everywhere
def test_circles_of_two_tables_go(engine):
    two = pairs(engine)
    add(engine, *((each, [{"id": 5}]) for each, _other in two))
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    for each, other in two:
        with engine.begin() as connection:
            insert_loop(connection, (each, [{"id": 1, "id_1": 2}]), (other, [{"id": 2, "id_1": 1}]))
        tracker.track_rows(each, [1])
        tracker.track_rows(other, [2])
    with CleanupManager(tracker) as cleanup:
        pass
    assert cleanup.report.total_deleted == 2 * len(two)
    bystanders.assert_untouched()


@everywhere
@pytest.mark.parametrize("mode", [Dependents.FOLLOW_SCHEMA, Dependents.DELETE])
def test_what_the_application_made_goes(engine, mode):
    """A row of the other table needs ours; another row of ours' table may reference that one."""
    two = pairs(engine)
    bystanders = Bystanders(engine)
    tracker = tracked(engine, *((each, [{"id": 1}]) for each, _other in two))
    add(engine, *((other, [{"id": 2, "id_1": 1}]) for _each, other in two))
    add(engine, *((each, [{"id": 3, "id_1": 2}]) for each, _other in two))
    report = CleanupManager(tracker, dependents=mode).cleanup()
    theirs, others = {each.name: 1 for each, _other in two}, {each.name: 1 for _each, each in two}
    assert counted(report.deleted) == theirs
    if mode is Dependents.DELETE:
        assert sized(report.dependents) == {**theirs, **others}
    else:
        assert sized(report.dependents) == others
        assert sized(report.detached) == theirs
        with engine.begin() as connection:
            for each, _other in two:
                connection.execute(sa.delete(each))
    bystanders.assert_untouched()


@everywhere
def test_protected_rows_keep_ours_and_the_cause_says_so(engine):
    two = pairs(engine)
    tracker = tracked(engine, *((each, [{"id": 1}, {"id": 2}]) for each, _other in two))
    add(engine, *((other, [{"id": 2, "id_1": 1}]) for _each, other in two))
    left = left_over(CleanupManager(tracker, protect=[other for _each, other in two]))
    assert set(left) == {(each.name, 1) for each, _other in two}
    for (name, _key), cause in left.items():
        assert f"{name}_1(2)" in cause
        assert "protect" in cause


@everywhere
def test_a_protected_table_may_have_such_a_name(engine):
    """The same by the other key: ``parent`` is protected, and references ours."""
    two = pairs(engine, nullable=True)
    tracker = tracked(engine, *((other, [{"id": 1}, {"id": 2}]) for _each, other in two))
    add(engine, *((each, [{"id": 2, "id_1": 1}]) for each, _other in two))
    left = left_over(CleanupManager(tracker, protect=[each for each, _other in two]))
    assert set(left) == {(other.name, 1) for _each, other in two}
    for (name, _key), cause in left.items():
        assert f"{name.removesuffix('_1')}(2)" in cause
        assert "protect" in cause


@strictly_everywhere
def test_claimed_rows_hold_ours_and_go_with_a_sweep(database, ledgers):
    outside = database.engine()
    two = pairs(outside)
    mine = Worker(database, ledgers, name="gw0").writes(
        *((each, [{"id": 1}, {"id": 2}]) for each, _other in two)
    )
    theirs = Worker(database, ledgers, name="gw1").writes(
        *((other, [{"id": 2, "id_1": 1}]) for _each, other in two)
    )
    held = CleanupManager(mine.tracker).cleanup().held
    assert {(one.row.table.name, one.row.key) for one in held} == {
        (each.name, (1,)) for each, _other in two
    }
    CleanupManager(theirs.tracker).cleanup()
    mine.dies()
    assert counted(sweep(outside).deleted) == {each.name: 1 for each, _other in two}
    assert not entries(outside)
    assert not [each.name for both in two for each in both if ids(outside, each)]


@every_driver
@pytest.mark.parametrize("shape", [one, composite])
def test_rows_that_are_still_there_are_seen(engine, shape):
    """By many keys and by few, of one table and of many at once."""
    metadata = sa.MetaData()
    tables = [sa.Table(name, metadata, *shape(name)) for name in OWN_NAMES]
    metadata.create_all(engine)
    values = VALUES[shape]
    add(engine, *((each, [values(number) for number in FEW]) for each in tables))
    dialect, reals = dialect_for(engine), [keyed(engine, each) for each in tables]

    def keys(each, numbers):
        found = [tuple(values(n)[c.name] for c in each.primary_key) for n in numbers]
        return found if shape is composite else [key for (key,) in found]

    with engine.connect() as connection:
        dialect.begin_cleanup(connection, lock_timeout=5)
        for numbers in (FEW, range(600)):
            asked = [(real, keys(real.table, numbers)) for real in reals]
            there = [keys(real.table, FEW) for real in reals]
            assert dialect.existing_keys_of_each(connection, asked) == there
            for (real, wanted), found in zip(asked, there, strict=True):
                assert dialect.existing_keys(connection, real, wanted) == found
                dialect.lock(connection, real, wanted)
                columns = real.key_clauses
                rows = dialect.find(connection, real, wanted, columns, lock=True)
                assert sorted(rows) == sorted(k if shape is composite else (k,) for k in found)
        connection.rollback()
        dialect.end_cleanup(connection)


@strictly_everywhere
def test_the_audit_sees_their_rows(engine):
    metadata = sa.MetaData()
    for name in NAMES:
        sa.Table(name, metadata, *one(name))
    metadata.create_all(engine)
    schema = sa.inspect(engine).default_schema_name
    with engine.connect() as connection:
        found = list(reflected(connection, "here", schema))
        for each in found:
            each.begin(connection)
        questions = [one for each in found for one in each.counting(connection)]
    add(engine, *((each, [{"id": 7}]) for each in metadata.tables.values()))
    with engine.connect() as connection:
        told = connection.exec_driver_sql(f"SELECT {', '.join(questions)}").one()
        assert list(told) == [1, 7] * len(NAMES)
        assert {each.name.name: len(each.look(connection).appeared) for each in found} == (
            dict.fromkeys(NAMES, 1)
        )


@on("sqlite", "postgresql+psycopg", "mysql+pymysql", fixture="zoo_database")
def test_preserved_rows_are_put_back(zoo_engine):
    """SQLAlchemy calls the bind of a condition on ``id`` as that of a value for ``id_1``."""
    bystanders = strangers(zoo_engine)
    number = 900_000
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker) as cleanup, zoo_engine.begin() as connection:
        for each in OWN_TABLES:
            tracker.preserve(sa.select(each).where(each.c.id == number))
            connection.execute(sa.update(each).where(each.c.id == number).values(id_1=sa.null()))
    assert counted(cleanup.report.restored) == dict.fromkeys(OWN_NAMES, 1)
    bystanders.assert_untouched()
