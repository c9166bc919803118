"""At the level schema a test has tables that no other has, with the rows of the seed alone."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from tidyrows.dialects import dialect_for
from tidyrows.errors import ArgumentError, IsolationError, ProductionDatabaseError
from tidyrows.isolation import lease, pool
from tidyrows.isolation.isolate import isolate
from tidyrows.isolation.prune import prune

METADATA = sa.MetaData()
ORGS = sa.Table(
    "orgs",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("na%me", sa.String(40), server_default="100%'", key="name"),
    sa.Column("kind", sa.Enum("big", "small", name="org_kind")),
    sa.Column("parent_id", sa.ForeignKey("orgs.id")),
    sa.Column("owner_id", sa.ForeignKey("User s.id", use_alter=True, name="fk_owner")),
)
USERS = sa.Table(
    "User s",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("org_id", sa.ForeignKey("orgs.id"), nullable=False),
)


def lease_of_this_process_ends():
    """As at the end of a process."""
    for kept in lease.idle.values():
        while kept:
            kept.pop().let_go()


@pytest.fixture(autouse=True)
def _nothing_is_kept():
    """What this process keeps between its tests goes with the test's database."""
    yield
    lease_of_this_process_ends()


@pytest.fixture
def engine(engine):
    """What is kept on the server goes too."""
    yield engine
    lease_of_this_process_ends()
    prune(engine, older_than=0)


@pytest.fixture
def any_driver_engine(any_driver_engine):
    """As ``engine``."""
    yield any_driver_engine
    lease_of_this_process_ends()
    prune(any_driver_engine, older_than=0)


def count(connection, table):
    return connection.scalar(sa.select(sa.func.count()).select_from(table))


def fill(engine):
    """An org that is its own parent, with an owner that belongs to it."""
    with engine.begin() as connection:
        connection.execute(sa.insert(ORGS).values(id=1, kind="big", parent_id=1))
        connection.execute(sa.insert(USERS).values(id=7, org_id=1))
        connection.execute(sa.update(ORGS).values(owner_id=7))
        connection.execute(sa.text("INSERT INTO orgs (id, parent_id) VALUES (2, 1)"))


@pytest.mark.parametrize(
    ("level", "pool"), [("schema", False), ("schema", True), ("database", True)]
)
def test_a_test_has_its_own_tables_and_finds_them_empty(any_driver_engine, level, pool):
    engine = any_driver_engine
    for _ in range(2):
        with isolate(engine, level, metadata=METADATA, pool=pool) as db:
            with db.session() as session:
                assert session.scalars(sa.select(ORGS.c.name)).all() == []
            fill(db.engine)
            with db.session() as session:
                assert session.scalars(sa.select(ORGS.c.name)).all() == ["100%'"] * 2
    assert not sa.inspect(engine).has_table("orgs")


def members(engine):
    """What was built, by name."""
    kind = dialect_for(engine).space_kinds["schema"]
    managing = kind.managing(engine)
    with managing.connect() as connection:
        found = kind(dialect_for(engine), engine, "tidy_x", connection).marks()
    return {name: mark for name, mark in found.items() if name.startswith(pool._prefix(engine))}


def test_a_schema_of_the_pool_is_emptied_and_used_again(engine):
    names = set()
    for _ in range(2):
        with isolate(engine, "schema", metadata=METADATA) as db:
            names.add(db.schema)
            fill(db.engine)
        lease_of_this_process_ends()
        (name,) = names
        assert members(engine)[name]
    with isolate(engine, "schema", metadata=METADATA) as db, db.engine.connect() as connection:
        assert count(connection, ORGS) == count(connection, USERS) == 0


def test_without_the_pool_nothing_is_left(engine):
    with isolate(engine, "schema", metadata=METADATA, pool=False) as db:
        assert db.schema in members(engine) or "building" in db.url.database
    assert db.schema not in members(engine)


def test_two_at_once_never_have_the_same_schema(engine):
    with (
        isolate(engine, "schema", metadata=METADATA) as one,
        isolate(engine, "schema", metadata=METADATA) as other,
    ):
        assert one.schema != other.schema
        fill(one.engine)
        with other.engine.connect() as connection:
            assert count(connection, ORGS) == 0


def test_text_and_another_process_reach_the_same_tables(engine):
    with isolate(engine, "schema", metadata=METADATA) as db:
        fill(db.engine)
        elsewhere = sa.create_engine(db.environ()["DATABASE_URL"])
        with elsewhere.connect() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM orgs")) == 2
        elsewhere.dispose()


def test_a_transaction_that_a_test_left_open_does_not_hang(engine):
    with isolate(engine, "schema", metadata=METADATA) as db:
        fill(db.engine)
        left = db.engine.connect()
        left.execute(sa.update(ORGS).values(kind="small"))
    with isolate(engine, "schema", metadata=METADATA) as db, db.engine.connect() as connection:
        assert count(connection, ORGS) == 0
    left.close()


def test_a_column_that_a_test_added_is_not_there_for_the_next(engine):
    with isolate(engine, "schema", metadata=METADATA) as db, db.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE orgs ADD COLUMN extra INTEGER")
    with isolate(engine, "schema", metadata=METADATA) as db:
        columns = {column["name"] for column in sa.inspect(db.engine).get_columns("orgs")}
        assert "extra" not in columns


SEED = """INSERT INTO orgs (id, kind) VALUES (1, 'big');
UPDATE orgs SET parent_id = 1;
INSERT INTO orgs (id, kind, parent_id) VALUES (2, 'small', 1)"""


@pytest.mark.parametrize("held", [True, False], ids=["between tests", "in the next run"])
def test_rows_of_the_seed_stay_and_are_repaired(engine, held):
    rows = sa.select(ORGS).order_by(ORGS.c.id)
    with isolate(engine, "schema", metadata=METADATA, seed=SEED) as db:
        with db.engine.connect() as connection:
            before = connection.execute(rows).all()
        assert [row.kind for row in before] == ["big", "small"]
        with db.engine.begin() as connection:
            connection.execute(sa.update(ORGS).where(ORGS.c.id == 1).values(kind="small"))
            connection.execute(sa.insert(USERS).values(id=7, org_id=2))
            connection.execute(sa.update(ORGS).values(owner_id=7, parent_id=2))
            connection.execute(sa.delete(ORGS).where(ORGS.c.id == 1))
    if not held:
        lease_of_this_process_ends()
    with isolate(engine, "schema", metadata=METADATA, seed=SEED) as db:
        with db.engine.connect() as connection:
            assert connection.execute(rows).all() == before
            assert count(connection, USERS) == 0


def test_functions_build_a_schema_for_one_test(engine):
    def migrate(bind):
        METADATA.create_all(bind)

    def seed(connection):
        connection.execute(sa.insert(ORGS).values(id=1))

    with isolate(engine, "schema", migrate=migrate, seed=seed, pool=False) as db:
        with db.engine.connect() as connection:
            assert count(connection, ORGS) == 1


def test_functions_need_files_that_decide(engine, tmp_path):
    with pytest.raises(ArgumentError, match="pool='migrations/'"):
        isolate(engine, "schema", migrate=METADATA.create_all).open()
    with pytest.raises(ArgumentError, match="does not exist"):
        isolate(engine, "schema", migrate=METADATA.create_all, pool="nowhere/").open()
    names, files = [], tmp_path / "migrations"
    files.mkdir()
    for text in ("one", "two", "two"):
        (files / "0001.py").write_text(text)
        with isolate(engine, "schema", migrate=METADATA.create_all, pool=files) as db:
            names.append(db.schema)
    assert names[0] != names[1] == names[2]


def test_a_foreign_key_out_of_the_schema_is_refused_by_name(database):
    if database.backend == "sqlite":
        pytest.skip("SQLite has no foreign keys between files")
    engine, other = database.engine(), database.extra_schema("other")
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE TABLE {other}.countries (id INT PRIMARY KEY)")
    migrate = (
        "CREATE TABLE cities (country INT, "
        f"CONSTRAINT fk_out FOREIGN KEY (country) REFERENCES {other}.countries (id))"
    )
    with pytest.raises(IsolationError, match=f"'cities' holds 'fk_out', which leads to {other}"):
        isolate(engine, "schema", migrate=migrate).open()
    elsewhere = sa.MetaData()
    sa.Table("countries", elsewhere, sa.Column("id", sa.Integer), schema=other)
    with pytest.raises(IsolationError, match=f"{other}.countries of the metadata"):
        isolate(engine, "schema", metadata=elsewhere).open()


def test_production_is_refused_before_anything_is_made(engine, monkeypatch):
    monkeypatch.setenv("APP_ENV", "production")
    with pytest.raises(ProductionDatabaseError):
        isolate(engine, "schema", metadata=METADATA).open()
    monkeypatch.delenv("APP_ENV")
    assert members(engine) == {}


def test_pruning_drops_what_nobody_holds_and_nobody_used_lately(engine):
    with isolate(engine, "schema", metadata=METADATA) as mine:
        with isolate(engine, "schema", metadata=METADATA) as other:
            pass
        lease_of_this_process_ends()
        assert prune(engine, older_than=3600) == []
        dropped = prune(engine, older_than=0)
        assert other.schema in dropped
        assert mine.schema not in dropped
        fill(mine.engine)
    assert members(engine).keys() >= {mine.schema}
    lease_of_this_process_ends()
    assert mine.schema in prune(engine, older_than=0)
    assert members(engine) == {}
