"""Factories of an asynchronous engine: the same calls, in SQLAlchemy's greenlet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import inspect

from tidyrows.greenlets import spawn
from tidyrows.tracking.current import current_tracker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sqlalchemy.orm import InstanceState, Session

T = TypeVar("T")


async def create_in_greenlet(create: Callable[[], T]) -> T:
    """Call a factory inside a greenlet; two tasks never use one session at the same time."""
    tracker = current_tracker()
    if tracker is None:
        return await spawn(create)
    async with tracker.turn():
        return await spawn(create)


def commit_unexpired(session: Session) -> None:
    """Commit, and keep attributes loaded: a task cannot load them later."""
    usual, session.expire_on_commit = session.expire_on_commit, False
    try:
        session.commit()
    finally:
        session.expire_on_commit = usual


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
                    for key in _inverse(relationship):
                        getattr(other, key)


def _values(value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, (list, set, tuple)):
        return list(value)
    return list(value.values()) if isinstance(value, dict) else [value]


def _inverse(relationship: Any) -> list[str]:
    return [each.key for each in relationship._reverse_property if each.lazy != "write_only"]  # noqa: SLF001 -- no public name tells both of back_populates and backref
