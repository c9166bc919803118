"""Meta.sqlalchemy_get_or_create, with two faults of factory_boy mended.

Where another worker inserted the row first, factory_boy rolls the whole session back, and every
uncommitted row of the test is lost: here a savepoint holds the attempt. factory_boy then looks for
the other row by the parameters of the last call of the class, which SubFactory never sets: here
the parameters are those of the object being made.
"""

from __future__ import annotations

from contextlib import nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from factory import errors
from sqlalchemy import orm

from tidyrows.dialects import dialect_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from factory.alchemy import SQLAlchemyModelFactory
    from factory.base import FactoryOptions

parameters: ContextVar[tuple[FactoryOptions, Mapping[str, Any]] | None] = ContextVar(
    "tidyrows_parameters", default=None
)
"""The options of the factory that makes an object, and the parameters it was called with."""


def get_or_create(
    factory: type[SQLAlchemyModelFactory],
    model: type[Any],
    session: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The row with these key fields, or a new one.

    Raises:
        FactoryError: a key field has no value.
        MultipleResultsFound: several rows have the key fields' values.
        IntegrityError: the row collides with another that the call's parameters do not describe.
    """
    options: Any = factory._meta  # noqa: SLF001 -- factory_boy's name for what extensions work with
    keys: dict[str, Any] = {}
    for field in options.sqlalchemy_get_or_create:
        if field not in kwargs:
            raise errors.FactoryError(
                f"sqlalchemy_get_or_create - Unable to find initialization value for "
                f"'{field}' in factory {factory.__name__}"
            )
        keys[field] = kwargs.pop(field)
    found = session.query(model).filter_by(*args, **keys).one_or_none()
    if found is not None:
        return found
    # Without a flush there is no insert yet, hence nothing to confine.
    real = _confining(session, model) if options.flushes_each_object else None
    save: Any = factory._save  # noqa: SLF001 -- an extension point too
    attempt = nullcontext() if real is None else real.begin_nested()
    try:
        with attempt:
            return save(model, session, args, {**keys, **kwargs})
    except sa.exc.IntegrityError:
        if real is None or not real.is_active:  # not active: the COMMIT itself has failed
            session.rollback()
        winner = _winner(options, session.query(model), keys, None if real is None else real)
        if winner is None:
            raise
        return winner


def _confining(session: Any, model: type[Any]) -> orm.Session | None:
    """The session in which a savepoint can be set now, or None where none can."""
    real = session() if isinstance(session, orm.scoped_session) else session
    if not isinstance(real, orm.Session):
        return None
    connection = real.connection(bind_arguments={"mapper": sa.inspect(model)})
    if dialect_for(connection).is_autocommit(connection):
        return None
    dialect_for(connection).before_savepoint(connection)
    return real


def _winner(
    options: FactoryOptions, query: orm.Query[Any], keys: dict[str, Any], real: orm.Session | None
) -> Any:
    """The row that another worker inserted first, by the key fields that the call named."""
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
    # A REPEATABLE READ snapshot from before the other's commit does not show the row; a locking
    # read does, on the MySQL family.
    try:
        with real.begin_nested():
            return query.with_for_update(read=True, key_share=True).one_or_none()
    except sa.exc.DBAPIError:
        return None
