"""What the audit observes in this process, together with its looks at the database."""

from __future__ import annotations

import gc
import uuid
import weakref

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from harness.audits import Audited, Base, Note, Org, unobserved
from harness.targets import on
from tidyrows import CleanupManager, ResourceTracker
from tidyrows.audit import tables
from tidyrows.audit.observer import AuditObserver


@pytest.fixture
def audited():
    made = Audited()
    yield made
    made.observer.close()
    made.watches.close()


@pytest.fixture
def made(engine):
    """An engine on a database with the tables, which the audit has not met."""
    Base.metadata.create_all(engine)
    return engine


def test_keys_are_the_same_whether_they_were_loaded_or_seen(made, audited):
    """A UUID is bytes, text or a value of its own, as the driver has it."""
    with Session(made) as session:
        session.add_all([Note(), Org(name="a")])
        session.commit()
    audited.test("leaves")
    with Session(made) as session:
        session.scalars(sa.select(Note)).one()
        session.scalars(sa.select(Org)).one()
    audited.test("loads")
    with Session(made) as session:
        session.execute(sa.select(Note.id)).all()
        session.execute(sa.select(Org.id)).all()
    audited.test("reads columns")
    assert audited.found == {
        ("leaves", "leaves", "notes", 1),
        ("leaves", "leaves", "orgs", 1),
        ("loads", "reads", "notes", 1),
        ("loads", "reads", "orgs", 1),
        ("reads columns", "reads", "notes", 1),
        ("reads columns", "reads", "orgs", 1),
    }


ORGS = Org.__table__
COUNT = sa.select(sa.func.count())
READS = {
    "count": COUNT.select_from(Org),
    "count some": COUNT.select_from(Org).where(Org.name == "left"),
    "highest": sa.select(sa.func.max(Org.id)),
    "exists": sa.select(sa.exists().where(Org.name == "left")),
    "exists at all": sa.select(sa.select(Org.id).exists()),
    "column": sa.select(Org.name).where(Org.name.like("le%")),
    "groups": sa.select(Org.name, sa.func.count()).group_by(Org.name),
    "first": sa.select(Org.name).order_by(Org.id).limit(1),
    "joins": sa.select(Note.text).join(Org, Org.name == Note.text).where(Org.name == "left"),
    "derived": COUNT.select_from(sa.select(Org.id).subquery()),
    "raw": sa.text("SELECT count(*) FROM orgs WHERE name = :name").bindparams(name="left"),
}
"""SELECTs that read the row that is left, most of them without its key."""
OTHER = {
    "count others": COUNT.select_from(Org).where(Org.name != "left"),
    "exists not": sa.select(sa.exists().where(Org.name == "right")),
    "column of none": sa.select(Org.name).where(Org.id > 1000),
    "another table": COUNT.select_from(Note),
    "none": sa.select(Org.name).where(sa.false()),
}


def test_a_select_reads_rows_of_others_whether_it_returns_their_keys_or_not(made, audited):
    with Session(made) as session:
        session.add_all([Org(name="left"), Note(text="left")])
        session.commit()
    audited.test("leaves orgs")
    for name, select in (READS | OTHER).items():
        with made.connect() as connection:
            connection.execute(select).all()
        audited.test(name)
    reads = {(test, table) for test, fault, table, _n in audited.found if fault == "reads"}
    assert reads == {(name, "orgs") for name in READS} | {
        ("joins", "notes"),
        ("another table", "notes"),
    }
    assert audited.watches.notes == {}


def test_a_count_of_own_rows_or_after_the_others_are_deleted_reads_nothing_of_theirs(made, audited):
    """A shared fixture, too, may count what there is."""
    with Session(made) as session:
        session.add(Org(name="left"))
        session.commit()
    audited.test("leaves")
    with made.connect() as connection:
        connection.execute(sa.delete(ORGS))
        connection.execute(READS["count"]).all()
        connection.rollback()
    audited.test("deletes first, and rolls back")
    with made.begin() as connection:
        connection.execute(READS["count"]).all()
    audited.test("fixture", is_test=False)
    with Session(made) as session:
        session.add(org := Org(name="mine"))
        session.commit()
        session.scalars(sa.select(Org.name).where(Org.name == "mine")).all()
        session.scalar(COUNT.select_from(Org).where(Org.id == org.id))
        session.delete(org)
        session.commit()
    audited.test("reads its own")
    assert audited.found == {("leaves", "leaves", "orgs", 1)}


def test_of_a_large_table_what_was_committed_by_key_is_believed(made, audited, monkeypatch):
    monkeypatch.setattr(tables, "SMALL", 3)
    with made.begin() as connection:
        connection.execute(sa.insert(Org), [{"id": n, "name": "old"} for n in range(1, 11)])
    audited.test("fixture", is_test=False)
    table = Org.__table__
    with made.begin() as connection:
        connection.execute(sa.update(table).where(table.c.id == 1).values(name="changed"))
        with connection.begin_nested() as inner:
            connection.execute(sa.delete(table).where(table.c.id == 2))
            inner.rollback()
    audited.test("commits")
    with made.connect() as connection:
        connection.execute(sa.delete(table).where(table.c.id == 3))
        connection.rollback()
    audited.test("rolls back")
    with Session(made) as session:
        session.delete(session.get(Org, 4))
        session.commit()
    audited.test("deletes")
    assert audited.found == {
        ("fixture", "shared", "orgs", 9),
        ("commits", "changes", "orgs", 1),
        ("deletes", "deletes", "orgs", 1),
    }


def test_rows_of_other_processes_count_as_those_of_the_test_that_ran(made, audited):
    with made.connect() as connection:
        connection.execute(sa.select(Org.__table__)).all()
    audited.test("before", is_test=False)
    with unobserved(made).begin() as connection:
        connection.execute(sa.insert(Org).values(name="by the application"))
    audited.test("calls it")
    assert audited.found == {("calls it", "leaves", "orgs", 1)}


@on("sqlite")
def test_a_database_in_memory_that_tests_share_is_tables(database, audited):
    shared = sa.create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(shared)
    audited.test("fixture", is_test=False)
    with Session(shared) as session:
        session.add(Org(name="left"))
        session.commit()
        session.add(Org(name="rolled back"))
        session.flush()
        audited.test("leaves, and has a transaction open")
        count = sa.select(sa.func.count()).select_from(Org)
        assert session.scalar(count) == 2, "the look has rolled it back"
        session.rollback()
    audited.test("next")
    assert {each[1:] for each in audited.found} == {("leaves", "orgs", 1)}
    with shared.connect() as connection:
        assert connection.scalar(count) == 1
    assert "a transaction was open" in next(iter(audited.watches.notes))
    shared.dispose()


@on("sqlite")
def test_a_database_that_one_test_has_made_for_itself_is_not_kept_alive(
    audited, database, tmp_path
):
    engines = []
    for url in ("sqlite://", f"sqlite:///{tmp_path}/own.db"):
        own = sa.create_engine(url)
        engines.append(weakref.ref(own))
        Base.metadata.create_all(own)
        with Session(own) as session:
            session.add(Org())
            session.commit()
        own.dispose()
    del own, session
    audited.test("makes its own")
    assert audited.found == set()
    assert audited.watches.notes == {}
    gc.collect()
    assert engines[0]() is None


def test_a_closed_observer_observes_nothing(made):
    observer = AuditObserver()
    observer.open(lambda _connection: "here", lambda: None)
    observer.close()
    with Session(made) as session:
        session.add(Org())
        session.commit()
        session.scalars(sa.select(Org)).all()
    assert observer.pop_observed().databases == {}
    assert observer.pop_observed().loaded == set()


def test_a_row_that_is_rolled_back_is_not_read_under_the_key_of_another_test(made, audited):
    """The key of a row that another test left may be free within the transaction."""
    with Session(made) as session:
        session.add(Org(id=1, name="left"))
        session.commit()
    audited.test("leaves")
    with Session(made) as session:
        session.execute(sa.delete(Org))
        session.add(org := Org(id=1, name="rolled back"))
        session.flush()
        session.refresh(org)
        session.rollback()
    audited.test("rolls back")
    assert audited.found == {("leaves", "leaves", "orgs", 1)}


def test_what_a_test_does_to_rows_that_its_tracker_deletes_is_no_fault(made, audited, monkeypatch):
    """Also in a table that is too large to be looked at."""
    monkeypatch.setattr(tables, "SMALL", 3)
    with made.begin() as connection:
        connection.execute(sa.insert(Note), [{"id": uuid.uuid4(), "text": ""} for _n in range(9)])
    audited.test("fixture", is_test=False)
    with CleanupManager(ResourceTracker(made)), Session(made) as session:
        session.add(note := Note())
        session.commit()
        note.text = "changed"
        session.commit()
    audited.test("has a tracker")
    assert {test for test, *_rest in audited.found} == {"fixture"}
