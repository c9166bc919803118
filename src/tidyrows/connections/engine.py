"""An engine for one worker of several, whose pool fits the server."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from tidyrows.arguments import Kind, check, instance_of, optional, whole
from tidyrows.connections.budget import Budget, ask_limits
from tidyrows.connections.fallback import fallback_engine, refuse_in_ci
from tidyrows.connections.leases import CountedPool, PoolUse, WaitingPool, uses
from tidyrows.dialects import EMBEDDED, dialect_for, engine_for
from tidyrows.errors import ArgumentError, NotBoundError, ServerAwayError
from tidyrows.greenlets import synchronous
from tidyrows.worker import CONTEXT, WorkerContext, label_of_run

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

_TIMEOUT = 10.0
"""Seconds that a checkout waits while all connections of the worker are out."""
_KEPT = 5
"""Connections that stay open for the next checkout, as SQLAlchemy has it."""
_OF_POOLS = ("pool", "poolclass", "max_overflow", "echo_pool")
_OF_ANY_DATABASE = ("echo", "hide_parameters", "execution_options", "query_cache_size")
_METADATA = instance_of(sa.MetaData, need="a MetaData", example="Base.metadata")
_KINDS = {
    "url": instance_of(str, sa.URL, need="a URL", example="os.environ['DATABASE_URL']"),
    "workers": optional(whole("8", least=1)),
    "reserve": whole("5", least=0),
    "context": CONTEXT,
    "fallback": Kind(
        lambda value: value is None or value in EMBEDDED,
        f"one of {', '.join(EMBEDDED)}, or None",
        repr(next(iter(EMBEDDED))),
    ),
    "metadata": optional(_METADATA),
}


def worker_engine(
    url: str | sa.URL,
    *,
    workers: int | None = None,
    reserve: int = 5,
    context: WorkerContext | None = None,
    fallback: str | None = None,
    metadata: sa.MetaData | None = None,
    **options: Any,
) -> sa.Engine:
    """An engine for one worker of a run, which together with the others does not fill the server.

    The server is asked once, here, how many connections it takes. The pool has an equal part of
    what is left. A connection is checked before it is used, and named after run, worker and test.

    Args:
        url: the database; of an asynchronous driver see :func:`worker_async_engine`.
        workers: how many share the connections; by default the workers of the run.
        reserve: connections that are left to others: the application under test, people.
        context: run and worker; by default this worker's.
        fallback: ``sqlite`` to go on with a new file where no server answers, except in CI.
        metadata: the tables of that file; it must be given with ``fallback``.
        options: of ``create_engine``; they come before those that are chosen here.

    Raises:
        ConnectionBudgetError: the server does not take so many connections.
        ServerAwayError: no server answers.
        NotBoundError: the URL is none, or that of an asynchronous driver.
        ArgumentError: an argument has a value that it does not take.

    Example:
        >>> engine = worker_engine("postgresql+psycopg://localhost/app", workers=8)
        >>> engine.pool.size(), engine.pool.timeout()
        (5, 10.0)
    """
    engine: sa.Engine = _made(
        worker_engine,
        url,
        options,
        workers=workers,
        reserve=reserve,
        context=context,
        fallback=fallback,
        metadata=metadata,
    )
    return engine


def worker_async_engine(
    url: str | sa.URL,
    *,
    workers: int | None = None,
    reserve: int = 5,
    context: WorkerContext | None = None,
    fallback: str | None = None,
    metadata: sa.MetaData | None = None,
    **options: Any,
) -> AsyncEngine:
    """As :func:`worker_engine`, with an asynchronous driver.

    It is no coroutine: while the server is asked, for milliseconds as a rule, the loop waits.

    Example:
        >>> engine = worker_async_engine("postgresql+asyncpg://localhost/app", workers=8)
        >>> async with engine.connect() as connection:
        ...     await connection.execute(sa.text("SELECT 1"))
    """
    engine: AsyncEngine = _made(
        worker_async_engine,
        url,
        options,
        workers=workers,
        reserve=reserve,
        context=context,
        fallback=fallback,
        metadata=metadata,
    )
    return engine


def _made(
    call: Callable[..., Any],
    url: str | sa.URL,
    options: dict[str, Any],
    *,
    workers: int | None,
    reserve: int,
    context: WorkerContext | None,
    **instead: Any,
) -> Any:
    name, is_async = call.__name__, call is worker_async_engine
    if "pool" in options:
        raise ArgumentError(
            f"{name}(pool=...): it makes the pool itself, as large as fits; write poolclass=.",
            argument="pool",
        )
    given = {"url": url, "workers": workers, "reserve": reserve, "context": context, **instead}
    check(name, _KINDS, given.items())
    if instead["fallback"] is not None:
        check(name, {"metadata": _METADATA}, instead.items())
    context = context or WorkerContext.current()
    workers = workers or context.worker_count
    make = _async_engine if is_async else _sync_engine
    probe = make(url, poolclass=NullPool, **_without_pool(options))
    PoolUse(dialect_for(synchronous(probe)), context).listen(synchronous(probe))
    try:
        limits = ask_limits(probe, label_of_run(context), workers, is_async=is_async)
    except ServerAwayError as away:
        if instead["fallback"] is None:
            raise
        refuse_in_ci(away, instead["fallback"])
        options = {n: value for n, value in options.items() if n in _OF_ANY_DATABASE}
        into = partial(_with_pool, make, Budget((), workers, reserve), context, options=options)
        return fallback_engine(into, away, context=context, is_async=is_async, **instead)
    return _with_pool(make, Budget(limits, workers, reserve), context, url, options=options)


def _sync_engine(url: str | sa.URL, **options: Any) -> sa.Engine:
    engine = engine_for(url, **options)
    if engine.dialect.is_async:
        raise NotBoundError(
            f"{engine.dialect.driver} is an asynchronous driver: write worker_async_engine(url), "
            f"or give the URL of a synchronous one."
        )
    return engine


def _async_engine(url: str | sa.URL, **options: Any) -> AsyncEngine:
    from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415 -- needs the greenlet package

    try:
        return create_async_engine(url, **options)
    except (sa.exc.ArgumentError, ModuleNotFoundError):
        engine_for(url)  # which says why
        raise
    except sa.exc.InvalidRequestError as error:
        raise NotBoundError(
            f"The URL is that of a synchronous driver: write worker_engine(url), or give the URL "
            f"of an asynchronous one. {error}"
        ) from error


def _without_pool(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in options.items()
        if name not in _OF_POOLS and not name.startswith("pool_")
    }


def _with_pool(
    make: Callable[..., Any],
    budget: Budget,
    context: WorkerContext,
    url: str | sa.URL,
    *,
    options: dict[str, Any],
) -> Any:
    """The engine, which the report knows, with a pool that fits the budget."""
    most = budget.pool_size()
    plain = synchronous(make(url))
    kind = options.get("poolclass") or plain.dialect.get_dialect_pool_class(plain.url)
    options = {"pool_pre_ping": True, **options}
    kinds: tuple[type, ...] = (CountedPool, kind)
    if issubclass(kind, sa.QueuePool):
        options, kinds = _fitting(budget, most, options), (CountedPool, WaitingPool, kind)
    counted: Any = type("WorkerPool", kinds, {})
    engine = make(url, **options | {"poolclass": counted})
    inner = synchronous(engine)
    use = counted.use = uses[inner.dialect] = PoolUse(dialect_for(inner), context)
    use.listen(inner)
    if issubclass(kind, sa.QueuePool):
        size, overflow = inner.pool.size(), inner.pool._max_overflow  # noqa: SLF001 -- no public name
        use.most = None if overflow < 0 else size + overflow
    return engine


def _fitting(budget: Budget, most: int | None, options: dict[str, Any]) -> dict[str, Any]:
    options = {"pool_timeout": _TIMEOUT, **options}
    if most is None:
        return options
    size = options.get("pool_size", max(1, min(_KEPT, most - options.get("max_overflow", 0))))
    overflow = options.get("max_overflow", max(0, most - size))
    if size and overflow >= 0:  # else the caller wants no limit
        budget.refuse(size + overflow)
    return options | {"pool_size": size, "max_overflow": overflow}
