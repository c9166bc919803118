"""At the level schema a test has tables that no other has, with the rows of the seed alone."""

from __future__ import annotations

import re

import pytest
import sqlalchemy as sa

from harness.spaces import METADATA, ORGS, USERS, count, fill, lease_of_this_process_ends, members
from tidyrows.dialects import dialect_for
from tidyrows.errors import ArgumentError, IsolationError, ProductionDatabaseError
from tidyrows.isolation.isolate import isolate
from tidyrows.isolation.prune import prune


@pytest.mark.parametrize(
    ("level", "pool"), [("schema", False), ("schema", True), ("database", True)]
)
def test_a_test_has_its_own_tables_and_finds_them_empty(any_driver_space_engine, level, pool):
    engine = any_driver_space_engine
    for _ in range(2):
        with isolate(engine, level, metadata=METADATA, pool=pool) as db:
            with db.session() as session:
                assert session.scalars(sa.select(ORGS.c.name)).all() == []
            fill(db.engine)
            with db.session() as session:
                assert session.scalars(sa.select(ORGS.c.name)).all() == ["100%'"] * 2
    assert not sa.inspect(engine).has_table("orgs")


def test_a_schema_of_the_pool_is_emptied_and_used_again(space_engine):
    names = set()
    for _ in range(2):
        with isolate(space_engine, "schema", metadata=METADATA) as db:
            names.add(db.schema)
            fill(db.engine)
        lease_of_this_process_ends()
        (name,) = names
        assert members(space_engine)[name]
    with (
        isolate(space_engine, "schema", metadata=METADATA) as db,
        db.engine.connect() as connection,
    ):
        assert count(connection, ORGS) == count(connection, USERS) == 0


def test_without_the_pool_nothing_is_left(space_engine):
    with isolate(space_engine, "schema", metadata=METADATA, pool=False) as db:
        assert db.schema in members(space_engine) or "building" in db.url.database
    assert db.schema not in members(space_engine)


def test_two_at_once_never_have_the_same_schema(space_engine):
    with (
        isolate(space_engine, "schema", metadata=METADATA) as one,
        isolate(space_engine, "schema", metadata=METADATA) as other,
    ):
        assert one.schema != other.schema
        fill(one.engine)
        with other.engine.connect() as connection:
            assert count(connection, ORGS) == 0


def test_text_and_another_process_reach_the_same_tables(space_engine):
    with isolate(space_engine, "schema", metadata=METADATA) as db:
        fill(db.engine)
        elsewhere = sa.create_engine(db.environ()["DATABASE_URL"])
        with elsewhere.connect() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM orgs")) == 2
        elsewhere.dispose()


def test_a_transaction_that_a_test_left_open_does_not_hang(space_engine):
    with isolate(space_engine, "schema", metadata=METADATA) as db:
        fill(db.engine)
        left = db.engine.connect()
        left.execute(sa.update(ORGS).values(kind="small"))
    with (
        isolate(space_engine, "schema", metadata=METADATA) as db,
        db.engine.connect() as connection,
    ):
        assert count(connection, ORGS) == 0
    left.close()


SUBTLE = {  # what the quick look between two tests does not see
    "sqlite": "CREATE INDEX extra ON orgs (kind)",
    "postgresql": "ALTER TABLE orgs ALTER kind SET DEFAULT 'big'",
    "mysql": "CREATE INDEX extra ON orgs (kind)",
}


def definitions(engine):
    inspector = sa.inspect(engine)
    columns = [(each["name"], each["default"]) for each in inspector.get_columns("orgs")]
    return columns, {each["name"] for each in inspector.get_indexes("orgs")}


@pytest.mark.parametrize("by", ["the test", "the application"])
def test_definitions_that_a_test_changed_are_as_before_for_the_next(database, space_engine, by):
    with isolate(space_engine, "schema", metadata=METADATA) as db:
        before = definitions(db.engine)
        if by == "the test":
            changing, change = db.engine, SUBTLE[database.backend]
        else:
            changing, change = sa.create_engine(db.url), "ALTER TABLE orgs ADD COLUMN extra INT"
        with changing.begin() as connection:
            connection.exec_driver_sql(change)
        changing.dispose()
        assert definitions(db.engine) != before
    with isolate(space_engine, "schema", metadata=METADATA) as db:
        assert definitions(db.engine) == before


SEED = """INSERT INTO orgs (id, kind) VALUES (1, 'big');
UPDATE orgs SET parent_id = 1;
INSERT INTO orgs (id, kind, parent_id) VALUES (2, 'small', 1)"""


@pytest.mark.parametrize("held", [True, False], ids=["between tests", "in the next run"])
def test_rows_of_the_seed_stay_and_are_repaired(space_engine, held):
    rows = sa.select(ORGS).order_by(ORGS.c.id)
    with isolate(space_engine, "schema", metadata=METADATA, seed=SEED) as db:
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
    with isolate(space_engine, "schema", metadata=METADATA, seed=SEED) as db:
        with db.engine.connect() as connection:
            assert connection.execute(rows).all() == before
            assert count(connection, USERS) == 0


def test_a_schema_is_built_like_one_that_is_there(space_engine):
    METADATA.create_all(space_engine)
    with space_engine.begin() as connection:
        connection.execute(sa.insert(ORGS), [{"kind": "big"}, {"kind": "big"}])
    found = sa.MetaData()
    found.reflect(space_engine)
    with isolate(space_engine, "schema", metadata=found) as db, db.engine.begin() as connection:
        connection.execute(sa.insert(ORGS).values(kind="small"))
        rows = connection.execute(sa.select(ORGS.c.id, ORGS.c.name)).all()
        assert rows == [(1, "100%'")]  # the numbers are the schema's own
    with space_engine.connect() as connection:
        assert count(connection, ORGS) == 2


def test_functions_build_a_schema_for_one_test(space_engine):
    def migrate(bind):
        METADATA.create_all(bind)

    def seed(connection):
        connection.execute(sa.insert(ORGS).values(id=1))

    with isolate(space_engine, "schema", migrate=migrate, seed=seed, pool=False) as db:
        with db.engine.connect() as connection:
            assert count(connection, ORGS) == 1


def test_functions_need_files_that_decide(space_engine, tmp_path):
    with pytest.raises(ArgumentError, match="pool='migrations/'"):
        isolate(space_engine, "schema", migrate=METADATA.create_all).open()
    with pytest.raises(ArgumentError, match="does not exist"):
        isolate(space_engine, "schema", migrate=METADATA.create_all, pool="nowhere/").open()
    names, files = [], tmp_path / "migrations"
    files.mkdir()
    for text in ("one", "two", "two"):
        (files / "0001.py").write_text(text)
        with isolate(space_engine, "schema", migrate=METADATA.create_all, pool=files) as db:
            names.append(db.schema)
    assert names[0] != names[1] == names[2]


def test_two_functions_do_not_build_one_schema_though_the_same_files_decide(space_engine, tmp_path):
    files = tmp_path / "models.py"
    files.touch()

    def seed(number):
        def insert(connection):
            connection.execute(sa.insert(ORGS).values(id=number))

        return insert

    names = set()
    for each in (seed(1), lambda _connection: None, seed(2)):
        with isolate(
            space_engine, "schema", migrate=METADATA.create_all, seed=each, pool=files
        ) as db:
            names.add(db.schema)
    assert len(names) == 3


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


RIGHTS = {
    "postgresql": ("CREATE ROLE {0} LOGIN", "DROP ROLE {0}"),
    "mysql": (
        "CREATE USER {0}@'%%'; GRANT SELECT ON {1}.* TO {0}@'%%'",
        "DROP USER {0}@'%%'",
    ),
}


@pytest.mark.parametrize("level", ["schema", "database"])
def test_a_role_that_may_not_make_one_is_told_so(database, space_engine, level):
    if database.backend not in RIGHTS:
        pytest.skip("SQLite has no roles")
    role = f"{database.url.database}_weak"
    make, drop = (text.format(role, database.url.database) for text in RIGHTS[database.backend])
    with space_engine.begin() as connection:
        for statement in make.split("; "):
            connection.exec_driver_sql(statement)
    weak = sa.create_engine(database.url.set(username=role))
    try:
        with pytest.raises(IsolationError, match=r"may not make the (schema|database) tidy_"):
            isolate(weak, level, metadata=METADATA).open()
    finally:
        weak.dispose()
        with space_engine.begin() as connection:
            connection.exec_driver_sql(drop)


def test_production_is_refused_before_anything_is_made(space_engine, monkeypatch):
    monkeypatch.setenv("APP_ENV", "production")
    with pytest.raises(ProductionDatabaseError):
        isolate(space_engine, "schema", metadata=METADATA).open()
    monkeypatch.delenv("APP_ENV")
    assert members(space_engine) == {}


def test_pruning_drops_what_nobody_holds_and_nobody_used_lately(space_engine):
    with isolate(space_engine, "schema", metadata=METADATA) as mine:
        with isolate(space_engine, "schema", metadata=METADATA) as other:
            pass
        lease_of_this_process_ends()
        assert prune(space_engine, older_than=3600) == []
        dropped = prune(space_engine, older_than=0)
        assert other.schema in dropped
        assert mine.schema not in dropped
        fill(mine.engine)
    assert members(space_engine).keys() >= {mine.schema}
    lease_of_this_process_ends()
    assert mine.schema in prune(space_engine, older_than=0)
    assert members(space_engine) == {}


def test_each_engine_of_a_process_keeps_its_own_options(database, space_engine):
    heard = []
    with isolate(space_engine, "schema", metadata=METADATA) as db:
        name = db.schema
    other = database.engine(pool_size=1)
    sa.event.listen(other, "connect", lambda *_args: heard.append("connect"))
    with isolate(other, "schema", metadata=METADATA) as db:
        assert db.schema == name
        heard.clear()
        db.engine.connect().close()
        assert heard == ["connect"]
        assert db.engine.pool.size() == 1


TREES = {
    "sqlite": """CREATE TABLE trees (id INTEGER PRIMARY KEY, height INT);
        CREATE TABLE felled (id INTEGER PRIMARY KEY, height INT, tall INT AS (height > 9));
        CREATE VIEW tall AS SELECT id FROM trees WHERE height > 9;
        CREATE TRIGGER fell AFTER DELETE ON trees BEGIN
            INSERT INTO felled (height) VALUES (OLD.height); END""",
    "postgresql": """CREATE TYPE size AS ENUM ('small', 'large');
        CREATE SEQUENCE numbers;
        CREATE TABLE trees (id INT PRIMARY KEY DEFAULT nextval('numbers'), height INT, size size);
        CREATE TABLE felled (id INT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, height INT,
                             tall BOOL GENERATED ALWAYS AS (height > 9) STORED);
        CREATE VIEW tall AS SELECT id FROM trees WHERE height > 9;
        CREATE FUNCTION fell() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO felled (height) VALUES (OLD.height); RETURN OLD; END $$;
        CREATE TRIGGER fell BEFORE DELETE ON trees FOR EACH ROW EXECUTE FUNCTION fell()""",
    "mysql": """CREATE TABLE trees (id INT AUTO_INCREMENT PRIMARY KEY, height INT);
        CREATE TABLE felled (id INT AUTO_INCREMENT PRIMARY KEY, height INT,
                             tall INT AS (height > 9));
        CREATE VIEW tall AS SELECT id FROM trees WHERE height > 9;
        CREATE PROCEDURE note(IN height INT) INSERT INTO felled (height) VALUES (height);
        CREATE TRIGGER fell AFTER DELETE ON trees FOR EACH ROW BEGIN CALL note(OLD.height); END""",
}


def test_views_triggers_and_functions_of_a_migration_work_and_leave_nothing(database, space_engine):
    seed = "INSERT INTO felled (height) VALUES (30)"
    wanted = {"migrate": TREES[database.backend], "seed": seed}
    for _ in range(2):
        with isolate(space_engine, "schema", **wanted) as db, db.engine.begin() as connection:
            run = connection.exec_driver_sql
            assert run("SELECT height, tall FROM felled").all() == [(30, 1)]
            assert run("SELECT * FROM trees").all() == []
            run("INSERT INTO trees (height) VALUES (20), (5)")
            assert len(run("SELECT * FROM tall").all()) == 1
            run("DELETE FROM trees WHERE height = 5")
            assert len(run("SELECT * FROM felled").all()) == 2
            run("DELETE FROM felled")


def test_a_script_that_fails_is_the_error_and_leaves_nothing(space_engine):
    broken = "CREATE TABLE one (id INT); CREATE TABLE two (id INT, id INT)"
    with pytest.raises(Exception, match=r"(?i)duplicate column|more than once"):
        isolate(space_engine, "schema", migrate=broken).open()
    assert members(space_engine) == {}


def test_a_half_built_schema_that_cannot_be_dropped_is_said(space_engine, monkeypatch):
    def refuse(space):
        raise RuntimeError("the disk is full")

    def seed(connection):
        monkeypatch.setattr(dialect_for(space_engine).space_kinds["schema"], "drop", refuse)
        connection.exec_driver_sql("SELECT * FROM no_such")

    with pytest.raises(Exception, match=r"no_such") as caught:
        isolate(space_engine, "schema", metadata=METADATA, seed=seed, pool=False).open()
    monkeypatch.undo()
    (note,) = caught.value.__notes__
    assert re.search(r"made of the \w+ tidy_\w+ could not be dropped: .*disk is full", note)
