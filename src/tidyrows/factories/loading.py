"""In a task, which cannot load an attribute later: the attributes of new objects are loaded."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import inspect
from sqlalchemy.orm import RelationshipDirection
from sqlalchemy.orm.attributes import set_committed_value

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sqlalchemy.orm import InstanceState, RelationshipProperty, Session

_recorded: ContextVar[list[Any] | None] = ContextVar("tidyrows_recorded", default=None)


@contextmanager
def recording() -> Iterator[list[Any]]:
    """What factories make in this block, SubFactories too."""
    made: list[Any] = []
    token = _recorded.set(made)
    try:
        yield made
    finally:
        _recorded.reset(token)


def record(instance: Any) -> None:
    """A factory has made this object."""
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(instance)


def load_attributes(made: Iterable[Any]) -> None:
    """Load what the database filled in, and the relationships between these objects."""
    objects = {id(instance): instance for instance in made}
    for instance in objects.values():
        state: InstanceState[Any] = inspect(instance)
        if not state.persistent or state.session is None:
            continue
        columns = state.expired_attributes & set(state.mapper.column_attrs.keys())
        if columns:
            state.session.refresh(instance, columns)
        for relationship in state.mapper.relationships:
            for other in _values(state.dict.get(relationship.key)):
                if id(other) in objects:
                    for inverse in relationship._reverse_property:  # noqa: SLF001 -- no public name tells both of back_populates and backref
                        if inverse.lazy != "write_only":
                            getattr(other, inverse.key)


_LOADED_BY_NOBODY = {"write_only", "dynamic", "raise", "raise_on_sql", "noload"}


@contextmanager
def readable(instance: Any, filled: set[sa.Table] | None) -> Iterator[None]:
    """A block, of a coroutine, in which a new object is loaded; for ``filled`` see below.

    What the block leaves as it was is loaded anew later: its rows may be others by then.
    """
    state: InstanceState[Any] | None = inspect(instance, raiseerr=False)
    if state is None or not state.persistent or state.session is None:
        yield
        return
    load_attributes([instance])
    before = set(state.dict)
    fill_relationships([instance], filled)
    loaded = set(state.dict) - before
    yield
    if state.persistent and state.session is not None:
        unchanged = [key for key in loaded if not state.attrs[key].history.has_changes()]
        if unchanged:
            state.session.expire(instance, unchanged)


def fill_relationships(made: Iterable[Any], filled: set[sa.Table] | None) -> None:
    """Load each relationship of new objects, without a statement where no row can be found.

    Args:
        made: new objects.
        filled: the tables that got rows in the transaction that made the objects; None for any.
    """
    for instance in made:
        state: InstanceState[Any] = inspect(instance)
        for relationship in state.mapper.relationships if state.persistent else ():
            key = relationship.key
            if key in state.dict or relationship.lazy in _LOADED_BY_NOBODY:
                continue
            if filled is not None and _is_empty(relationship, filled):
                set_committed_value(instance, key, () if relationship.uselist else None)
            else:
                getattr(instance, key)


def is_new(instance: Any, session: Session) -> bool:
    """Whether the transaction of a session has inserted the row of an object."""
    state = inspect(instance)
    transaction = session.get_nested_transaction() or session.get_transaction()
    while transaction is not None:
        if state in transaction._new:  # noqa: SLF001 -- no public name
            return True
        transaction = transaction.parent
    return False


def _is_empty(relationship: RelationshipProperty[Any], filled: set[sa.Table]) -> bool:
    """Whether no row can refer to a new object: none before this transaction, and none in it."""
    if relationship.direction is RelationshipDirection.MANYTOONE or relationship.viewonly:
        return False
    secondary = relationship.secondary
    tables = set(relationship.mapper.tables) if secondary is None else {secondary}
    return tables.isdisjoint(filled) and all(
        any(key.column is local for key in remote.foreign_keys)
        for local, remote in relationship.synchronize_pairs
    )


def _values(value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, (list, set, tuple)):
        return list(value)
    return list(value.values()) if isinstance(value, dict) else [value]
