"""Once per run: one worker makes something, and the others get its result."""

from __future__ import annotations

from contextlib import contextmanager
from hashlib import blake2b
from inspect import isawaitable, iscoroutinefunction
from typing import TYPE_CHECKING, Any, TypeVar, overload

import sqlalchemy as sa

from tidyrows.arguments import checked, function, name, number
from tidyrows.errors import ArgumentError, NotBoundError, SessionStateError
from tidyrows.greenlets import is_async, spawn, wait_for
from tidyrows.ledger.entry_table import LEDGER
from tidyrows.ledger.table import Ledger
from tidyrows.locks.advisory import advisory_lock, engine_of
from tidyrows.locks.once import DAYS, Asked, FilePlace, OncePlace, made_once, run_folder
from tidyrows.worker import CONTEXT, WorkerContext

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

T = TypeVar("T")
KIND = "once"
"""The kind of an entry that carries a result; it is nobody's, so that no sweep takes it for rows"""
_NAME, _MAKE = name("seed-currencies"), function("seed_currencies")
_TIMEOUT = number("60.0", least=0.0)


class EntryPlace(OncePlace):
    """An entry of a ledger, under an advisory lock of its database."""

    def __init__(self, ledger: Ledger, asked: Asked) -> None:
        if ledger.is_private:
            raise NotBoundError(
                f"{asked}: the database is in memory, and no other worker sees it. Leave bind= "
                f"out where the result is not in that database."
            )
        self._ledger = ledger
        self._asked = asked
        both = f"{asked.context.run_id}\0{asked.name}"
        self._id = blake2b(both.encode(), digest_size=8).hexdigest()
        ledger.install()

    def read(self) -> str | None:
        """The body of the entry."""
        with self._ledger.looking() as connection:
            table = self._ledger.table_on(connection)
            mine = sa.select(table.c.body).where(table.c.maker == self._id, table.c.kind == KIND)
            found: str | None = self._ledger.execute(connection, mine).scalar()
            return found

    def write(self, text: str) -> None:
        """With a new entry; old ones are deleted."""
        ledger = self._ledger
        entry = ledger.row(self._id, 0, 0, KIND, text, context=self._asked.context)
        with ledger.transaction(lock_timeout=5.0) as connection:
            forget_results(ledger, connection)
            ledger.insert(connection, [entry | {"owner": LEDGER}])

    @contextmanager
    def lock(self, asked: Asked) -> Iterator[None]:
        """An advisory lock with the name of run and result."""
        run = asked.context.run_id
        text = f"{asked.call} {asked.name!r} of run {run}"
        with advisory_lock(self._ledger.engine, text, timeout=asked.timeout, context=asked.context):
            yield


def forget_results(ledger: Ledger, connection: sa.Connection) -> None:
    """Delete the results of runs that began days ago."""
    table = ledger.table_on(connection)
    oldest = ledger.now(connection) - DAYS * 86400
    old = sa.delete(table).where(table.c.kind == KIND, table.c.written < oldest)
    ledger.execute(connection, old)


@checked(name=_NAME, make=_MAKE, timeout=_TIMEOUT, context=CONTEXT)
def once_per_run(
    name: str,
    make: Callable[[], T],
    *,
    bind: Any = None,
    timeout: float = 300.0,
    context: WorkerContext | None = None,
) -> T:
    """What ``make`` returns, which exactly one worker of the run calls.

    The others wait, and get its result, or its failure. Where a worker is killed in the middle,
    the next one calls ``make`` again: it must be repeatable.

    Args:
        name: of the result, in this run.
        make: returns what has a form in JSON: keys, names, lists and dicts of them.
        bind: for workers on several machines: keep the result in the ledger of this database,
            which is installed where there is none. An Engine or what leads to one, or a Ledger.
            By default it is in a file of this machine and user, among the temporary ones.
        timeout: how long to wait for another worker, in seconds.
        context: whose run; by default this worker's, as TIDYROWS_RUN or pytest-xdist says. Without
            these the run is this process.

    Raises:
        OncePerRunError: ``make`` has failed in another worker, which is named; or its result has
            no form in JSON.
        LockTimeoutError: there was no result in time; the error names who makes it.
        LedgerError: this role may not make the ledger.
        NotBoundError: ``bind`` leads to no database, or to one in memory.
        ArgumentError: an argument has a value that it does not take.

    Example:
        >>> def seed_currencies():
        ...     with Session(engine) as session:
        ...         currency = session.merge(Currency(code="EUR"))
        ...         session.commit()
        ...         return {"euro": currency.id}
        >>> ids = once_per_run("seed-currencies", seed_currencies)
    """
    if iscoroutinefunction(make):
        raise ArgumentError(
            f"once_per_run({name!r}, ...) cannot await {make.__name__}. Write await "
            f"once_per_run_async({name!r}, {make.__name__}).",
            argument="make",
            value=make,
        )
    if is_async(bind):
        raise SessionStateError(
            f"The engine of once_per_run({name!r}, ...) is asynchronous. Write await "
            f"once_per_run_async({name!r}, make, bind=engine)."
        )
    asked = Asked("once_per_run", name, timeout, context or WorkerContext.current())
    result: T = _once(asked, make, bind)
    return result


@overload
async def once_per_run_async(
    name: str,
    make: Callable[[], Awaitable[T]],
    *,
    bind: Any = ...,
    timeout: float = ...,  # noqa: ASYNC109 -- as below
    context: WorkerContext | None = ...,
) -> T: ...


@overload
async def once_per_run_async(
    name: str,
    make: Callable[[], T],
    *,
    bind: Any = ...,
    timeout: float = ...,  # noqa: ASYNC109 -- as below
    context: WorkerContext | None = ...,
) -> T: ...


@checked(name=_NAME, make=_MAKE, timeout=_TIMEOUT, context=CONTEXT)
async def once_per_run_async(
    name: str,
    make: Callable[[], Any],
    *,
    bind: Any = None,
    timeout: float = 300.0,  # noqa: ASYNC109 -- of the wait only; its error names the worker
    context: WorkerContext | None = None,
) -> Any:
    """As :func:`once_per_run`, for tasks: other tasks run while this one waits.

    Args:
        name: as for ``once_per_run``.
        make: a function or a coroutine function.
        bind: as for ``once_per_run``, and the asynchronous kin.
        timeout: as for ``once_per_run``.
        context: as for ``once_per_run``.
    """

    def awaited() -> Any:
        value = make()
        return wait_for(value) if isawaitable(value) else value

    asked = Asked("once_per_run_async", name, timeout, context or WorkerContext.current())
    return await spawn(_once, asked, awaited, bind)


def _once(asked: Asked, make: Callable[[], Any], bind: Any) -> Any:
    place: OncePlace
    if bind is None:
        place = FilePlace(run_folder(asked.context.run_id), asked.name)
    else:
        known = isinstance(bind, Ledger)
        place = EntryPlace(bind if known else Ledger(engine_of(bind, str(asked))), asked)
    return made_once(asked, make, place)
