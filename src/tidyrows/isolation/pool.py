"""Finding, building and pruning the schemas and databases that tests have for themselves."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa

from tidyrows.dialects import LockName, PoolerError, database_name, dialect_for
from tidyrows.errors import IsolationError, add_note, text_of
from tidyrows.isolation.lease import Lease, idle
from tidyrows.locks.advisory import AdvisoryLock
from tidyrows.production import refuse_places, refuse_production
from tidyrows.worker import printable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from tidyrows.dialects import HeldLock
    from tidyrows.dialects.spaces import Space
    from tidyrows.isolation.blueprint import Blueprint
    from tidyrows.worker import WorkerContext

BUILD_SECONDS = 600.0
"""How long a worker waits for others that build from the same."""
_MEMBERS = 1000
_TEMPLATE = "t"
_numbers = iter(range(10**9))
_places: WeakKeyDictionary[sa.Engine, list[tuple[str, str]]] = WeakKeyDictionary()
"""Where the connections of an engine lead."""


def refuse_production_of(engine: sa.Engine, allowed: bool | Collection[str]) -> None:
    """Raise ProductionDatabaseError before anything is made; connects once for each engine."""
    dialect = dialect_for(engine)
    refuse_places(dialect.places_by_url(engine), allowed)
    refuse_production(engine.url, allowed)
    refuse_places(_places_of(engine), allowed)


def _places_of(engine: sa.Engine) -> list[tuple[str, str]]:
    if engine not in _places:
        with engine.connect() as connection:
            driver = connection.connection.dbapi_connection
            _places[engine] = dialect_for(engine).places_of(driver, rollback=True) or []
    return _places[engine]


def _prefix(engine: sa.Engine) -> str:
    """What all names begin with that belong to one database.

    Suites of two databases on one server may not see each other's locks.
    """
    found = [name for where, name in _places_of(engine) if where == "database"]
    name = (found or [engine.url.database or ""])[0].rpartition("/")[2]
    return f"tidy_{hashlib.blake2b(name.encode(), digest_size=3).hexdigest()}"


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
        self._dialect = dialect_for(engine)
        self._of_database = _prefix(engine)
        self._prefix = f"{self._of_database}{blueprint.fingerprint()}_"

    @cached_property
    def _managing(self) -> sa.Engine:
        return self._kind.managing(self._engine)

    def private(self) -> Lease:
        """A new one, dropped after the test."""
        worker = "".join(c for c in self._context.worker_id.lower() if c.isascii() and c.isalnum())
        run = hashlib.blake2b(self._context.run_id.encode(), digest_size=4).hexdigest()
        name = f"{self._of_database}_{run}_{worker[:12]}_{os.getpid()}_{next(_numbers)}"
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
        found_at = self._dialect.identity(self._engine)
        key = (found_at, self._dialect.driver, self._level, self._prefix)
        while kept := idle.get(key):
            with suppress(IndexError):  # another thread was faster
                found = kept.pop()
                if self._is_usable(found):
                    found.use_with(self._engine)
                    return found
                found.let_go()
        number = self._context.worker_index
        for step in range(_MEMBERS):
            name = f"{self._prefix}{(number + step) % _MEMBERS}"
            held = self._lock(name)
            if held is None:
                continue
            found = Lease(held, self._space(name, held), key)
            with self._releasing(found):
                found.space.prepare()
                self._make_ready(found.space)
                found.open_engine()
            return found
        raise IsolationError(f"All {_MEMBERS} names that begin with {self._prefix} are in use.")

    def _is_usable(self, found: Lease) -> bool:
        """Whether it is still ours, and as it was left."""
        with suppress(sa.exc.DBAPIError, self._dialect._dbapi.Error):  # noqa: SLF001 -- of its own statements
            return found.space.is_clean() or found.space.restore()
        return False

    def _make_ready(self, space: Space) -> None:
        marks = space.marks()
        learned = _learned(marks.get(space.name))
        if learned is None or not (space.recall(learned) and space.restore()):
            if space.is_copied:
                learned = self._copy(space, marks)
            else:
                with self._building():
                    self._build(space)
                    learned = space.learn()
        _mark(space, learned)

    def _copy(self, space: Space, marks: dict[str, str | None]) -> Any:
        """Copy the template, which the first one builds; what it learned."""
        name = self._prefix + _TEMPLATE
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
        space.create()
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
        except BaseException as error:
            try:
                found.space.drop()
                found.space.release()
            except Exception as failure:  # noqa: BLE001 -- why it could not be built must surface
                add_note(
                    error,
                    f"tidyrows: what was made of the {found.space.kind} {found.space.name} could "
                    f"not be dropped: {text_of(failure, repr)}. prune() drops it later.",
                )
            finally:
                found._held.release()  # noqa: SLF001 -- nobody else has it yet
            if not self._dialect.is_permission_denied(error):
                raise
            raise IsolationError(
                f"The role of the engine may not make the {found.space.kind} {found.space.name}: "
                f"{error}. Give it the right to, or use the level 'worker' or 'transaction'.",
                name=found.space.name,
            ) from error

    @contextmanager
    def _building(self) -> Iterator[None]:
        """Alone among those who build from the same."""
        lock = AdvisoryLock(
            self._managing,
            f"tidyrows {self._prefix}{_TEMPLATE}",
            BUILD_SECONDS,
            self._context,
            shared=False,
            session=True,
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
        label = f"tidyrows run {context.run_id[:8]} {context.worker_id} has {name}"
        return _try_to_hold(self._engine, self._managing, name, label)

    def _space(self, name: str, held: HeldLock) -> Space:
        return self._kind(self._dialect, self._engine, name, held.connection)


def _try_to_hold(engine: sa.Engine, managing: sa.Engine, name: str, label: str) -> HeldLock | None:
    wanted = LockName(f"tidyrows {name}", shared=False, session=True, label=printable(label))
    held = dialect_for(engine).advisory_lock(managing, wanted)
    try:
        return held if held.acquire(0.0) is None else None
    except PoolerError as error:
        raise IsolationError(
            f"{error} For the levels 'schema' and 'database', and for prune(), give an engine that "
            f"connects to the server itself; or use the level 'worker' or 'transaction'.",
            name=name,
        ) from None


def _learned(mark: str | None) -> Any:
    return json.loads(mark or "{}").get("learned")


def _mark(space: Space, learned: Any) -> None:
    space.finish(json.dumps({"used": time.time(), "learned": learned}))


def prune_spaces(engine: sa.Engine, older_than: float) -> list[str]:
    """Drop what nobody has used for so many seconds, nobody holds, and belongs to this database."""
    dropped = []
    for kind in dict.fromkeys(dialect_for(engine).space_kinds.values()):
        dropped += _prune(engine, kind, older_than)
    return dropped


def _prune(engine: sa.Engine, kind: type[Space], older_than: float) -> list[str]:
    managing, prefix, dialect = kind.managing(engine), _prefix(engine), dialect_for(engine)
    held = _try_to_hold(engine, managing, f"{prefix} prune", "tidyrows prunes")
    if held is None:
        return []  # somebody else is at it
    dropped, in_use = [], set()
    try:
        marks = kind(dialect, engine, prefix, held.connection).marks()
        # Templates last: they stay as long as somebody uses a copy.
        mine = [name for name in marks if name.startswith(prefix)]
        for name in sorted(mine, key=lambda name: (name.endswith(f"_{_TEMPLATE}"), name)):
            family, _, member = name.rpartition("_")
            if member == _TEMPLATE and family in in_use:
                continue
            mark = marks[name]
            used = json.loads(mark).get("used", 0) if mark else 0
            lock = _try_to_hold(engine, managing, name, f"tidyrows prunes {name}")
            if lock is None or time.time() - used < older_than:
                in_use.add(family)
            else:
                space = kind(dialect, engine, name, lock.connection)
                space.prepare()
                space.drop()
                dropped.append(name)
            if lock is not None:
                lock.release()
    finally:
        held.release()
    return dropped
