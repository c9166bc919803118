"""Raw statements that empty tables: what has a tracked key afterwards is not what was tracked."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from harness.models import Currency, Org, User
from harness.targets import on
from tidyrows import CleanupManager, ResourceTracker
from tidyrows.capture.raw_sql import emptied_tables


def write(bind, **values):
    bind.execute(sa.insert(Currency).values(**values))


def names(engine):
    with engine.connect() as connection:
        return sorted(connection.scalars(sa.select(Currency.name)))


@pytest.mark.parametrize(
    ("sql", "names", "with_kin"),
    [
        ("DELETE FROM orgs", [["orgs"]], False),
        (" delete from public.orgs ; ", [["public", "orgs"]], False),
        ('/* all */ TRUNCATE `a`, "b c".d RESTART IDENTITY', [["a"], ["b c", "d"]], False),
        ("truncate table only orgs cascade", [["orgs"]], True),
        ("DELETE FROM orgs WHERE id = 1", [], False),
        ("DELETE FROM orgs LIMIT 1", [], False),
        ("DELETE FROM orgs; DELETE FROM users", [], False),
        ("SELECT 1", [], False),
    ],
)
def test_which_tables_a_string_empties(sql, names, with_kin):
    assert emptied_tables(sql) == (names, with_kin)


@pytest.mark.parametrize("isolation", [None, "AUTOCOMMIT"])
def test_a_key_that_is_used_again_after_a_raw_delete_is_somebody_else_s(
    zoo_database, zoo_engine, isolation
):
    options = {} if isolation is None else {"isolation_level": isolation}
    with CleanupManager(ResourceTracker(zoo_engine)) as cleanup:
        with zoo_engine.connect().execution_options(**options) as connection:
            write(connection, code="AAA", name="ours")
            write(connection, code="BBB", name="ours")
            connection.commit()
            connection.exec_driver_sql("DELETE FROM currencies")
            write(connection, code="BBB", name="ours again")
            connection.commit()
        with zoo_database.engine().begin() as outside:
            write(outside, code="AAA", name="a stranger's")
    assert names(zoo_engine) == ["a stranger's"]
    assert cleanup.report.total_deleted == 1


def test_a_raw_delete_that_is_rolled_back_has_emptied_nothing(zoo_engine):
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker), zoo_engine.connect() as connection:
        write(connection, code="AAA", name="ours")
        connection.commit()
        connection.exec_driver_sql("DELETE FROM currencies")
        connection.rollback()
        assert len(tracker) == 1
    assert names(zoo_engine) == []


@on("sqlite", fixture="zoo_database")  # elsewhere an error takes the whole transaction, or commits
def test_a_raw_delete_that_fails_has_emptied_nothing(zoo_engine):
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker), zoo_engine.connect() as connection:
        write(connection, code="AAA", name="ours")
        connection.exec_driver_sql(
            "CREATE TEMP TRIGGER no BEFORE DELETE ON currencies "
            "BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
        with pytest.raises(sa.exc.IntegrityError, match="no"):
            connection.exec_driver_sql("DELETE FROM currencies")
        connection.exec_driver_sql("DROP TRIGGER no")
        connection.commit()
        assert len(tracker) == 1
    assert names(zoo_engine) == []


@on("postgresql+psycopg", fixture="zoo_database")  # the only one that has CASCADE here
def test_truncate_cascade_empties_what_references_the_table(zoo_engine):
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker), Session(zoo_engine) as session:
        user = User(email="a@a.test", org=Org(name="ours"))
        session.add_all([user, Currency(code="AAA", name="ours")])
        session.commit()
        assert len(tracker) == 3
        session.connection().exec_driver_sql("TRUNCATE orgs RESTART IDENTITY CASCADE")
        session.commit()
        assert [row.table.name for row in tracker.rows()] == ["currencies"]
