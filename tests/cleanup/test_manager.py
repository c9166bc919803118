"""What the block promises: the body's failure first, every database, every row accounted for."""

from __future__ import annotations

import uuid
import warnings

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from harness.blocks import insert, left_over, reference, table, tracked
from harness.bystanders import Bystanders, snapshot
from harness.models import Currency, Document, Org, Ticket, User
from harness.targets import WITHOUT_FOREIGN_KEYS, on
from tidyrows import (
    CleanupError,
    CleanupManager,
    Dependents,
    LateCommitWarning,
    ResourceTracker,
    RetryPolicy,
    SessionStateError,
    UntrackedRowsWarning,
)
from tidyrows.capture.changes import Inserted

everywhere = on("sqlite", WITHOUT_FOREIGN_KEYS, "postgresql+psycopg", "mysql+pymysql")
enforced = on("sqlite", "postgresql+psycopg", "mysql+pymysql")


def family(engine):
    metadata = sa.MetaData()
    parent = table(metadata, "parents")
    child = table(metadata, "children", reference("parent_id", "parents.id"))
    metadata.create_all(engine)
    insert(engine, (parent, [{"id": 1}]), (child, [{"id": 1, "parent_id": 1}]))
    return parent, child


# --- the body's failure


@pytest.mark.parametrize("kind", [AssertionError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("cleanup_fails", [False, True])
def test_a_failure_in_the_body_surfaces_as_it_is(sqlite_engine, kind, cleanup_fails):
    parent, child = family(sqlite_engine)
    outside = sa.create_engine(sqlite_engine.url)
    failure = kind("the test's own")
    tracker = ResourceTracker(sqlite_engine)

    def body():
        with CleanupManager(tracker, dependents=Dependents.ERROR):
            insert(sqlite_engine, (parent, [{"id": 2}]))
            if cleanup_fails:
                insert(outside, (child, [{"id": 2, "parent_id": 2}]))
            raise failure

    with pytest.raises(kind) as caught:
        body()
    outside.dispose()
    assert caught.value is failure
    assert failure.__cause__ is None
    assert failure.__context__ is None
    notes = getattr(failure, "__notes__", [])
    if cleanup_fails:
        (note,) = notes
        assert "main.parents(2)" in note
        assert "main.children(2) is not tracked" in note
    else:
        assert not notes
    assert len(tracker) == cleanup_fails


def test_a_failure_in_the_body_surfaces_even_if_stopping_the_tracker_raises(sqlite_engine):
    """A warning that became an error, say."""
    parent, _child = family(sqlite_engine)
    tracker = ResourceTracker(sqlite_engine)
    failure = AssertionError("the test's own")
    resolve = tracker.engines.resolve

    def grumble():
        resolve()
        warnings.warn("something about rows", UntrackedRowsWarning, stacklevel=1)

    def body():
        with CleanupManager(tracker):
            insert(sqlite_engine, (parent, [{"id": 2}]))
            tracker.engines.resolve = grumble
            raise failure

    with pytest.raises(AssertionError) as caught:
        body()
    assert caught.value is failure
    assert "something about rows" in failure.__notes__[0]


@enforced
def test_without_a_failure_in_the_body_the_cleanups_own_is_raised(database, engine):
    parent, child = family(engine)
    tracker = ResourceTracker(engine)
    manager = CleanupManager(tracker, dependents=Dependents.ERROR)

    def body():
        with manager:
            insert(engine, (parent, [{"id": 2}, {"id": 3}]))
            insert(database.engine(), (child, [{"id": 2, "parent_id": 2}]))

    with pytest.raises(CleanupError) as caught:
        body()
    (leftover,) = caught.value.leftovers
    assert caught.value.report is manager.report
    assert leftover.table.name == "parents"
    assert leftover.row.key == (2,)
    assert "children" in leftover.cause
    assert str(leftover).startswith(f"{leftover.table}(2): ")
    assert [row.key for row in tracker.rows()] == [(2,)]
    assert manager.report.total_deleted == 1
    assert "1 left over" in str(manager.report)


# --- untracked rows that reference ours


@enforced
@pytest.mark.parametrize(
    "says",
    [{}, {"ondelete": "RESTRICT"}, {"deferrable": True, "initially": "DEFERRED"}],
    ids=["nothing", "restrict", "deferred"],
)
@pytest.mark.parametrize("nullable", [True, False])
def test_a_child_that_may_not_be_touched_keeps_its_parent_only(database, says, nullable):
    if database.backend == "mysql" and "deferrable" in says:
        pytest.skip("the MySQL family defers no foreign key")
    engine = database.engine()
    metadata = sa.MetaData()
    top = table(metadata, "tops")
    parent = table(metadata, "parents", reference("top_id", "tops.id"))
    child = table(
        metadata,
        "children",
        reference("parent_id", "parents.id", nullable=nullable, **says),
    )
    metadata.create_all(engine)
    tracker = tracked(
        engine,
        (top, [{"id": n} for n in range(1, 5)]),
        (parent, [{"id": n, "top_id": n} for n in range(1, 5)]),
        (child, [{"id": n, "parent_id": n} for n in range(1, 5)]),
    )
    insert(database.engine(), (child, [{"id": 77, "parent_id": 3}]))
    left = left_over(CleanupManager(tracker, dependents=Dependents.ERROR))
    assert set(left) == {("parents", 3), ("tops", 3)}
    assert "children(77) is not tracked" in left["parents", 3]
    now = {name.partition(".")[2]: rows for name, rows in snapshot(engine).items()}
    assert now == {"tops": [(3,)], "parents": [(3, 3)], "children": [(77, 3)]}


@on("sqlite", "postgresql+psycopg", "mysql+pymysql")
@pytest.mark.parametrize("ondelete", ["CASCADE", "SET NULL"])
def test_an_untracked_child_goes_or_is_detached_as_the_schema_says(database, ondelete):
    engine = database.engine()
    metadata = sa.MetaData()
    parent = table(metadata, "parents")
    child = table(
        metadata, "children", reference("parent_id", "parents.id", ondelete=ondelete, nullable=True)
    )
    metadata.create_all(engine)
    insert(engine, (parent, [{"id": 1}]), (child, [{"id": 1, "parent_id": 1}]))
    tracker = tracked(engine, (parent, [{"id": 2}]))
    insert(database.engine(), (child, [{"id": 2, "parent_id": 2}]))
    assert CleanupManager(tracker).cleanup().total_deleted == 1
    now = {name.partition(".")[2]: rows for name, rows in snapshot(engine).items()}
    assert now["parents"] == [(1,)]
    assert now["children"] == [(1, 1), *([(2, None)] if ondelete == "SET NULL" else [])]


@everywhere
def test_a_key_that_names_several_rows_deletes_none_of_them(database):
    """The model calls a column the primary key that the database does not hold unique.

    One of ours is gone, so that there are as many rows as keys.
    """
    engine = database.engine()
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE legacy (id INTEGER NOT NULL, note INTEGER)")
        connection.exec_driver_sql("INSERT INTO legacy VALUES (3, 77)")  # a stranger's
    bystanders = Bystanders(engine)
    legacy = table(sa.MetaData(), "legacy", sa.Column("note", sa.Integer))
    tracker = tracked(engine, (legacy, [{"id": n} for n in (1, 2, 3, 4)]))
    with database.engine().begin() as connection:
        connection.execute(sa.delete(legacy).where(legacy.c.id == 1))
    left = left_over(CleanupManager(tracker))
    assert set(left) == {("legacy", 3)}
    assert "not unique in the database" in left["legacy", 3]
    assert len(tracker) == 1
    with engine.begin() as connection:
        connection.execute(sa.delete(legacy).where(legacy.c.note.is_(None)))
    bystanders.assert_untouched()


@on("postgresql+psycopg")
def test_a_row_of_an_inheriting_table_is_somebody_elses(engine):
    """PostgreSQL: a DELETE from a table reaches the tables that inherit from it."""
    metadata = sa.MetaData()
    parent = table(metadata, "parents")
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE heirs (note integer) INHERITS (parents)")
        connection.exec_driver_sql("INSERT INTO heirs VALUES (3, 77)")
    bystanders = Bystanders(engine)
    tracker = tracked(engine, (parent, [{"id": n} for n in (1, 2, 3, 4)]))
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM parents WHERE id = 1")
    assert set(left_over(CleanupManager(tracker))) == {("parents", 3)}
    assert snapshot(engine)["public.heirs"] == bystanders.expected["public.heirs"]


@everywhere
def test_a_key_that_its_own_type_refuses_is_a_leftover_of_its_own(zoo_or_empty, database):
    engine = zoo_or_empty
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    tracker.start()
    with Session(engine) as session:
        session.add_all([Org(name="ours"), Ticket(title="ours"), Ticket(title="ours too")])
        session.commit()
    tracker.stop()
    (table,) = (
        held.table for held in tracker.store.snapshot() if held.table.name.name == "tickets"
    )
    tracker.store.apply(Inserted(table, [17]))  # the database's value, where Python's is pub_17
    left = left_over(CleanupManager(tracker))
    assert set(left) == {("tickets", 17)}
    assert "AttributeError" in left["tickets", 17]
    bystanders.assert_untouched()


@pytest.fixture
def zoo_or_empty(database):
    engine = database.engine()
    for model in (Org, Ticket):
        model.__table__.create(engine)
    return engine


# --- twice, nested, several databases


@everywhere
def test_a_second_cleanup_deletes_only_what_came_since(engine):
    parent, child = family(engine)
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        insert(engine, (parent, [{"id": 2}]))
        assert cleanup.cleanup().total_deleted == 1
        insert(engine, (parent, [{"id": 2}]), (child, [{"id": 2, "parent_id": 2}]))
    assert cleanup.report.total_deleted == 2
    again = cleanup.cleanup()
    assert str(again).startswith("nothing to delete")
    assert again is cleanup.report
    bystanders.assert_untouched()


@everywhere
def test_nested_blocks_clean_their_own_rows(engine):
    parent, child = family(engine)
    bystanders = Bystanders(engine)
    with CleanupManager(ResourceTracker(engine)) as outer:
        insert(engine, (parent, [{"id": 2}]))
        with CleanupManager(ResourceTracker(engine)) as inner:
            insert(engine, (child, [{"id": 2, "parent_id": 2}]))
        assert inner.report.total_deleted == 1
        assert len(snapshot(engine)) == 2
        insert(engine, (child, [{"id": 3, "parent_id": 2}]))
    assert outer.report.total_deleted == 2
    bystanders.assert_untouched()


def two_databases(tmp_path):
    engines = []
    for name in ("first", "second"):
        engine = sa.create_engine(f"sqlite:///{tmp_path}/{name}.db")

        @sa.event.listens_for(engine, "connect")
        def prepare(dbapi_connection, record):
            dbapi_connection.execute("PRAGMA foreign_keys = ON")

        engines.append(engine)
    return engines


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("how", ["unreachable", "in use", "bug"])
def test_trouble_in_one_database_does_not_keep_the_other_from_being_cleaned(
    tmp_path, monkeypatch, broken, how
):
    engines = two_databases(tmp_path)
    metadata = sa.MetaData()
    tables = [table(metadata, name) for name in ("one", "two")]
    for engine, each in zip(engines, tables, strict=True):
        each.create(engine)
        insert(engine, (each, [{"id": 1}]))
    session = Session(binds=dict(zip(tables, engines, strict=True)))
    tracker = ResourceTracker(session)
    manager = CleanupManager(tracker, retry=RetryPolicy(attempts=1), lock_timeout=0.05)
    tracker.start()
    for each in tables:
        session.execute(sa.insert(each).values(id=2))
    session.commit()
    tracker.stop()
    trouble = {
        "unreachable": sa.exc.OperationalError("connect", {}, OSError("no route to host")),
        "in use": SessionStateError("somebody's transaction"),
        "bug": TypeError("a bug of ours"),
    }[how]

    def refuse(*_arguments, **_options):
        raise trouble

    with monkeypatch.context() as patched:
        for method in ("begin_cleanup", "begin_reading"):
            dialect = manager_dialect(tracker, engines[broken])
            patched.setattr(dialect, method, refuse, raising=True)
        if how == "in use":
            with pytest.raises(SessionStateError):
                manager.cleanup()
        else:
            left = left_over(manager)
            assert manager.report.leftovers
            assert set(left) == {(("one", "two")[broken], 2)}
            assert str(trouble).splitlines()[0][-12:] in str(left)
    assert manager.report.total_deleted == 1
    assert len(tracker) == 1
    assert manager.cleanup().total_deleted == 1
    session.close()
    for engine in engines:
        assert all(rows == [(1,)] for rows in snapshot(engine).values())
        engine.dispose()


def manager_dialect(tracker, engine):
    return tracker.engines.capture(engine).dialect


@enforced
def test_a_session_whose_transaction_began_before_the_block_is_left_alone(engine):
    parent, _child = family(engine)
    with Session(engine) as session:
        session.execute(sa.select(parent)).all()
        tracker = ResourceTracker(session)
        with pytest.raises(SessionStateError, match="began before the block"):
            with CleanupManager(tracker) as cleanup:
                session.execute(sa.insert(parent).values(id=2))
        assert session.in_transaction()
        with pytest.warns(LateCommitWarning):
            session.commit()
        assert cleanup.cleanup().total_deleted == 1


def test_a_session_that_spans_two_databases_is_planned_and_cleaned_in_both(tmp_path):
    """Two tables of one name: neither text nor diagram may take them for one."""
    engines = two_databases(tmp_path)
    pairs = [family(engine) for engine in engines]
    bystanders = [Bystanders(engine) for engine in engines]
    with Session(
        binds={each: e for e, pair in zip(engines, pairs, strict=True) for each in pair}
    ) as session:
        tracker = ResourceTracker(session)
        with CleanupManager(tracker) as cleanup:
            for parent, child in pairs:
                session.execute(sa.insert(parent).values(id=2))
                session.execute(sa.insert(child).values(id=2, parent_id=2))
            session.commit()
            plan = cleanup.plan()
            assert plan.total_rows == 4
            lines = str(plan).splitlines()
            assert [
                name in line
                for line, name in zip(lines, ("first", "first", "second", "second"), strict=True)
            ]
            assert "first.db main.children" in lines[0]
            assert "second.db main.children" in lines[2]
            diagram = plan.to_mermaid().splitlines()
            assert diagram[-2:] == [
                '    t0 -->|"parent_id"| t1',
                '    t2 -->|"parent_id"| t3',
            ]
        assert cleanup.report.total_deleted == 4
    for each in bystanders:
        each.assert_untouched()
    for engine in engines:
        engine.dispose()


# --- rows in doubt


def in_doubt(engine, model, key, *, generated, like=None):
    """A tracker that lost the answer to a COMMIT, whatever became of it."""
    tracker = ResourceTracker(engine)
    tracker.track_rows(model, [like or key])
    (held,) = tracker.store.snapshot()
    tracker.store.forget(held.table, [like or key])
    tracker.store.mark_uncertain(Inserted(held.table, [key], generated=generated))
    return tracker


@pytest.mark.parametrize("there", [True, False])
def test_a_generated_key_in_doubt_is_ours_where_no_key_is_given_twice(zoo_engine, there):
    with Session(zoo_engine) as session:
        org = Org(name="ours, perhaps")
        session.add(org)
        session.commit()
        key = org.id
        if not there:
            session.delete(org)
            session.commit()
    tracker = in_doubt(zoo_engine, Org, key, generated=True)
    before = Bystanders(zoo_engine)
    if there and zoo_engine.dialect.name == "sqlite":  # it gives keys twice
        left = left_over(CleanupManager(tracker))
        assert "answer to its COMMIT was lost" in left["orgs", key]
        before.assert_untouched()
        tracker.track_rows(Org, [key])  # as the message advises
        assert CleanupManager(tracker).cleanup().total_deleted == 1
    else:
        report = CleanupManager(tracker).cleanup()
        assert report.total_deleted == there
    assert not any(rows for rows in snapshot(zoo_engine).values())
    assert str(CleanupManager(tracker).cleanup()).startswith("nothing to delete")


def test_a_natural_key_in_doubt_is_never_deleted(zoo_engine):
    tracker = in_doubt(zoo_engine, Currency, "USD", generated=False)
    with Session(zoo_engine) as session:
        session.add(Currency(code="USD", name="a stranger's, perhaps"))
        session.commit()
    bystanders = Bystanders(zoo_engine)
    manager = CleanupManager(tracker)
    for _ in range(2):
        assert set(left_over(manager)) == {("currencies", "USD")}
        bystanders.assert_untouched()
    with Session(zoo_engine) as session:
        session.delete(session.get_one(Currency, "USD"))
        session.commit()
    assert str(manager.cleanup()).startswith("nothing to delete")


def test_a_natural_key_in_doubt_that_was_inserted_again_is_ours(zoo_engine):
    """The COMMIT failed, the test tried again and succeeded: nothing is in doubt any more."""
    tracker = in_doubt(zoo_engine, Currency, "USD", generated=False)
    bystanders = Bystanders(zoo_engine)
    with CleanupManager(tracker) as cleanup:
        with Session(zoo_engine) as session:
            session.add(Currency(code="USD", name="ours"))
            session.commit()
    assert cleanup.report.total_deleted == 1
    bystanders.assert_untouched()


def test_a_random_uuid_in_doubt_is_ours(zoo_engine):
    key = uuid.uuid4()
    with Session(zoo_engine) as session:
        session.add(Document(id=key, title="ours"))
        session.commit()
    tracker = in_doubt(zoo_engine, Document, key, generated=False)
    assert CleanupManager(tracker).cleanup().total_deleted == 1


@everywhere
@pytest.mark.parametrize("why", ["its table is gone", "its own type refuses it"])
def test_a_doubt_that_cannot_be_settled_keeps_nothing_else_from_being_cleaned(database, why):
    engine = database.engine()
    for model in (Org, Ticket):
        model.__table__.create(engine)
    tracker = in_doubt(engine, Ticket, 17, generated=False, like="pub_17")
    with CleanupManager(tracker) as cleanup, Session(engine) as session:
        session.add(Org(name="ours"))
        session.commit()
        session.close()
        if why == "its table is gone":
            Ticket.__table__.drop(database.engine())
        else:
            assert set(left_over(cleanup)) == {("tickets", 17)}
            assert cleanup.report.total_deleted == 1
            tracker.store.forget(tracker.store.snapshot()[0].table, [17])
    assert len(tracker) == 0
    assert not any(snapshot(engine).values())


# --- the report


def test_the_report_says_what_was_done(zoo_engine):
    bystanders = Bystanders(zoo_engine)
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker) as cleanup:
        assert cleanup.last_report is None
        with pytest.raises(SessionStateError, match="no report yet"):
            print(cleanup.report)
        with Session(zoo_engine) as session:
            org = Org(name="ours")
            session.add_all([org, User(email="a@example.test", org=org)])
            session.add(User(email="b@example.test", org=org))
            session.commit()
    report = cleanup.report
    assert {name.name: count for name, count in report.deleted.items()} == {"orgs": 1, "users": 2}
    assert list(report.deleted) == sorted(report.deleted, key=lambda name: name.name == "orgs")
    assert report.total_deleted == 3
    assert report.leftovers == ()
    assert not report.already_gone
    assert not report.reappeared
    assert report.retries == 0
    assert report.seconds > 0
    schema = next(iter(report.deleted)).schema
    assert (
        str(report) == f"{schema}.users 2 deleted, {schema}.orgs 1 deleted ({report.seconds:.3f} s)"
    )
    bystanders.assert_untouched()


def test_an_error_with_many_leftovers_stays_readable(sqlite_engine):
    parent, child = family(sqlite_engine)
    numbers = range(2, 52)
    tracker = tracked(sqlite_engine, (parent, [{"id": n} for n in numbers]))
    outside = sa.create_engine(sqlite_engine.url)
    insert(outside, (child, [{"id": n, "parent_id": n} for n in numbers]))
    outside.dispose()
    with pytest.raises(CleanupError) as caught:
        CleanupManager(tracker, dependents=Dependents.ERROR).cleanup()
    assert len(caught.value.leftovers) == 50
    lines = str(caught.value).splitlines()
    assert lines[0] == "50 tracked row(s) are still there; they stay tracked:"
    assert lines[-2] == "  ... and 30 more in error.leftovers"
    assert lines[-1] == "Remove the cause, then call cleanup() again."


def test_rows_of_a_table_without_a_primary_key_are_a_clear_leftover_where_they_are_unknown(engine):
    """return_defaults() keeps RETURNING out, and the value is known to the database alone."""
    metadata = sa.MetaData()
    log = sa.Table("log", metadata, sa.Column("line", sa.String(20)))
    parent = table(metadata, "parents")
    metadata.create_all(engine)
    tracker = tracked(engine, (parent, [{"id": 1}]))
    computed = sa.insert(log).values(line=sa.func.lower("A")).return_defaults()
    manager = CleanupManager(tracker)
    with pytest.raises(CleanupError, match="no primary key") as caught, manager:
        with engine.begin() as connection:
            connection.execute(computed)
            connection.execute(computed)
    (leftover,) = caught.value.leftovers
    assert (leftover.table.name, leftover.row, leftover.count) == ("log", None, 2)
    assert manager.report.total_deleted == 1


def test_a_lock_timeout_of_nothing_is_refused(sqlite_engine):
    with pytest.raises(ValueError, match=r"lock_timeout=5\.0"):
        CleanupManager(ResourceTracker(sqlite_engine), lock_timeout=0)
