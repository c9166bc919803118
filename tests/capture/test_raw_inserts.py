"""Raw SQL strings that insert rows or change keys: what is said of them, and what is followed."""

from __future__ import annotations

import sys
import weakref
from contextlib import suppress

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from harness.bystanders import Bystanders
from harness.models import Currency, Org
from harness.targets import on
from tidyrows import CleanupError, CleanupManager, ResourceTracker, UntrackedRowsWarning
from tidyrows.capture.raw_sql import first_word, inserted_table, updated_columns


@pytest.mark.parametrize(
    ("sql", "table"),
    [
        ("INSERT INTO orgs (name) VALUES ('raw')", "orgs"),
        ("insert ignore orgs values (1)", "orgs"),
        ("INSERT OR REPLACE INTO `a`.`b` VALUES (1)", "`a`.`b`"),
        ("REPLACE orgs VALUES (1)", "orgs"),
        ("REPLACE LOW_PRIORITY INTO orgs VALUES (1)", "orgs"),
        ("SELECT REPLACE (name, 'a', 'b') FROM orgs", None),
        ("SELECT 1; INSERT INTO orgs VALUES (1)", "orgs"),
        ("UPDATE orgs SET name = '; INSERT INTO users'", None),
        ("EXPLAIN ANALYZE INSERT INTO orgs VALUES (1)", "orgs"),
        ("EXPLAIN (ANALYZE, BUFFERS) INSERT INTO orgs VALUES (1)", "orgs"),
        ("ANALYZE FORMAT=JSON INSERT INTO orgs VALUES (1)", "orgs"),
        ("EXPLAIN INSERT INTO orgs VALUES (1)", None),
        ("SET STATEMENT max_statement_time = 1 FOR INSERT INTO orgs VALUES (1)", "orgs"),
        ("BEGIN NOT ATOMIC INSERT INTO orgs VALUES (1); END", "orgs"),
        ("DO $$ BEGIN INSERT INTO orgs VALUES (1); END $$", "orgs"),
        ("EXECUTE IMMEDIATE 'INSERT INTO orgs VALUES (1)'", "orgs"),
        ("PREPARE p AS INSERT INTO orgs VALUES (1)", None),
        ("CREATE TRIGGER a AFTER INSERT ON b BEGIN INSERT INTO orgs VALUES (1); END", None),
        ("CREATE TABLE a (b int); INSERT INTO orgs VALUES (1)", "orgs"),
        ("COPY orgs (name) FROM STDIN", "orgs"),
        ("COPY orgs TO STDOUT", None),
        ("LOAD DATA LOCAL INFILE 'a' INTO TABLE orgs", "orgs"),
        ("MERGE INTO orgs USING other ON true WHEN NOT MATCHED THEN DO NOTHING", "orgs"),
        ("WITH a AS (INSERT INTO orgs VALUES (1) RETURNING id) SELECT * FROM a", "orgs"),
        ("-- INSERT INTO users\nINSERT INTO orgs VALUES (1)", "orgs"),
        ("/*!50000 INSERT INTO orgs VALUES (1) */", "orgs"),
        ("SELECT 'INSERT INTO orgs'", None),
    ],
)
def test_the_table_that_a_string_inserts_into(sql, table):
    assert inserted_table(sql) == table


@pytest.mark.parametrize(
    ("sql", "names", "columns"),
    [
        ("UPDATE orgs SET id = 5 WHERE name = 'a'", [["orgs"]], {"id"}),
        ("update a.b AS x set x.name = 'c', `ID` = `id` + 1", [["a", "b"]], {"name", "id"}),
        ("UPDATE orgs SET (id, name) = (1, 'x')", [["orgs"]], {"id", "name"}),
        ("UPDATE orgs SET name = (SELECT id FROM x WHERE a = b)", [["orgs"]], {"name"}),
        ("UPDATE orgs SET name = 'a, id = 5'", [["orgs"]], {"name"}),
        ("UPDATE ONLY orgs SET name = CASE WHEN (id = 1) THEN 2 END", [["orgs"]], {"name"}),
        ("SELECT 1", [], set()),
    ],
)
def test_the_columns_that_a_string_sets(sql, names, columns):
    assert updated_columns(sql) == (names, columns)


def test_a_raw_update_of_a_key_is_said_and_no_row_under_either_key_is_deleted(zoo_engine):
    strangers = Bystanders(zoo_engine)
    with (
        pytest.warns(UntrackedRowsWarning, match="primary keys of .*currencies"),
        pytest.raises(CleanupError),
        CleanupManager(ResourceTracker(zoo_engine)),
        Session(zoo_engine) as session,
    ):
        session.add(Currency(code="OLD", name="ours"))
        session.flush()
        session.execute(sa.text("UPDATE currencies SET code = 'NEW' WHERE code = 'OLD'"))
        session.commit()
        strangers.insert(Currency, {"code": "OLD", "name": "theirs"})
    with zoo_engine.connect() as connection:  # nobody can tell whose row has the new key
        rows = connection.execute(sa.select(Currency.code, Currency.name)).all()
    assert sorted(map(tuple, rows)) == [("NEW", "ours"), ("OLD", "theirs")]


def test_a_raw_update_of_other_columns_changes_nothing(zoo_engine):
    with CleanupManager(ResourceTracker(zoo_engine), trust_keys=True) as cleanup:
        with Session(zoo_engine) as session:
            session.add(Currency(code="OLD", name="ours"))
            session.flush()
            session.execute(sa.text("UPDATE currencies SET name = 'code = x' WHERE code = 'OLD'"))
            session.commit()
    assert cleanup.report.total_deleted == 1


@on("postgresql+psycopg", "mysql+pymysql", fixture="zoo_database")
def test_an_explained_insert_that_runs_is_said(zoo_engine):
    explain = "EXPLAIN ANALYZE" if zoo_engine.dialect.name == "postgresql" else "ANALYZE"
    with (
        pytest.warns(UntrackedRowsWarning, match="inserted into orgs"),
        CleanupManager(ResourceTracker(zoo_engine)) as cleanup,
    ):
        with zoo_engine.begin() as connection:
            connection.exec_driver_sql(f"{explain} INSERT INTO orgs (name) VALUES ('raw')")
        cleanup.tracker.track_query(sa.select(Org))
    assert cleanup.report.total_deleted == 1


AUDIT = {
    "sqlite": [
        "CREATE TRIGGER log AFTER INSERT ON orgs BEGIN INSERT INTO log VALUES (NEW.id); END"
    ],
    "mysql": [
        "CREATE TRIGGER log AFTER INSERT ON orgs FOR EACH ROW INSERT INTO log VALUES (NEW.id)"
    ],
    "postgresql": [
        (
            "CREATE FUNCTION log() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN INSERT INTO log VALUES (NEW.id); RETURN NULL; END $$"
        ),
        "CREATE TRIGGER log AFTER INSERT ON orgs FOR EACH ROW EXECUTE FUNCTION log()",
    ],
}


@on("sqlite", "postgresql+psycopg", "mysql+pymysql", fixture="zoo_database")
@pytest.mark.parametrize("many", [False, True])
def test_rows_that_a_trigger_inserts_elsewhere_are_said_once(zoo_engine, many):
    with zoo_engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE log (org_id INTEGER)")
        for sql in AUDIT[zoo_engine.dialect.name]:
            connection.exec_driver_sql(sql)
        if zoo_engine.dialect.name == "postgresql":  # of the first block, not of the setting up
            connection.exec_driver_sql("INSERT INTO orgs (name) VALUES ('theirs')")
    for _block in range(2):
        with (
            pytest.warns(UntrackedRowsWarning) as warned,
            CleanupManager(ResourceTracker(zoo_engine)) as cleanup,
        ):
            for _transaction in range(2):
                with Session(zoo_engine) as session:
                    session.add_all([Org(name=f"ours {n}") for n in range(3 if many else 1)])
                    session.commit()
        assert cleanup.report.total_deleted == (6 if many else 2)
        (text,) = [str(each.message) for each in warned]
        assert "log" in text
        assert "tracker.track_query(select(log)...)" in text
        if zoo_engine.dialect.name == "postgresql":
            assert text.startswith(f"{3 if many else 1} row(s) were inserted")


@on("sqlite", "postgresql+psycopg", "mysql+pymysql", fixture="zoo_database")
def test_a_warning_of_a_trigger_that_is_an_error_loses_no_row(zoo_engine, monkeypatch):
    with zoo_engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE log (org_id INTEGER)")
        for sql in AUDIT[zoo_engine.dialect.name]:
            connection.exec_driver_sql(sql)
    told = []  # where the counters tell, that is before the COMMIT, which must be sent
    monkeypatch.setattr(sys, "unraisablehook", lambda told_of: told.append(told_of.exc_value))
    with suppress(UntrackedRowsWarning):
        with CleanupManager(ResourceTracker(zoo_engine)), Session(zoo_engine) as session:
            try:
                session.execute(sa.insert(Org).values(name="ours"))
            except UntrackedRowsWarning as warning:
                told.append(warning)
                raise
            finally:
                session.commit()
    assert [type(each) for each in told] == [UntrackedRowsWarning]
    with zoo_engine.connect() as connection:
        assert connection.execute(sa.select(Org.id).where(Org.name == "ours")).all() == []
        assert len(connection.exec_driver_sql("SELECT * FROM log").all()) == 1


def test_a_script_of_inserts_is_not_kept():
    class Text(str):
        __slots__ = ("__weakref__",)

    script = Text(f"INSERT INTO orgs (name) VALUES {', '.join(1000 * ['(1)'])}")
    assert first_word(script) == "INSERT"
    assert inserted_table(script) == "orgs"
    assert updated_columns(script) == ([], set())
    still_there = weakref.ref(script)
    del script
    assert still_there() is None
