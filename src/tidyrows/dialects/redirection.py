"""An engine like another one, which leads elsewhere: to another database, schema or file."""

from __future__ import annotations

from copy import copy
from inspect import getclosurevars, isfunction
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event

from tidyrows.errors import NotBoundError

if TYPE_CHECKING:
    from collections.abc import Callable

_POOL_EVENTS = (
    "connect",
    "first_connect",
    "checkout",
    "checkin",
    "reset",
    "close",
    "detach",
    "close_detached",
    "invalidate",
    "soft_invalidate",
)
_DIALECT_EVENTS = (
    "do_connect",
    "do_setinputsizes",
    "do_execute",
    "do_executemany",
    "do_execute_no_params",
    "handle_error",
)
# Others are wrapped by SQLAlchemy, so that nobody can tell whose they are.
_ENGINE_EVENTS = ("engine_connect", "begin")


def connect_parameters(engine: sa.Engine) -> dict[str, Any]:
    """The keyword arguments with which an engine connects, of its URL and of ``connect_args``.

    Raises:
        NotBoundError: it connects by a function of the project.
    """
    creator: Any = engine.pool._creator  # noqa: SLF001 -- no public name
    known = getclosurevars(creator).nonlocals if isfunction(creator) else {}
    if not {"cargs_tup", "cparams"} <= known.keys():
        raise NotBoundError(
            "The engine connects by creator= or by a pool of its own, so it cannot be led to "
            "another schema. Write create_engine(url, connect_args={...}), or use the level "
            "'transaction' or 'worker'."
        )
    return dict(known["cparams"])


def redirected(
    engine: sa.Engine,
    url: sa.URL,
    *,
    pool_class: Callable[..., sa.Pool] | None = None,
    default_schema: str | None = None,
    **parameters: Any,
) -> sa.Engine:
    """An engine with the options and listeners of another one that has connected before.

    Listeners of tidyrows are not taken over: they are those of one engine. Nor are listeners of
    statements and commits.

    Args:
        engine: the other one.
        url: where it leads.
        pool_class: the class of its pool, if not the same.
        default_schema: the schema of unqualified names there, if not the same.
        parameters: for the driver, beside those of the two URLs and of ``connect_args``.

    Raises:
        NotBoundError: the engine connects by a function of the project.
    """
    dialect: Any = copy(engine.dialect)
    dialect.__dict__.pop("dispatch", None)
    _copy_listeners(engine.dialect, dialect, _DIALECT_EVENTS)
    if default_schema is not None:
        dialect.default_schema_name = default_schema
    arguments, wanted = dialect.create_connect_args(url)
    _arguments, before = dialect.create_connect_args(engine.url)
    moved = {name: value for name, value in wanted.items() if before.get(name) != value}
    options = {**connect_parameters(engine), **moved, **parameters}

    def connect(record: Any = None) -> Any:
        positional, named = list(arguments), dict(options)
        for listener in dialect.dispatch.do_connect:
            connection = listener(dialect, record, positional, named)
            if connection is not None:
                return connection
        return dialect.connect(*positional, **named)

    pool: Any = (
        engine.pool.recreate() if pool_class is None else pool_class(connect, dialect=dialect)
    )
    pool.__dict__.pop("dispatch", None)
    pool._creator = connect  # noqa: SLF001 -- no public name
    pool._dialect = dialect  # noqa: SLF001 -- as create_engine() does
    _copy_listeners(engine.pool, pool, _POOL_EVENTS)
    new = sa.Engine(
        pool,
        dialect,
        url,
        echo=engine.echo,
        hide_parameters=engine.hide_parameters,
        execution_options=engine.get_execution_options(),
    )
    _copy_listeners(engine, new, _ENGINE_EVENTS)
    return new


def _copy_listeners(source: Any, target: Any, names: tuple[str, ...]) -> None:
    for name in names:
        for listener in getattr(source.dispatch, name).listeners:
            owner = type(getattr(listener, "__self__", None)).__module__
            if not f"{owner} {getattr(listener, '__module__', '')}".count("tidyrows."):
                event.listen(target, name, listener)
