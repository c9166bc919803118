"""A cleanup leaves in the ledger exactly the entries of what it leaves in the database."""

from __future__ import annotations

import json
import threading

import pytest
import sqlalchemy as sa

from harness.blocks import insert, refuse_deletes
from harness.bystanders import Bystanders
from harness.ledgers import (
    Worker,
    cut,
    entries,
    family,
    ids,
    kinds,
    numbered,
    sweep,
)
from harness.targets import on
from tidyrows import CleanupError, CleanupManager, RetryPolicy, TakenOverError
from tidyrows.ledger.entries import keys_of_body

pytestmark = pytest.mark.slow

AT_ONCE = RetryPolicy(base=0.0)
servers = on("postgresql+psycopg", "mysql+pymysql")


def named(engine):
    """The keys that the ledger names, by table; only where nothing in it is gone again."""
    found: dict[str, list[int]] = {}
    for entry in entries(engine):
        assert entry["kind"] == "rows"
        found.setdefault(entry["table_name"], []).extend(keys_of_body(json.loads(entry["body"])))
    return {name: sorted(keys, key=repr) for name, keys in found.items()}


def test_entries_go_with_their_rows(worker, outside):
    parents, children = family(outside)
    worker.writes((parents, numbered([1, 2])), (children, numbered([1], parent_id=1)))
    assert named(outside) == {"parents": [1, 2], "children": [1]}
    assert CleanupManager(worker.tracker).cleanup().total_deleted == 3
    assert not entries(outside)


@pytest.mark.parametrize("limit", [1, 2, 10_000])
def test_rows_deleted_in_several_transactions_leave_no_entry(worker, outside, limit):
    parents, children = family(outside)
    worker.writes((parents, numbered(range(5))), (children, numbered(range(5), parent_id=2)))
    manager = CleanupManager(worker.tracker, rows_per_transaction=limit)
    assert manager.cleanup().total_deleted == 10
    assert not entries(outside)


def test_after_a_protected_row_stays_its_entry_does_and_goes_with_it(worker, outside):
    parents, children = family(outside, nullable=False)
    worker.writes((parents, numbered(range(1, 8))))
    insert(outside, (children, numbered([1, 2], parent_id=4)))
    with pytest.raises(CleanupError) as caught:
        CleanupManager(worker.tracker, protect=[children]).cleanup()
    assert [each.row.key for each in caught.value.leftovers] == [(4,)]
    assert named(outside) == {"parents": [4]}
    insert(outside, (parents, numbered([5], name="stranger")))
    report = CleanupManager(worker.tracker).cleanup()
    assert report.total_deleted == 1
    assert sum(map(len, report.dependents.values())) == 2
    assert ids(outside, parents) == [5]
    assert not entries(outside)


def test_after_a_trigger_keeps_rows_their_entries_stay(worker, outside):
    parents, _children = family(outside)
    refuse_deletes(outside, parents, [2, 5])
    worker.writes((parents, numbered(range(1, 8))))
    with pytest.raises(CleanupError):
        CleanupManager(worker.tracker).cleanup()
    assert named(outside) == {"parents": [2, 5]}
    with outside.begin() as connection:
        on_table = " ON parents" if outside.dialect.name == "postgresql" else ""
        connection.exec_driver_sql(f"DROP TRIGGER guard_parents{on_table}")
    assert CleanupManager(worker.tracker).cleanup().total_deleted == 2
    assert not entries(outside)


def test_what_is_left_over_is_swept_once_the_worker_is_dead(worker, outside):
    parents, children = family(outside, nullable=False)
    worker.writes((parents, numbered(range(1, 4))))
    insert(outside, (children, numbered([1], parent_id=2)))
    with pytest.raises(CleanupError):
        CleanupManager(worker.tracker, protect=[children]).cleanup()
    insert(outside, (parents, numbered([1], name="stranger")))
    worker.dies()
    assert sweep(outside).total_deleted == 1
    assert ids(outside, parents) == [1]


def test_rows_that_somebody_else_deleted_leave_no_entry(worker, outside):
    parents, _children = family(outside)
    worker.writes((parents, numbered([1, 2])))
    with outside.begin() as connection:
        connection.execute(sa.delete(parents).where(parents.c.id == 1))
    report = CleanupManager(worker.tracker).cleanup()
    assert report.total_deleted == 1
    assert not entries(outside)


def test_a_tracker_that_goes_on_after_its_cleanup_is_entered_anew(worker, outside):
    parents, _children = family(outside)
    for number in range(3):
        worker.writes((parents, numbered([number])))
        assert named(outside) == {"parents": [number]}
        assert CleanupManager(worker.tracker).cleanup().total_deleted == 1
        assert not entries(outside)


def test_two_trackers_of_a_process_have_entries_of_their_own(worker, outside, database, ledgers):
    from tidyrows import ResourceTracker  # noqa: PLC0415 -- of this test only

    parents, _children = family(outside)
    other = ResourceTracker(worker.engine, ledger=worker.ledger)
    worker.writes((parents, numbered([1])))
    with CleanupManager(other):
        insert(worker.engine, (parents, numbered([2])))
        assert named(outside) == {"parents": [1, 2]}
    assert named(outside) == {"parents": [1]}
    assert CleanupManager(worker.tracker).cleanup().total_deleted == 1
    assert not entries(outside)


def test_what_is_left_is_entered_anew_though_the_cleanup_could_delete_nothing(worker, outside):
    """The ledger said that a row had come and gone; afterwards it names only what is there."""
    parents, children = family(outside, nullable=False)
    with worker:
        insert(worker.engine, (parents, numbered([1, 2])))
        with worker.engine.begin() as connection:
            connection.execute(sa.delete(parents).where(parents.c.id == 1))
    insert(outside, (children, numbered([1], parent_id=2)))
    assert kinds(outside) == ["gone", "rows"]
    with pytest.raises(CleanupError):
        CleanupManager(worker.tracker, protect=[children]).cleanup()
    assert named(outside) == {"parents": [2]}


# --- the COMMIT of the cleanup


@servers  # SQLite has no line that could be cut
@pytest.mark.parametrize("carried_out", [True, False], ids=["carried out", "not carried out"])
@pytest.mark.parametrize("limit", [2, 10_000])
def test_a_lost_commit_of_the_cleanup_takes_rows_and_entries_or_neither(  # noqa: PLR0917 -- fixtures
    database, ledgers, outside, monkeypatch, carried_out, limit
):
    parents, _children = family(outside)
    bystanders = Bystanders(outside, database.engine())
    bystanders.insert(parents, {"id": 900, "name": "stranger"})
    worker = Worker(database, ledgers)
    worker.writes((parents, numbered(range(6))))
    cut(worker.engine, monkeypatch, carried_out=carried_out, verb="DELETE")
    manager = CleanupManager(
        worker.tracker, retry=RetryPolicy(attempts=1), rows_per_transaction=limit
    )
    try:
        manager.cleanup()
    except CleanupError:
        assert not carried_out or limit == 2
    there = [number for number in ids(outside, parents) if number != 900]
    ledger_says: set[int] = set()
    for entry in entries(outside):
        keys = keys_of_body(json.loads(entry["body"]))
        ledger_says = ledger_says - {*keys} if entry["kind"] == "gone" else ledger_says | {*keys}
    assert sorted(ledger_says) == there
    CleanupManager(worker.tracker, retry=AT_ONCE).cleanup()
    assert ids(outside, parents) == [900]
    assert not entries(outside)


@servers
@pytest.mark.parametrize("carried_out", [True, False], ids=["carried out", "not carried out"])
def test_a_lost_commit_of_the_cleanup_is_made_good_by_its_own_retry(
    database, ledgers, outside, monkeypatch, carried_out
):
    parents, _children = family(outside)
    worker = Worker(database, ledgers)
    worker.writes((parents, numbered(range(6))))
    cut(worker.engine, monkeypatch, carried_out=carried_out)
    report = CleanupManager(worker.tracker, retry=AT_ONCE).cleanup()
    assert report.total_deleted == 6
    assert not ids(outside, parents)
    assert not entries(outside)
    assert CleanupManager(worker.tracker).cleanup().total_deleted == 0


def test_a_commit_of_the_cleanup_that_fails_takes_neither(database, ledgers, outside, monkeypatch):
    parents, _children = family(outside)
    worker = Worker(database, ledgers)
    worker.writes((parents, numbered(range(3))))
    commit = worker.engine.dialect.do_commit

    def refuse(connection):
        monkeypatch.setattr(worker.engine.dialect, "do_commit", commit)
        raise RuntimeError("no")

    monkeypatch.setattr(worker.engine.dialect, "do_commit", refuse)
    try:
        CleanupManager(worker.tracker, retry=AT_ONCE).cleanup()
    except CleanupError:
        assert named(outside) == {"parents": ids(outside, parents)}
    CleanupManager(worker.tracker).cleanup()
    assert not ids(outside, parents)
    assert not entries(outside)


def whole(engine):
    metadata = sa.MetaData()
    notes = sa.Table("notes", metadata, sa.Column("a", sa.Integer), sa.Column("b", sa.String(9)))
    metadata.create_all(engine)
    return notes


@pytest.mark.parametrize("carried_out", [True, False], ids=["carried out", "not carried out"])
def test_a_lost_commit_about_rows_without_a_key_takes_no_strangers_row(
    database, ledgers, outside, monkeypatch, carried_out
):
    notes = whole(outside)
    rows = [{"a": 1, "b": "x"}] * 2
    insert(outside, (notes, rows))
    worker = Worker(database, ledgers)
    worker.writes((notes, rows))
    cut(worker.engine, monkeypatch, carried_out=carried_out)
    with pytest.raises(CleanupError):
        CleanupManager(worker.tracker, retry=AT_ONCE).cleanup()
    worker.dies()
    try:
        sweep(outside)
    except CleanupError as error:
        assert "no primary key" in str(error)  # noqa: PT017 -- it may succeed too
    with outside.connect() as connection:
        left = connection.execute(sa.select(sa.func.count()).select_from(notes)).scalar()
    assert left >= 2


@pytest.mark.parametrize("limit", [1, 10_000])
def test_what_came_after_a_take_over_does_not_make_the_rest_ours(worker, outside, limit):
    parents, children = family(outside)
    worker.writes((parents, numbered([1, 2])))
    with outside.begin() as connection:
        connection.execute(
            sa.text("UPDATE tidyrows_ledger SET owner = 'somebody' WHERE kind = 'rows'")
        )
    for number in range(3):
        worker.writes((children, numbered([number])))
    with pytest.raises(TakenOverError):
        CleanupManager(worker.tracker, rows_per_transaction=limit).cleanup()
    assert ids(outside, parents) == [1, 2]


# --- a lost answer while rows are made


@pytest.mark.parametrize("carried_out", [True, False], ids=["carried out", "not carried out"])
def test_a_lost_answer_about_natural_keys_is_settled_by_the_ledger(
    database, ledgers, outside, monkeypatch, carried_out
):
    parents, _children = family(outside)
    worker = Worker(database, ledgers)
    with CleanupManager(worker.tracker, retry=AT_ONCE) as manager:
        cut(worker.engine, monkeypatch, carried_out=carried_out)
        with pytest.raises(sa.exc.DBAPIError):
            insert(worker.engine, (parents, numbered([1, 2])))
        if not carried_out:
            insert(outside, (parents, numbered([1], name="stranger")))
    assert manager.report.total_deleted == (2 if carried_out else 0)
    assert ids(outside, parents) == ([] if carried_out else [1])
    assert not entries(outside)


@pytest.mark.parametrize("carried_out", [True, False], ids=["carried out", "not carried out"])
def test_a_lost_answer_about_a_delete_is_settled_by_the_ledger(
    database, ledgers, outside, monkeypatch, carried_out
):
    """Where it was carried out the key may be a stranger's by now; where not, the row is ours."""
    parents, _children = family(outside)
    worker = Worker(database, ledgers)
    with CleanupManager(worker.tracker, retry=AT_ONCE, trust_keys=True) as manager:
        insert(worker.engine, (parents, numbered([1, 2])))
        cut(worker.engine, monkeypatch, carried_out=carried_out)
        with pytest.raises(sa.exc.DBAPIError):
            with worker.engine.begin() as connection:
                connection.execute(sa.delete(parents).where(parents.c.id == 1))
        if carried_out:
            insert(outside, (parents, numbered([1], name="stranger")))
    assert manager.report.total_deleted == (1 if carried_out else 2)
    assert ids(outside, parents) == ([1] if carried_out else [])
    assert not entries(outside)


@pytest.mark.parametrize("carried_out", [True, False], ids=["carried out", "not carried out"])
def test_a_lost_answer_about_a_changed_key_is_settled_by_the_ledger(
    database, ledgers, outside, monkeypatch, carried_out
):
    parents, _children = family(outside)
    worker = Worker(database, ledgers)
    with CleanupManager(worker.tracker, retry=AT_ONCE, trust_keys=True) as manager:
        insert(worker.engine, (parents, numbered([1, 2])))
        cut(worker.engine, monkeypatch, carried_out=carried_out)
        with pytest.raises(sa.exc.DBAPIError):
            with worker.engine.begin() as connection:
                connection.execute(sa.update(parents).where(parents.c.id == 1).values(id=7))
    assert manager.report.total_deleted == 2
    assert not ids(outside, parents)
    assert not entries(outside)


# --- others commit meanwhile

# SQLite has one writer: nobody can write while a cleanup does


@servers
def test_a_commit_that_began_before_the_cleanup_and_ends_in_it_keeps_its_entry(
    database, ledgers, outside
):
    """Its entry is older than the newest that the cleanup knows."""
    parents, _children = family(outside)
    worker = Worker(database, ledgers)
    entered, go = threading.Event(), threading.Event()
    late: list[threading.Thread] = []

    def pause(_connection):
        if threading.current_thread() in late:
            entered.set()
            assert go.wait(20)

    sa.event.listen(worker.engine, "commit", pause)  # after the entry, before the COMMIT
    worker.tracker.start()
    thread = threading.Thread(target=insert, args=(worker.engine, (parents, numbered([1]))))
    late.append(thread)
    thread.start()
    assert entered.wait(20)
    insert(worker.engine, (parents, numbered([2])))
    worker.tracker.stop()

    done = []

    @sa.event.listens_for(worker.engine, "before_cursor_execute")
    def release(_connection, _cursor, statement, *_):
        if "DELETE FROM" in statement and "tidyrows_ledger" in statement and not done:
            done.append(statement)
            go.set()
            thread.join(20)

    manager = CleanupManager(worker.tracker)
    manager.cleanup()
    assert done
    assert ids(outside, parents) == [1]
    assert named(outside) == {"parents": [1]}
    assert manager.cleanup().total_deleted == 1
    assert not ids(outside, parents)
    assert not entries(outside)


@servers
def test_a_commit_in_the_moment_of_the_cleanups_own_is_not_forgotten(database, ledgers, outside):
    parents, _children = family(outside)
    worker = Worker(database, ledgers)
    worker.writes((parents, numbered([1])))
    other = threading.Thread(target=insert, args=(worker.engine, (parents, numbered([2]))))
    seen = []
    worker.tracker.start()  # it listens while somebody cleans up
    cleaner = threading.get_ident()

    @sa.event.listens_for(worker.engine, "commit")
    def meanwhile(_connection):
        if threading.get_ident() == cleaner and deleted and not seen:
            seen.append(True)
            other.start()
            other.join(20)
            len(worker.tracker)  # which believes what has been announced

    deleted: list[str] = []

    @sa.event.listens_for(worker.engine, "before_cursor_execute")
    def look(_connection, _cursor, statement, *_):
        if "DELETE FROM" in statement and "tidyrows_ledger" in statement:
            deleted.append(statement)

    manager = CleanupManager(worker.tracker)
    manager.cleanup()
    worker.tracker.stop()
    assert seen
    assert ids(outside, parents) == [2]
    assert named(outside) == {"parents": [2]}
    assert manager.cleanup().total_deleted == 1
    assert not ids(outside, parents)
    assert not entries(outside)


# --- rows that were told


def test_told_rows_are_entered_and_go(worker, outside):
    parents, _children = family(outside)
    insert(outside, (parents, numbered(range(1, 6))))
    with worker:
        worker.tracker.track_rows(parents, [1, 2])
        worker.tracker.track_query(sa.select(parents).where(parents.c.id == 3))
        assert sorted(named(outside)["parents"]) == [1, 2, 3]
    assert CleanupManager(worker.tracker).cleanup().total_deleted == 3
    assert not entries(outside)


def test_rows_told_in_an_open_transaction_are_entered_once(worker, outside):
    """On SQLite nobody else can write meanwhile, so they go in with the next COMMIT."""
    parents, _children = family(outside)
    insert(outside, (parents, numbered([1])))
    with worker:
        with worker.engine.begin() as connection:
            connection.execute(sa.insert(parents), numbered([5]))
            worker.tracker.track_rows(parents, [1])
        assert sorted(named(outside)["parents"]) == [1, 5]
        for number in (6, 7):
            insert(worker.engine, (parents, numbered([number])))
        assert sorted(named(outside)["parents"]) == [1, 5, 6, 7]
    assert CleanupManager(worker.tracker).cleanup().total_deleted == 4
    assert not entries(outside)


def test_a_told_row_that_was_deleted_meanwhile_is_not_entered_again(worker, outside):
    parents, _children = family(outside)
    insert(outside, (parents, numbered([1])))
    with worker:
        with worker.engine.begin() as connection:
            connection.execute(sa.insert(parents), numbered([5]))
            worker.tracker.track_rows(parents, [1])
        with worker.engine.begin() as connection:
            connection.execute(sa.delete(parents).where(parents.c.id == 1))
        insert(worker.engine, (parents, numbered([6])))
    worker.dies()
    insert(outside, (parents, numbered([1], name="stranger")))
    sweep(outside, trust_keys=True)
    assert ids(outside, parents) == [1]


def test_a_told_row_whose_first_entry_was_rolled_back_is_no_loss(worker, outside):
    """A savepoint's release may write it; the transaction around it is then rolled back."""
    parents, _children = family(outside)
    insert(outside, (parents, numbered([1])))
    with worker:
        with worker.engine.connect() as connection:
            with connection.begin() as outer:
                connection.execute(sa.insert(parents), numbered([5]))
                worker.tracker.track_rows(parents, [1])
                with connection.begin_nested():
                    connection.execute(sa.insert(parents), numbered([6]))
                outer.rollback()
    assert named(outside) == {"parents": [1]}
    assert CleanupManager(worker.tracker).cleanup().total_deleted == 1
    assert not entries(outside)


def test_rows_told_before_the_tracker_starts_are_entered_too(worker, outside):
    parents, _children = family(outside)
    insert(outside, (parents, numbered([1])))
    worker.tracker.track_rows(parents, [1])
    worker.writes((parents, numbered([2])))
    assert sorted(named(outside)["parents"]) == [1, 2]


def test_a_key_changed_through_the_tracker_is_followed_in_the_ledger(worker, outside):
    parents, _children = family(outside)
    with worker:
        insert(worker.engine, (parents, numbered([1, 2])))
        with worker.engine.begin() as connection:
            connection.execute(sa.update(parents).where(parents.c.id == 1).values(id=9))
    assert kinds(outside) == ["renamed", "rows"]
    insert(outside, (parents, numbered([1], name="stranger")))
    worker.dies()
    assert sweep(outside, trust_keys=True).total_deleted == 2
    assert ids(outside, parents) == [1]
