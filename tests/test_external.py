"""External resources: what is taken, what is refused, and what becomes of a handle."""

from __future__ import annotations

import json
import multiprocessing
import uuid

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from harness.blocks import insert, table
from harness.models import Org, User
from tidyrows import (
    ExternalResourceError,
    ResourceTracker,
    RowKey,
    SessionStateError,
    TidyRowsError,
    UnknownTableError,
    UntrackableRowError,
    external_handler,
)
from tidyrows.external import handler_of


@pytest.fixture
def kind():
    """A kind that no other test has a handler for."""
    return f"kind-{uuid.uuid4().hex}"


# --- the payload


@pytest.mark.parametrize(
    "payload", [None, True, 7, 1.5, "x", [1, [2]], {"a": {"b": [None]}}, {}, "ü\0\u2028"]
)
def test_json_values_are_taken_as_they_are(sqlite_engine, payload):
    resource = ResourceTracker(sqlite_engine).track_external("file", payload)
    assert resource.payload == payload
    assert json.loads(json.dumps(resource.payload)) == payload


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (object(), "payload is of type object"),
        (uuid.uuid4(), "payload is of type UUID"),
        (b"x", "payload is of type bytes"),
        ({"ids": [1, {2}]}, "payload['ids'][1] is of type set"),
        ({1: "x"}, "payload is a dict with keys that are no strings"),
        ([float("nan")], "payload[0] is not finite"),
    ],
)
def test_a_payload_without_a_json_form_is_refused_at_once(sqlite_engine, payload, said):
    tracker = ResourceTracker(sqlite_engine)
    with pytest.raises(ExternalResourceError) as caught:
        tracker.track_external("file", payload)
    assert said in str(caught.value)
    assert caught.value.kind == "file"
    assert tracker.externals() == []


def test_a_payload_that_the_caller_changes_afterwards_stays_as_it_was(sqlite_engine):
    payload = {"path": ["/tmp/a"]}
    resource = ResourceTracker(sqlite_engine).track_external("file", payload)
    payload["path"].append("/tmp/b")
    assert resource.payload == {"path": ["/tmp/a"]}


def test_no_text_shows_the_payload(sqlite_engine):
    resource = ResourceTracker(sqlite_engine).track_external("token", {"secret": "hunter2"})
    assert "hunter2" not in f"{resource!r} {resource} {[resource]}"
    assert repr(resource) == "<ExternalResource token #1>"


def test_a_handle_does_not_change(sqlite_engine):
    resource = ResourceTracker(sqlite_engine).track_external("file", 1)
    with pytest.raises(AttributeError):
        resource.payload = 2


@pytest.mark.parametrize("bad", ["", "  ", None, 7])
def test_a_kind_is_a_name(sqlite_engine, bad):
    with pytest.raises(ExternalResourceError, match="no kind of external resource"):
        ResourceTracker(sqlite_engine).track_external(bad, 1)
    with pytest.raises(ExternalResourceError, match="no kind of external resource"):
        external_handler(bad)


# --- handlers


def test_a_kind_has_one_handler(kind):
    @external_handler(kind)
    def first(payload): ...

    with pytest.raises(ExternalResourceError, match=r"first already.*replace=True"):

        @external_handler(kind)
        def second(payload): ...

    assert handler_of(kind).remove is first


def test_the_same_function_may_be_registered_again(kind):
    """A module that is imported twice is no mistake of the test's."""

    def remove(payload): ...

    assert external_handler(kind)(remove) is remove
    external_handler(kind, retry_on=[OSError])(remove)
    assert handler_of(kind).retry_on == (OSError,)


def test_a_handler_is_replaced_where_that_is_asked_for(kind):
    external_handler(kind)(print)

    @external_handler(kind, replace=True)
    def second(payload): ...

    assert handler_of(kind).remove is second


def test_a_handler_can_be_called(kind):
    with pytest.raises(ExternalResourceError, match="cannot be called"):
        external_handler(kind)("remove")
    assert handler_of(kind) is None


# --- after and before


def test_items_are_objects_rows_tables_and_handles(zoo_engine):
    tracker = ResourceTracker(zoo_engine)
    with Session(zoo_engine) as session:
        org = Org(name="x")
        session.add(org)
        session.commit()
        first = tracker.track_external("a", 1, after=[org, org, Org, Org.__table__])
        (row,) = (item for item in tracker.ties()[0].after if isinstance(item, RowKey))
        second = tracker.track_external("b", 2, after=(first, row), before=iter([User]))
        assert row.key == (org.id,)
    assert tracker.externals() == [first, second]
    assert tracker.ties()[0].after == (row, row.table)
    assert tracker.ties()[1].after == (first, row)
    assert [name.name for name in tracker.ties()[1].before] == [User.__table__.name]
    assert len(tracker) == 0
    assert list(tracker.rows()) == []


@pytest.mark.parametrize("argument", ["after", "before"])
def test_one_thing_that_is_no_list_is_refused(zoo_engine, argument):
    tracker = ResourceTracker(zoo_engine)
    handle = tracker.track_external("a", 1)
    for given in (Org, Org.__table__, handle, "orgs", Org(name="x")):
        with pytest.raises(ExternalResourceError, match=rf"{argument}= takes a list"):
            tracker.track_external("b", 2, **{argument: given})
    assert tracker.externals() == [handle]


def test_items_that_are_nothing_are_refused(zoo_engine):
    tracker = ResourceTracker(zoo_engine)
    with pytest.raises(UntrackableRowError, match="no row yet"):
        tracker.track_external("a", 1, after=[Org(name="x")])
    with pytest.raises(UntrackableRowError, match="no mapped object"):
        tracker.track_external("a", 1, after=["orgs"])
    elsewhere = sa.Table("nowhere", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    with pytest.raises(UnknownTableError, match="nowhere"):
        tracker.track_external("a", 1, before=[elsewhere])
    assert tracker.externals() == []


def test_a_handle_of_another_tracker_is_refused(sqlite_engine):
    theirs = ResourceTracker(sqlite_engine).track_external("a", 1)
    with pytest.raises(ExternalResourceError, match="another tracker's"):
        ResourceTracker(sqlite_engine).track_external("b", 1, after=[theirs])


def test_a_key_that_a_session_changes_is_followed(engine):
    metadata = sa.MetaData()
    things = table(metadata, "things")
    metadata.create_all(engine)
    tracker = ResourceTracker(engine)
    tracker.start()
    try:
        insert(engine, (things, [{"id": 1}]))
        (row,) = tracker.rows()
        tracker.track_external("a", 1, after=[row], before=[things])
        with engine.begin() as connection:
            connection.execute(sa.update(things).where(things.c.id == 1).values(id=2))
    finally:
        tracker.stop()
    (now,) = tracker.rows()
    assert now.key == (2,)
    assert tracker.ties()[0].after == (now,)


# --- another process


def test_resources_travel_as_json(zoo_engine):
    tracker = ResourceTracker(zoo_engine)
    tracker.start()
    try:
        with Session(zoo_engine) as session:
            org = Org(name="x")
            session.add(org)
            session.commit()
            tracker.track_external("gone", 0)
            tracker.forget_external(tracker.externals()[0])
            bucket = tracker.track_external("bucket", {"name": "b"}, after=[org])
            nobodys = RowKey(next(tracker.rows()).table, (-1,))
            tracker.track_external("file", ["f", 1.5], after=[Org, nobodys], before=[bucket])
    finally:
        tracker.stop()
    other = ResourceTracker.from_json(tracker.to_json(), zoo_engine)
    assert [(each.kind, each.payload, each.number) for each in other.externals()] == [
        ("bucket", {"name": "b"}, 2),
        ("file", ["f", 1.5], 3),
    ]
    bucket, file = other.ties()
    (row,) = other.rows()
    assert bucket.after == (row,)
    assert file.after == (row.table,)
    assert file.before == (bucket.resource,)
    assert other.track_external("more", 1).number == 4


def test_json_without_resources_is_read_as_before(sqlite_engine):
    data = json.loads(ResourceTracker(sqlite_engine).to_json())
    del data["externals"]
    assert ResourceTracker.from_json(json.dumps(data), sqlite_engine).externals() == []


def test_json_with_half_a_resource_is_refused(sqlite_engine):
    tracker = ResourceTracker(sqlite_engine)
    tracker.track_external("file", 1)
    data = json.loads(tracker.to_json())
    del data["externals"][0]["payload"]
    with pytest.raises(TidyRowsError, match="not what ResourceTracker"):
        ResourceTracker.from_json(json.dumps(data), sqlite_engine)


def _in_the_child(tracker, answers):
    answers.put(tracker.externals())
    try:
        tracker.track_external("file", 2)
    except SessionStateError as error:
        answers.put(str(error))
    tracker.start()
    answers.put([each.payload for each in tracker.externals()])
    tracker.track_external("file", 3)
    tracker.stop()
    answers.put([each.payload for each in tracker.externals()])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_owns_none(sqlite_engine):
    tracker = ResourceTracker(sqlite_engine)
    tracker.track_external("file", 1)
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()
    child = fork.Process(target=_in_the_child, args=(tracker, answers))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert answers.get() == []
    assert "before the process forked" in answers.get()
    assert answers.get() == []
    assert answers.get() == [3]
    assert [each.payload for each in tracker.externals()] == [1]
