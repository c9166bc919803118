"""A space that this process holds: built or found, emptied after each test, kept for the next."""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.dialects import LockName, database_name, dialect_for
from tidyrows.errors import IsolationError
from tidyrows.locks.advisory import AdvisoryLock
from tidyrows.worker import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidyrows.dialects import Dialect, HeldLock
    from tidyrows.dialects.spaces import Space
    from tidyrows.isolation.blueprint import Blueprint
    from tidyrows.worker import WorkerContext

BUILD_SECONDS = 600.0
"""How long a worker waits for others that build from the same."""
_MEMBERS = 1000
_idle: dict[tuple[object, ...], list[Lease]] = {}
_inherited: list[Lease] = []
_numbers = iter(range(10**9))


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

    def open_engine(self) -> sa.Engine:
        """Make the engine, of whose connections is known which are in use."""
        engine = self.engine = self.space.engine()
        sa.event.listen(engine, "checkout", self._checkout)
        sa.event.listen(engine, "checkin", self._checkin)
        return engine

    def _checkout(self, _driver: Any, record: Any, connection: Any) -> None:
        self._in_use[record] = connection

    def _checkin(self, _driver: Any, record: Any) -> None:
        self._in_use.pop(record, None)

    def end_transactions(self) -> None:
        """Close the connections that the test has not given back: what they wrote is undone."""
        for connection in list(self._in_use.values()):
            connection.invalidate()
        self._in_use.clear()
        if self.engine.dialect.is_async:  # they belong to the loop of this test
            self.engine.dispose()

    def empty(self) -> None:
        """Leave the rows it was built with; keep it for the next test, or drop it."""
        self.end_transactions()
        if self._key is None:
            self.drop()
            return
        kept = False
        try:
            with self._explaining():
                kept = self.space.reset()
        finally:
            if kept:
                _idle.setdefault(self._key, []).append(self)
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


def lease(engine: sa.Engine, level: str, blueprint: Blueprint, context: WorkerContext) -> Lease:
    """A space of this blueprint that nobody else has, with the rows it was built with.

    Raises:
        IsolationError: the role may not make one, or it cannot be built.
        LockTimeoutError: others have been building for too long.
    """
    dialect = dialect_for(engine)
    kind = dialect.space_kinds.get(level)
    if kind is None:
        raise IsolationError(
            f"tidyrows knows no level {level!r} for the database {database_name(engine)}. Use the "
            f"level 'worker', or write a dialect that has it: docs/dialects.md."
        )
    finder = _Finder(engine, level, blueprint, context, kind)
    return finder.private() if not blueprint.pooled else finder.pooled()


class _Finder:
    def __init__(
        self,
        engine: sa.Engine,
        level: str,
        blueprint: Blueprint,
        context: WorkerContext,
        kind: type[Space],
    ) -> None:
        self._engine = engine
        self._level = level
        self._blueprint = blueprint
        self._context = context
        self._kind = kind
        self._dialect: Dialect = dialect_for(engine)
        self._managing = kind.managing(engine)
        # Suites of two databases may not see each other's locks.
        self._fingerprint = blueprint.fingerprint(engine.url.database or "")

    def private(self) -> Lease:
        """A new one, dropped after the test."""
        worker = "".join(c for c in self._context.worker_id.lower() if c.isascii() and c.isalnum())
        run = f"{self._context.run_id.encode().hex()[:16]}"
        name = f"tidy_{run}_{worker[:12]}_{os.getpid()}_{next(_numbers)}"
        held = self._lock(name)
        if held is None:
            raise IsolationError(f"The name {name} is in use.", name=name)
        found = Lease(held, self._space(name, held), None)
        with self._releasing(found):
            found.space.prepare()
            self._build(found.space)
            found.space.finish("")
            found.open_engine()
        return found

    def pooled(self) -> Lease:
        """One that this process has, or one of the pool, or a new one."""
        key = (self._dialect.identity(self._engine), self._level, self._fingerprint)
        while kept := _idle.get(key):
            with suppress(IndexError):  # another thread was faster
                found = kept.pop()
                if self._is_usable(found):
                    return found
                found.let_go()
        prefix = f"tidy_{self._fingerprint}_"
        number = self._context.worker_index
        for step in range(_MEMBERS):
            name = f"{prefix}{(number + step) % _MEMBERS}"
            held = self._lock(name)
            if held is None:
                continue
            found = Lease(held, self._space(name, held), key)
            with self._releasing(found):
                found.space.prepare()
                self._make_ready(found.space)
                found.open_engine()
            return found
        raise IsolationError(f"All {_MEMBERS} names that begin with {prefix} are in use.")

    def _is_usable(self, found: Lease) -> bool:
        """Whether it is still ours, and as it was left."""
        with suppress(sa.exc.DBAPIError, self._dialect._dbapi.Error):  # noqa: SLF001 -- of its own statements
            return found.space.is_clean() or found.space.reset()
        return False

    def _make_ready(self, space: Space) -> None:
        marks = space.marks()
        learned = _learned(marks.get(space.name))
        if learned is None or not (space.recall(learned) and space.reset()):
            if space.is_copied:
                learned = self._copy(space, marks)
            else:
                with self._building():
                    self._build(space)
                    learned = space.learn()
        _mark(space, learned)

    def _copy(self, space: Space, marks: dict[str, str | None]) -> Any:
        """Copy the template, which the first one builds; what it learned."""
        name = f"tidy_{self._fingerprint}_t"
        if marks.get(name) is None:
            with self._building():
                marks = space.marks()
                if marks.get(name) is None:  # while this one waited, nobody has built it
                    template = self._kind(self._dialect, self._engine, name, space.connection)
                    self._build(template)
                    _mark(template, template.learn())
                    marks = space.marks()
        space.copy(name)
        learned = _learned(marks[name])
        space.recall(learned)
        return learned

    def _build(self, space: Space) -> None:
        try:
            space.create()
        except Exception as error:
            if not self._dialect.is_permission_denied(error):
                raise
            raise IsolationError(
                f"The role of the engine may not create the {space.kind} {space.name}. Give it "
                f"the right to, or use the level 'worker': {error}",
                name=space.name,
            ) from error
        blueprint = self._blueprint
        if blueprint.statements:
            space.replay(blueprint.statements)
        engine = space.engine()
        try:
            if blueprint.migrate is not None:
                blueprint.migrate(engine)
            if blueprint.seed_statements:
                space.replay(blueprint.seed_statements)
            if blueprint.seed is not None:
                with engine.begin() as connection:
                    blueprint.seed(connection)
        finally:
            engine.dispose()
        out = space.foreign_keys_out()
        if out:
            raise IsolationError(
                f"The {space.kind} of a test must stand alone, and foreign keys lead out of it: "
                f"{'; '.join(out)}. Make their tables in it too.",
                name=space.name,
            )

    @contextmanager
    def _releasing(self, found: Lease) -> Iterator[None]:
        """Drop what could not be built."""
        try:
            yield
        except BaseException:
            with suppress(Exception):  # it has no mark, so it is dropped by whoever finds it
                found.space.drop()
            found._held.release()  # noqa: SLF001 -- a class of this module
            raise

    @contextmanager
    def _building(self) -> Iterator[None]:
        """Alone among those who build from the same."""
        name = f"tidyrows build {self._fingerprint}"
        lock = AdvisoryLock(
            self._managing, name, BUILD_SECONDS, self._context, shared=False, session=True
        )
        lock._acquire()  # noqa: SLF001 -- also in a greenlet
        try:
            yield
        except BaseException as error:
            lock._release(error)  # noqa: SLF001 -- as above
            raise
        lock._release(None)  # noqa: SLF001 -- as above

    def _lock(self, name: str) -> HeldLock | None:
        context = self._context
        label = printable(f"tidyrows run {context.run_id[:8]} {context.worker_id} has {name}")
        wanted = LockName(f"tidyrows {name}", shared=False, session=True, label=label)
        held = self._dialect.advisory_lock(self._managing, wanted)
        return held if held.acquire(0.0) is None else None

    def _space(self, name: str, held: HeldLock) -> Space:
        return self._kind(self._dialect, self._engine, name, held.connection)


def _learned(mark: str | None) -> Any:
    return json.loads(mark or "{}").get("learned")


def _mark(space: Space, learned: Any) -> None:
    space.finish(json.dumps({"used": time.time(), "learned": learned}))


def _forget() -> None:
    """In a forked child: they are the parent's."""
    for kept in _idle.values():
        _inherited.extend(kept)
    _idle.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
