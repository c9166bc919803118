"""A factory call whose transaction was lost is run again as a whole, with the same data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from factory.declarations import BaseDeclaration
from sqlalchemy import orm

from tidyrows.cleanup.in_doubt import was_committed
from tidyrows.dialects import Fault
from tidyrows.factories.call import Call
from tidyrows.factories.detach_instances import part_from_callers
from tidyrows.factories.recorded_values import ANYTHING, Draws

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tidyrows.tracking.tracker import ResourceTracker

T = TypeVar("T")

_NOT_WHOLE = (
    "tidyrows: this factory call was not run again, since its transaction is not its own alone: it "
    "began before the call, or a factory with a session of its own took part. Commit before the "
    "call, or put the whole transaction into with_retries(session, fn)"
)
_UNKNOWN = (
    "tidyrows: the answer to the COMMIT was lost and nobody can tell whether the rows were "
    "committed, so this factory call was not run again"
)


def again_where_lost(
    tracker: ResourceTracker, make: Callable[[], T], *, given: Mapping[str, Any]
) -> T:
    """Call ``make`` as one outermost factory call; again where all of its transaction was lost.

    Args:
        tracker: whose session it uses.
        make: calls the factory.
        given: the call's arguments.
    """
    attempts = _Attempts(tracker, make)
    if any(isinstance(each, BaseDeclaration) for each in given.values()):
        attempts.draws.begin(ANYTHING)
    try:
        made: T = attempts.first()
    except Exception as error:
        if not attempts.may_help(error):
            raise
    else:
        return made
    again: T = tracker.retry.run(attempts.next, is_transient=attempts.may_help)
    return again


class _Attempts:
    """The attempts at one call."""

    __slots__ = ("_call", "_counted", "_make", "_tracker", "draws")

    def __init__(self, tracker: ResourceTracker, make: Callable[[], Any]) -> None:
        self._tracker = tracker
        self._make = make
        self.draws = Draws()
        self._call: Call | None = None
        self._counted = False

    def first(self) -> Any:
        self._call = call = Call(self._tracker, draws=self.draws)
        with call:
            call.result = self._make()
        return call.result

    def next(self) -> Any:
        """The first attempt again, for the policy to count, and then another one."""
        call = self._call
        if call is None or call.error is None:
            return self.first()
        if not self._counted:
            self._counted = True
            raise call.error
        if call.sent:
            committed = self._was_committed(call, call.error)
            if committed:
                _put_back(call)
                return call.result
            if committed is None:
                call.alone = False
                call.error.add_note(_UNKNOWN)
                raise call.error
        part_from_callers(call.made, call.unkeyed)
        self.draws.again()
        return self.first()

    def _was_committed(self, call: Call, error: BaseException) -> bool | None:
        if self._tracker.doubts() - call.doubts:
            return was_committed(self._tracker, call.doubts)
        return None if self._tracker.fault(error) is Fault.LOST else False

    def may_help(self, error: BaseException) -> bool:
        """Whether another attempt may end better, and nothing but this call's is lost."""
        call = self._call
        if call is None or not self._tracker.may_pass(error):
            return False
        if not call.is_whole and error is call.error:
            if not call.sent and (call.session is not None or not call.alone):
                error.add_note(_NOT_WHOLE)
            return False
        return call.is_whole


def _put_back(call: Call) -> None:
    """The COMMIT had succeeded: the objects are those of the rows, as if it had been answered."""
    session = call.session
    if session is None:
        return
    for instance in call.expelled:
        orm.make_transient_to_detached(instance)
    session.add_all(call.expelled)  # after all of them, since one takes others along
    session.commit()
