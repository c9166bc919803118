"""Remove the traces of a lost attempt from the objects that the caller built and passed in.

The next attempt writes these objects again, together with everything that they refer to.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import inspect
from sqlalchemy.orm import InstanceState
from sqlalchemy.orm.collections import collection_adapter


def unkeyed_with(instance: Any) -> list[Any]:
    """The objects without a key: this new object, and those to which saving it cascades."""
    state = inspect(instance, raiseerr=False)
    if not isinstance(state, InstanceState) or not state.transient:
        return []
    cascaded = (row[0] for row in state.mapper.cascade_iterator("save-update", state))
    return [each for each in (instance, *cascaded) if _is_unkeyed(each)]


def _is_unkeyed(instance: Any) -> bool:
    state: InstanceState[Any] = inspect(instance)
    return state.transient and None in state.mapper.primary_key_from_instance(instance)


def detach_from_callers(made: list[Any], unkeyed: list[Any]) -> None:
    """Remove the objects of a lost attempt, and the keys that it set, from the caller's objects.

    Args:
        made: the objects of the attempt.
        unkeyed: objects of the caller that had no key before the attempt.
    """
    lost = set(map(id, made))
    for instance in made:
        state: InstanceState[Any] = inspect(instance)
        for relationship in state.mapper.relationships:
            value = state.dict.get(relationship.key)
            if value is None or relationship.viewonly:
                continue
            adapter = collection_adapter(value) if relationship.uselist else None
            others = [value] if adapter is None else list(adapter)
            if not any(id(each) not in lost and inspect(each).transient for each in others):
                continue
            if adapter is None:
                setattr(instance, relationship.key, None)
            else:
                adapter.clear_with_event()
    for instance in unkeyed:
        mapper = inspect(instance).mapper
        if inspect(instance).transient:
            for column in mapper.primary_key:
                setattr(instance, mapper.get_property_by_column(column).key, None)
