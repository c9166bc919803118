"""Meta.sqlalchemy_get_or_create, without two faults of factory_boy.

Where another worker inserted the row first, factory_boy rolls the whole session back, and every
uncommitted row of the test is lost: here the INSERT is in a savepoint. factory_boy then looks for
the other row by the parameters of the last call of the class, which a SubFactory does not set: here
the parameters are those of the object that is made.
"""

from __future__ import annotations

from contextlib import nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from factory import errors
from sqlalchemy import orm

from tidyrows.dialects import dialect_for
from tidyrows.factories.used_session import session_behind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from factory.base import FactoryOptions

parameters: ContextVar[tuple[FactoryOptions, Mapping[str, Any]] | None] = ContextVar(
    "tidyrows_parameters", default=None
)
"""The options of the factory that makes an object, and the parameters of its call."""


def get_or_create(
    factory: Any,
    model: type[Any],
    session: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The row with the values of the key fields, or a new one."""
    options = factory._meta  # noqa: SLF001 -- an extension point of factory_boy
    keys: dict[str, Any] = {}
    for field in options.sqlalchemy_get_or_create:
        if field in kwargs:
            keys[field] = kwargs.pop(field)
            continue
        columns = options.key_attributes.get(field, ())
        if not columns or not kwargs.keys() >= columns:
            raise errors.FactoryError(
                f"sqlalchemy_get_or_create - Unable to find initialization value for "
                f"'{field}' in factory {factory.__name__}"
            )
        keys |= {column: kwargs.pop(column) for column in columns}
    query = session.query(model)
    found = query.filter_by(*args, **keys).one_or_none()
    if found is not None:
        return found
    # Without a flush there is no INSERT yet, so no savepoint is needed.
    real = _session_with_savepoints(session, model) if options.flushes_each_object else None
    savepoint = nullcontext() if real is None else real.begin_nested()
    try:
        with savepoint:
            return factory._save(model, session, args, {**keys, **kwargs})  # noqa: SLF001 -- as above
    except sa.exc.IntegrityError:
        if real is None or not real.is_active:  # not active: the COMMIT itself has failed
            session.rollback()
        other = _inserted_by_another(options, query, keys, real)
        if other is None:
            raise
        return other


def _session_with_savepoints(session: Any, model: type[Any]) -> orm.Session | None:
    """The session if a savepoint can be set in it now, or None."""
    real = session_behind(session)
    if real is None:
        return None
    connection = real.connection(bind_arguments={"mapper": sa.inspect(model)})
    dialect = dialect_for(connection)
    if dialect.is_autocommit(connection):
        return None
    dialect.before_savepoint(connection)
    return real


def _inserted_by_another(
    options: FactoryOptions, query: orm.Query[Any], keys: dict[str, Any], real: orm.Session | None
) -> Any:
    """The row that another worker inserted first, by the key fields of the call, or None."""
    given = parameters.get()
    if given is None or given[0] is not options:
        return None
    named = {field: value for field, value in keys.items() if field in given[1]}
    if not named:
        return None
    query = query.filter_by(**named)
    found = query.one_or_none()
    if found is not None or real is None:
        return found
    # A REPEATABLE READ snapshot from before the other's COMMIT does not contain the row; a locking
    # read finds it, on the MySQL family.
    try:
        with real.begin_nested():
            return query.with_for_update(read=True, key_share=True).one_or_none()
    except sa.exc.DBAPIError:
        return None
