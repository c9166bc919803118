"""Why rows stay: an object with its exception, made into text where it is printed; and logged."""

from __future__ import annotations

import logging

import pytest
import sqlalchemy as sa
import tenacity

from harness.blocks import insert, reference, refuse_deletes, table, tracked
from tidyrows import CleanupError, CleanupManager, Dependents, LeftoverKind, RetryPolicy
from tidyrows.cleanup.reasons import _TEXTS, Reason

SECRET = "hunter2"


@pytest.fixture
def family(engine):
    metadata = sa.MetaData()
    parents = table(metadata, "parents", sa.Column("word", sa.String(20)))
    children = table(metadata, "children", reference("parent_id", "parents.id"))
    metadata.create_all(engine)
    yield engine, parents, children
    metadata.drop_all(engine)


def leftovers_of(manager):
    with pytest.raises(CleanupError) as caught:
        manager.cleanup()
    return caught.value.leftovers


def test_every_kind_of_leftover_has_its_text():
    assert set(_TEXTS) == set(LeftoverKind)
    assert all(str(Reason(kind)) for kind in LeftoverKind if kind is not LeftoverKind.REFUSED)


def test_a_leftover_carries_the_exception_and_its_kind(family):
    engine, parents, _children = family
    tracker = tracked(engine, (parents, [{"id": 1, "word": "a"}]))
    refuse_deletes(engine, parents, [1])
    manager = CleanupManager(tracker, retry=RetryPolicy(attempts=2, base=0.0))
    with pytest.raises(CleanupError) as caught:
        manager.cleanup()
    (left,) = caught.value.leftovers
    assert left.kind is LeftoverKind.REFUSED
    assert isinstance(left.error, sa.exc.DBAPIError)
    assert left.error.__cause__ is not None, "the driver's own error is chained"
    assert caught.value.__cause__ is left.error
    assert left.cause in str(caught.value)


def test_a_leftover_names_the_row_that_needs_it(family):
    engine, parents, children = family
    tracker = tracked(engine, (parents, [{"id": 1, "word": "a"}]))
    insert(engine, (children, [{"id": 7, "parent_id": 1}]))
    (left,) = leftovers_of(CleanupManager(tracker, dependents=Dependents.ERROR))
    assert left.kind is LeftoverKind.UNTRACKED
    assert left.reason.item.key == (7,)
    assert left.reason.columns == ("parent_id",)
    assert left.error is None
    (left,) = leftovers_of(CleanupManager(tracker, protect=[children]))
    assert left.kind is LeftoverKind.PROTECTED


def test_the_log_has_each_decision_and_no_value(family, caplog):
    engine, parents, children = family
    tracker = tracked(engine, (parents, [{"id": 1, "word": SECRET}, {"id": 2, "word": "b"}]))
    insert(engine, (children, [{"id": 70123, "parent_id": 1}]))
    outside = sa.create_engine(engine.url)
    with outside.begin() as connection:
        connection.execute(sa.delete(parents).where(parents.c.id == 2))
    outside.dispose()
    with caplog.at_level(logging.DEBUG, logger="tidyrows"):
        CleanupManager(tracker).cleanup()
    said = [record.getMessage() for record in caplog.records if record.name == "tidyrows"]
    assert any("children: 1 untracked row(s) go" in line for line in said)
    assert any("parents: 1 tracked row(s) deleted" in line for line in said)
    assert any("parents: 1 tracked row(s) already gone" in line for line in said)
    assert not any(SECRET in line or "70123" in line for line in said)


def test_the_log_has_what_stays(family, caplog):
    engine, parents, children = family
    tracker = tracked(engine, (parents, [{"id": 1, "word": "a"}]))
    insert(engine, (children, [{"id": 7, "parent_id": 1}]))
    with caplog.at_level(logging.DEBUG, logger="tidyrows"):
        leftovers_of(CleanupManager(tracker, protect=[children]))
    assert any("1 tracked row(s) stay: PROTECTED" in r.getMessage() for r in caplog.records)


def test_the_log_has_each_retry_at_info(family, caplog):
    engine, parents, _children = family
    tracker = tracked(engine, (parents, [{"id": 1, "word": "a"}]))
    lost = tenacity.retry_if_exception_type(sa.exc.OperationalError)
    policy = RetryPolicy(base=0.0, retry=lost)
    failures = [1, 1]

    def lose(_connection, _cursor, statement, *_more):
        if "DELETE FROM" in statement and failures:
            failures.pop()
            raise sa.exc.OperationalError(statement, {"word": SECRET}, Exception(SECRET))

    sa.event.listen(engine, "before_cursor_execute", lose)
    try:
        with caplog.at_level(logging.INFO, logger="tidyrows"):
            report = CleanupManager(tracker, retry=policy).cleanup()
    finally:
        sa.event.remove(engine, "before_cursor_execute", lose)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert len(said) == report.retries == 2
    assert all("failed with" in line and SECRET not in line for line in said)
