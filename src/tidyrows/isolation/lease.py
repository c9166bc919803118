"""A space that this process holds: built or found, emptied after each test, kept for the next."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.errors import IsolationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidyrows.dialects import HeldLock
    from tidyrows.dialects.spaces import Space

_DEFINES = re.compile(
    r"(?:\s|--[^\n]*\n|/\*.*?\*/)*(?:ALTER|CREATE|DROP|RENAME)\b", re.IGNORECASE | re.DOTALL
)
idle: dict[tuple[object, ...], list[Lease]] = {}
"""What this process holds and no test uses now, by what it was built from."""
_inherited: list[Lease] = []


class Lease:
    """A space, held by an advisory lock for as long as this process needs it.

    Attributes:
        engine: leads to it; the test uses it.
        space: what the database knows of it.
    """

    engine: sa.Engine

    def __init__(self, held: HeldLock, space: Space, key: tuple[object, ...] | None) -> None:
        self.space = space
        self._held = held
        self._key = key
        self._in_use: dict[Any, Any] = {}
        self._has_defined = False

    def open_engine(self) -> sa.Engine:
        """Make the engine, of whose connections is known which are in use."""
        engine = self.engine = self.space.engine()
        sa.event.listen(engine, "checkout", self._checkout)
        sa.event.listen(engine, "checkin", self._checkin)
        sa.event.listen(engine, "before_cursor_execute", self._before_statement)
        return engine

    def use_with(self, suite_engine: sa.Engine) -> None:
        """Have the options and listeners of this engine, which leads to the same database."""
        if suite_engine is not self.space.suite_engine:
            self.engine.dispose()
            self.space.suite_engine = suite_engine
            self.open_engine()

    def _checkout(self, _driver: Any, record: Any, connection: Any) -> None:
        self._in_use[record] = connection

    def _checkin(self, _driver: Any, record: Any) -> None:
        self._in_use.pop(record, None)

    def _before_statement(self, _c: Any, _cursor: Any, statement: str, *_more: object) -> None:
        if not self._has_defined and _DEFINES.match(statement):
            self._has_defined = True

    def end_transactions(self) -> None:
        """Close the connections that the test has not given back: what they wrote is undone."""
        for connection in list(self._in_use.values()):
            connection.invalidate()
        self._in_use.clear()
        if self.engine.dialect.is_async:  # they belong to the loop of this test
            self.engine.dispose()

    def empty(self) -> None:
        """Leave the rows it was built with; keep it for the next test, or drop it."""
        if self._key is None:
            self.drop()
            return
        kept = False
        try:
            with self._explaining():
                kept = self.space.reset(defined=self._has_defined)
            self._has_defined = False
        finally:
            if kept:
                idle.setdefault(self._key, []).append(self)
            else:
                self.let_go()

    def drop(self) -> None:
        """Drop it, and let go of it."""
        self.engine.dispose()
        try:
            with self._explaining():
                self.space.drop()
        finally:
            self._held.release()

    def let_go(self) -> None:
        """Let others have it."""
        self.engine.dispose()
        self.space.release()
        self._held.release()

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Name who holds locks in it, where a wait for one has ended."""
        try:
            yield
        except sa.exc.DBAPIError as error:
            raise self._blocked(error) from error
        except self.space.dialect._dbapi.Error as error:  # noqa: SLF001 -- of its own statements
            raise self._blocked(error) from error

    def _blocked(self, error: Exception) -> Exception:
        space = self.space
        if not space.dialect.is_timeout(error):
            return error
        users = space.users()
        by = f" It is used by {'; by '.join(map(str, users))}." if users else ""
        return IsolationError(
            f"The {space.kind} {space.name} could not be emptied, since its rows or tables are "
            f"locked.{by} End what the test has started: it must be over when the test is.",
            name=space.name,
            blockers=tuple(users),
        )


def _forget() -> None:
    """In a forked child: they are the parent's."""
    for kept in idle.values():
        _inherited.extend(kept)
    idle.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
