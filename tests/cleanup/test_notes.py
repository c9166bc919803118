"""The test's own error surfaces, also where it takes no note; what else failed is printed then."""

from __future__ import annotations

import asyncio
import sys
import unittest
from dataclasses import dataclass

import factory
import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import create_async_engine

from harness.blocks import insert
from harness.ledgers import family, numbered
from tidyrows import (
    CleanupManager,
    Dependents,
    ResourceTracker,
    TrackedFactory,
    external_handler,
    with_retries,
)
from tidyrows.cleanup.reasons import in_short
from tidyrows.errors import add_note
from tidyrows.testing.unittest_case import AsyncTidyTestCase, TidyTestCase


@dataclass(frozen=True)
class FrozenError(Exception):
    code: int = 7


class TupleError(Exception):
    __notes__ = ("of its class",)


class SlotsError(Exception):
    __slots__ = ("code",)

    def __setattr__(self, name, value):
        raise AttributeError(name)


class RaisesError(Exception):
    def add_note(self, _note):
        raise LookupError


class DeafError(Exception):
    def add_note(self, _note):
        pass


class NoMethodError(Exception):
    add_note = None


@dataclass(frozen=True)
class FrozenExitError(BaseException):
    code: int = 7


@dataclass(frozen=True)
class FrozenErrors(ExceptionGroup):
    def __new__(cls):
        return super().__new__(cls, "several", [ValueError("one")])


class Base(orm.DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "things"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)


REFUSING = [
    FrozenError,
    TupleError,
    SlotsError,
    RaisesError,
    DeafError,
    NoMethodError,
    FrozenExitError,
    FrozenErrors,
]
TAKING = [ValueError, KeyboardInterrupt, lambda: ExceptionGroup("several", [ValueError("one")])]


def said(error, capsys):
    """What is attached to an error or printed."""
    return "\n".join([*getattr(error, "__notes__", ()), capsys.readouterr().err])


@pytest.mark.parametrize("make", [*REFUSING, *TAKING])
def test_the_very_error_surfaces_and_the_cleanups_failure_is_said(database, outside, make, capsys):
    parents, children = family(outside, nullable=False)
    engine, error = database.engine(), make()
    tracker = ResourceTracker(engine)
    manager = CleanupManager(tracker, dependents=Dependents.ERROR)
    with pytest.raises(type(error)) as caught:
        with manager:
            insert(engine, (parents, numbered([1])))
            insert(outside, (children, numbered([5], parent_id=1)))
            raise error
    assert caught.value is error
    text = said(error, capsys)
    assert "the cleanup after this failed too" in text
    assert "parents(1)" in text
    assert len(tracker) == 1
    CleanupManager(tracker).cleanup()


@pytest.mark.parametrize("make", REFUSING)
def test_which_rows_are_kept_is_said(database, outside, make, capsys):
    parents, _children = family(outside)
    engine, error = database.engine(), make()
    tracker = ResourceTracker(engine)
    with pytest.raises(type(error)) as caught:
        with CleanupManager(tracker, keep_on_failure=True):
            insert(engine, (parents, numbered([1])))
            raise error
    assert caught.value is error
    assert "parents(1)" in said(error, capsys)
    CleanupManager(tracker).cleanup()


@pytest.mark.parametrize("make", REFUSING)
def test_the_error_of_a_hook_surfaces_where_the_rollback_fails(
    sqlite_engine, make, capsys, monkeypatch
):
    Base.metadata.create_all(sqlite_engine)
    error = make()

    class ThingFactory(TrackedFactory):
        class Meta:
            model = Thing

        @factory.post_generation
        def fail(self, create, extracted, **kwargs):
            raise error

    def fail():
        message = "connection lost"
        raise OSError(message)

    tracker = ResourceTracker(sqlite_engine)
    with CleanupManager(tracker):
        with monkeypatch.context() as patch:
            patch.setattr(tracker.session, "rollback", fail)
            with pytest.raises(type(error)) as caught:
                ThingFactory.scoped_to(tracker).create()
        assert caught.value is error
        assert "connection lost" in said(error, capsys)
        tracker.session.rollback()


@pytest.mark.parametrize("make", REFUSING)
def test_the_functions_own_error_surfaces_where_the_rollback_fails(sqlite_engine, make, capsys):
    error = make()

    def fail(_session):
        message = "connection lost"
        raise OSError(message)

    def change(session):
        session.execute(sa.text("SELECT 1"))
        raise error

    with orm.Session(sqlite_engine) as session:
        sa.event.listen(session, "after_rollback", fail)
        with pytest.raises(type(error)) as caught:
            with_retries(session, change)
        sa.event.remove(session, "after_rollback", fail)
    assert caught.value is error
    assert "connection lost" in said(error, capsys)


@pytest.mark.parametrize("make", REFUSING)
def test_an_error_passes_a_tasks_turn_unchanged(sqlite_engine, make):
    """A generator of contextlib's would assign to the error, and so replace a frozen one."""
    error = make()

    def fail(_tracker):
        raise error

    async def run():
        engine = create_async_engine(f"sqlite+aiosqlite:///{sqlite_engine.url.database}")
        tracker = ResourceTracker(engine)
        try:
            async with CleanupManager(tracker):
                await tracker.run_sync(fail)
        finally:
            await engine.dispose()

    with pytest.raises(type(error)) as caught:
        asyncio.run(run())
    assert caught.value is error


@pytest.mark.parametrize("kind", [TidyTestCase, AsyncTidyTestCase])
@pytest.mark.parametrize("make", [each for each in REFUSING if issubclass(each, Exception)])
def test_unittest_reports_the_very_error(sqlite_engine, kind, make):
    class Case(kind):
        tidy_engine = sqlite_engine

        def test(self):
            raise make

    result = unittest.TestResult()
    Case("test").run(result)
    ((_test, text),) = result.errors
    assert f"{make.__qualname__}" in text
    assert "FrozenInstanceError" not in text


def test_a_closed_stderr_hides_nothing_either(monkeypatch):
    class Closed:
        def write(self, _text):
            message = "I/O operation on closed file"
            raise ValueError(message)

    for stream in (Closed(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        add_note(FrozenError(), "a note")


def test_a_failure_without_a_readable_text_hides_nothing(database, outside, capsys):
    """The handler's error has a ``__str__`` that fails, and notes that are none."""

    class UnreadableError(Exception):
        __notes__ = 5

        def __str__(self):
            raise LookupError

        __repr__ = __str__

    parents, _children = family(outside)
    engine = database.engine()
    tracker = ResourceTracker(engine)
    removed = []

    @external_handler("unreadable-account", replace=True)
    def remove(payload):
        removed.append(payload)
        if len(removed) == 1:
            raise UnreadableError

    with pytest.raises(FrozenError):
        with CleanupManager(tracker, on_progress=lambda _progress: fail_with(UnreadableError())):
            insert(engine, (parents, numbered([1])))
            tracker.track_external("unreadable-account", {"id": 3})
            raise FrozenError
    assert "UnreadableError" in capsys.readouterr().err
    CleanupManager(tracker).cleanup()


def fail_with(error):
    raise error


def test_the_errors_of_a_group_are_each_said():
    group = ExceptionGroup("several", [ValueError("one"), ExceptionGroup("x", [OSError("two")])])
    text = in_short(group)
    assert "ValueError: one" in text
    assert "OSError: two" in text
