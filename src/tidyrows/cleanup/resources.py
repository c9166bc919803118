"""Rows and external resources together: each phase of rows committed, then what they have freed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from tidyrows.cleanup.dependents import Reason
from tidyrows.cleanup.phases import order_of
from tidyrows.cleanup.plan import place_of
from tidyrows.cleanup.report import Held, Leftover
from tidyrows.cleanup.verify import in_short
from tidyrows.external import ExternalResource, handler_of, plain
from tidyrows.keys import RowKey
from tidyrows.tracking.keyset import KeySet

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tidyrows.cleanup.dependents import Kept
    from tidyrows.cleanup.phases import Order
    from tidyrows.cleanup.report import CleanupReport
    from tidyrows.external import Item, Tie
    from tidyrows.keys import TableName
    from tidyrows.retry import RetryPolicy
    from tidyrows.schema import Place
    from tidyrows.tracking.store import TableHoldings
    from tidyrows.tracking.tracker import ResourceTracker


@dataclass(frozen=True, slots=True)
class Part:
    """Which rows go in one phase.

    Attributes:
        goes: whether a row goes now.
        doubts: whether rows in doubt are looked at now, which is once.
        held: rows that stay since a row of another tracker needs them, and whose.
    """

    goes: Callable[[RowKey], bool]
    doubts: bool
    held: Mapping[RowKey, Reason]

    def of(self, held: Iterable[TableHoldings]) -> list[TableHoldings]:
        """What is held, without the rows of other phases."""
        parts = []
        for each in held:
            going = [key for key in each.keys if self.goes(each.table.row(key))]
            nameless = self.goes(_unkeyed(each.table.name))
            part = replace(
                each,
                keys=KeySet(going),
                doubtful=each.doubtful if self.doubts else {},
                unkeyed=each.unkeyed if nameless else 0,
                whole=each.whole if nameless else [],
                unsure=each.unsure if nameless else 0,
            )
            if part:
                parts.append(part)
        return parts

    def others(self, held: Iterable[TableHoldings]) -> dict[Place, KeySet]:
        """The rows of other phases: what they reference stays as long as they do."""
        return {
            place_of(each.table.name): KeySet(
                key for key in each.keys if not self.goes(each.table.row(key))
            )
            for each in held
        }

    def kept(self, held: Iterable[TableHoldings]) -> Kept:
        """Rows of a database that stay for another tracker's sake."""
        tables = {each.table.name for each in held}
        kept: Kept = {}
        for row, reason in self.held.items():
            if row.table in tables:
                key = row.key[0] if len(row.key) == 1 else row.key
                kept.setdefault(place_of(row.table), {})[key] = reason
        return kept


Clean: TypeAlias = Callable[[Part], Sequence[Leftover]]
"""Deletes the rows of a phase in every database; what is left over of them."""


@dataclass(slots=True)
class Phases:
    """One cleanup of rows and resources.

    Attributes:
        tracker: whose.
        report: where it is written down.
        clean: deletes rows.
        retry: how often a handler is called.
        until: when the cleanup's deadline ends, by the policy's clock.
        failure: the first error of a handler, or None.
    """

    tracker: ResourceTracker
    report: CleanupReport
    clean: Clean
    retry: RetryPolicy
    until: float
    failure: Exception | None = None
    _stay: dict[Item, Reason] = field(default_factory=dict)
    _tried: set[RowKey] = field(default_factory=set)

    def run(self, references: Sequence[tuple[TableName, TableName]]) -> list[Leftover]:
        """Delete the rows and remove the resources, as far as that can be done.

        Args:
            references: which table references which, child first.

        Returns:
            What is left over, with its cause.
        """
        ties = {tie.resource: tie for tie in self.tracker.ties()}
        tracked = [held.table.name for held in self.tracker.snapshot()]
        order = order_of(list(ties.values()), references, tracked)
        leftovers: list[Leftover] = []
        for circle in order.circles:
            cause = (
                f"there is no order in which these can go: {circle}; nothing in this circle was "
                f"touched. Take one of them out of after= or before="
            )
            self._stay.update(dict.fromkeys(circle.members, Reason(cause)))
            leftovers += [_left(each, cause) for each in ties if each in circle.members]
        pending = [each for each in ties if each not in self._stay]
        doubts = True
        while True:
            later = order.later(pending)
            leftovers += self._rows(order, later, doubts=doubts)
            doubts = False
            ready = [each for each in pending if each not in later]
            if not ready:
                return leftovers + self._untouched()
            for resource in ready:
                pending.remove(resource)
                leftovers += self._resource(ties[resource])

    def _rows(self, order: Order, later: set[Item], *, doubts: bool) -> list[Leftover]:
        """Delete the rows that wait for nothing any more."""

        def goes(row: RowKey) -> bool:
            if row in self._tried or self._reason(row) is not None:
                return False
            return order.node(row) not in later

        held = {
            each.row: Reason(f"it is held by {each.by}", each.by)
            for each in self.report.held
            if each.row is not None
        }
        held.update(
            (row, reason)
            for row, reason in self._stay.items()
            if isinstance(row, RowKey) and reason.by
        )
        part = Part(goes, doubts, held)
        if not part.of(self.tracker.snapshot()):
            return []
        leftovers = list(self.clean(part))
        for left in part.of(self.tracker.snapshot()):
            self._tried.update(map(left.table.row, left.keys))
            if left.nameless:
                self._tried.add(_unkeyed(left.table.name))
        return leftovers

    def _reason(self, row: RowKey) -> Reason | None:
        """Why a row is not to be touched, if so."""
        return self._stay.get(row) or self._stay.get(row.table)

    def _untouched(self) -> list[Leftover]:
        leftovers = []
        for held in self.tracker.snapshot():
            name = held.table.name
            for row in map(held.table.row, held.keys.in_order()):
                reason = self._reason(row)
                if reason is None or row in self._tried:
                    continue
                if reason.by is None:
                    leftovers.append(Leftover(name, row, reason.cause))
                else:
                    self.report.held += (Held(row, reason.by),)
            if held.nameless and name in self._stay:
                cause = self._stay[name].cause
                leftovers.append(Leftover(name, None, cause, held.nameless))
        return leftovers

    # -- resources -----------------------------------------------------------------------------

    def _resource(self, tie: Tie) -> list[Leftover]:
        """Remove a resource; where it stays, so does what it needs."""
        reason = self._stay.get(tie.resource) or self._needed(tie) or self._removed(tie.resource)
        if reason is None:
            self.tracker.forget_external(tie.resource)
            removed = self.report.external
            removed[tie.resource.kind] = removed.get(tie.resource.kind, 0) + 1
            return []
        needs = Reason(f"{tie.resource} needs it and is still there", reason.by)
        for item in tie.before:
            self._stay.setdefault(item, needs)
        if reason.by is not None:
            self.report.held += (Held(None, reason.by, tie.resource),)
            return []
        return [_left(tie.resource, reason.cause)]

    def _needed(self, tie: Tie) -> Reason | None:
        """What needs this resource and is still there."""
        there = {held.table.name: held for held in self.tracker.snapshot()}
        for item in tie.after:
            blocker = self._still(item, there)
            if blocker is None:
                continue
            by = {each.resource or each.row: each.by for each in self.report.held}.get(blocker)
            return Reason(f"{blocker} needs it and is still there", by)
        return None

    def _still(self, item: Item, there: Mapping[TableName, TableHoldings]) -> Any:
        if isinstance(item, ExternalResource):
            return item if item in self.tracker.externals() else None
        held = there.get(item.table if isinstance(item, RowKey) else item)
        if held is None:
            return None
        if isinstance(item, RowKey):
            key = item.key[0] if len(item.key) == 1 else item.key
            return item if key in held.keys or key in held.doubtful else None
        for key in (*held.keys.in_order(), *held.doubtful):
            return held.table.row(key)
        return item

    def _removed(self, resource: ExternalResource) -> Reason | None:
        """Call the handler; why the resource is still there, if it is."""
        handler = handler_of(resource.kind)
        if handler is None:
            return Reason(
                f"no handler for kind {resource.kind!r}: write "
                f'@external_handler("{resource.kind}") above the function that removes it, and '
                f"import it before the cleanup"
            )
        remaining = self.until - self.retry.clock()
        if remaining <= 0:
            return Reason("the cleanup's deadline had passed before it was tried")

        def again(_attempt: int, _error: BaseException) -> None:
            self.report.retries += 1

        try:
            replace(self.retry, deadline=remaining).run(
                lambda: handler.remove(plain(resource.kind, resource.payload)),
                is_transient=lambda error: isinstance(error, handler.retry_on),
                on_retry=again,
            )
        except Exception as error:  # noqa: BLE001 -- a handler may raise anything; it is the resource's cause, and the manager raises from it
            self.failure = self.failure or error
            return Reason(f"its handler failed: {in_short(error)}")
        return None


def _unkeyed(name: TableName) -> RowKey:
    """All rows of a table without a primary key, as if they were one."""
    return RowKey(name, ())


def _left(resource: ExternalResource, cause: str) -> Leftover:
    return Leftover(None, None, cause, resource=resource)
