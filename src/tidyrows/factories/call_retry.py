"""A factory call whose transaction was lost runs again as a whole, with new values.

Before that, the traces of the lost attempt are removed from the objects that the caller built and
passed in: the next attempt writes them again, together with everything that they refer to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import inspect, orm
from sqlalchemy.orm.base import NO_VALUE
from sqlalchemy.orm.collections import collection_adapter

from tidyrows.cleanup.verify import was_committed
from tidyrows.dialects import Fault
from tidyrows.errors import add_note
from tidyrows.factories.call import Call

if TYPE_CHECKING:
    from collections.abc import Callable

    from tidyrows.tracking.tracker import ResourceTracker

T = TypeVar("T")

_NOT_ALONE = (
    "tidyrows: this factory call was not run again, since its transaction is not its own alone: it "
    "began before the call, or a factory with a session of its own took part. Commit before the "
    "call, or put the whole transaction into with_retries(session, fn)"
)
_UNKNOWN = (
    "tidyrows: the answer to the COMMIT was lost and nobody can tell whether the rows were "
    "committed, so this factory call was not run again"
)


def call_with_retries(
    tracker: ResourceTracker, make: Callable[[dict[str, Any]], T], params: dict[str, Any]
) -> T:
    """Run ``make(params)`` as one factory call, and again where its whole transaction was lost.

    ``make`` gets a copy of the parameters, since factory_boy removes some of them.
    """
    call = Call(tracker, began_transaction=not tracker.in_transaction)
    try:
        return call.run(make, params.copy())
    except Exception as error:
        if not _is_transient(call, error):
            raise
    is_counted = False

    def attempt() -> T:
        nonlocal call, is_counted
        error = call.error
        if error is not None and not is_counted:
            is_counted = True  # by the policy, which gets the first attempt's error here
            raise error
        if error is not None and call.commit_sent:
            is_committed = _is_committed(call, error)
            if is_committed:
                _restore_instances(call)
                result: T = call.result
                return result
            if is_committed is None:
                call.is_alone = False
                add_note(error, _UNKNOWN)
                raise error
        _detach_from_callers(call.made, call.unkeyed)
        call = Call(tracker, began_transaction=not tracker.in_transaction)
        return call.run(make, params.copy())

    again: T = tracker.retry.run(attempt, is_transient=lambda error: _is_transient(call, error))
    return again


def _is_committed(call: Call, error: BaseException) -> bool | None:
    """Whether the COMMIT succeeded; None where nobody can tell."""
    tracker = call.tracker
    if tracker.store.uncertain_keys() - call.uncertain_before:
        return was_committed(tracker, call.uncertain_before)
    return None if tracker.engines.fault(error) is Fault.LOST else False


def _is_transient(call: Call, error: BaseException) -> bool:
    """Whether another attempt may succeed, and only rows of this call are lost."""
    if not call.tracker.engines.is_transient(error):
        return False
    is_lost = error is call.error and not (call.may_run_again or call.commit_sent)
    if is_lost and (call.session is not None or not call.is_alone):
        add_note(error, _NOT_ALONE)
    return call.may_run_again


def _restore_instances(call: Call) -> None:
    """The COMMIT succeeded: add the objects of the call to the session again, as persistent."""
    session = call.session
    if session is None:
        return
    for instance in call.expelled:
        orm.make_transient_to_detached(instance)
    session.add_all(call.expelled)  # after all of them, since one object takes others along
    session.commit()


# -- objects that the caller built and passed in ---------------------------------------------------


def unkeyed_with(instance: Any) -> list[Any]:
    """The objects without a key: this new object, and those to which saving it cascades."""
    state = inspect(instance, raiseerr=False)
    if not isinstance(state, orm.InstanceState) or not state.transient:
        return []
    cascaded = (row[0] for row in state.mapper.cascade_iterator("save-update", state))
    return [each for each in (instance, *cascaded) if _is_unkeyed(each)]


def _is_unkeyed(instance: Any) -> bool:
    state: orm.InstanceState[Any] = inspect(instance)
    return state.transient and None in state.mapper.primary_key_from_instance(instance)


def _detach_from_callers(made: list[Any], unkeyed: list[Any]) -> None:
    """Remove the objects and the traces of a lost attempt from objects of the caller."""
    lost = set(map(id, made))
    for instance in made:
        state: orm.InstanceState[Any] = inspect(instance)
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
    _make_new(unkeyed)


def _make_new(unkeyed: list[Any]) -> None:
    """Remove keys, and that a flush has written relationships, from objects of the caller."""
    for instance in unkeyed:
        state: orm.InstanceState[Any] = inspect(instance)
        mapper = state.mapper
        if not state.transient:
            continue
        for column in mapper.primary_key:
            setattr(instance, mapper.get_property_by_column(column).key, None)
        for relationship in mapper.relationships:
            if relationship.key in state.dict and not relationship.viewonly:
                state.committed_state[relationship.key] = NO_VALUE
