"""Rows and external resources in one order: rows are committed, then what they freed goes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tidyrows.cleanup.reasons import LeftoverKind, Reason
from tidyrows.cleanup.report import Held, Leftover, count_in
from tidyrows.cleanup.run import log_retry
from tidyrows.cleanup.schema_view import stored
from tidyrows.external import ExternalResource, handler_of, plain
from tidyrows.keys import RowKey, TableName
from tidyrows.schema.graph import PrecedenceGraph
from tidyrows.tracking.keyset import KeySet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tidyrows.cleanup.run import CleanupRun, Kept
    from tidyrows.external import Item, Tie
    from tidyrows.schema.graph import Place
    from tidyrows.tracking.store import TableHoldings


@dataclass(frozen=True, slots=True)
class Circle:
    """Things that each must go before the next, and the last before the first."""

    members: frozenset[Item]  # all that are caught in it
    path: tuple[Item, ...]  # one way around it, from a resource to the same


class RemovalOrder:
    """Which rows and resources must go before which others, by ties and foreign keys.

    A table stands for those of its rows that no tie names; any may reference any parent row.
    """

    def __init__(
        self, ties: Sequence[Tie], references: Iterable[tuple[TableName, TableName]]
    ) -> None:
        self._named: dict[TableName, set[RowKey]] = defaultdict(set)
        for tie in ties:
            for item in (*tie.after, *tie.before):
                if isinstance(item, RowKey):
                    self._named[item.table].add(item)
        pairs: set[tuple[Item, Item]] = set()
        for tie in ties:
            pairs |= {(row, tie.resource) for each in tie.after for row in self._rows_of(each)}
            pairs |= {(tie.resource, row) for each in tie.before for row in self._rows_of(each)}
        for child, parent in references:
            parents = self._rows_of(parent)
            pairs |= {(c, p) for c in self._rows_of(child) for p in parents if c != p}
        self._graph: PrecedenceGraph[Item] = PrecedenceGraph(pairs)
        self.circles: list[Circle] = []
        for members in self._graph.circles():
            resources = [each for each in members if isinstance(each, ExternalResource)]
            if resources:  # a circle of foreign keys alone is no matter of this order
                first = min(resources, key=lambda resource: resource.number)
                path = tuple(self._graph.path_around(members, first))
                self.circles.append(Circle(frozenset(members), path))

    def node(self, row: RowKey) -> Item:
        """What a row is in this order: itself where a tie names it, else its table."""
        return row if row in self._named.get(row.table, ()) else row.table

    def later(self, resources: Iterable[ExternalResource]) -> set[Item]:
        """Everything that must not go before these resources are gone."""
        return self._graph.after(resources)

    def _rows_of(self, item: Item) -> set[Item]:
        if not isinstance(item, TableName):
            return {item}
        return {item, *self._named.get(item, ())}


def removal_order(
    ties: Sequence[Tie],
    references: Sequence[tuple[TableName, TableName]],
    tracked: Iterable[TableName],
) -> RemovalOrder:
    """The order that all foreign keys allow, or where they allow none, those of tracked tables."""
    # Rows of the application in other tables are found when ours are deleted.
    order = RemovalOrder(ties, references)
    if order.circles:
        known = set(tracked)
        order = RemovalOrder(ties, [pair for pair in references if known.issuperset(pair)])
    return order


@dataclass(frozen=True, slots=True)
class Phase:
    """The rows of one phase."""

    goes: Callable[[RowKey], bool]  # whether a row goes now
    doubts: bool  # whether rows in doubt are resolved now, which is done once
    held: Mapping[Item, Reason]  # what a row of another tracker needs

    def of(self, held: Iterable[TableHoldings]) -> list[TableHoldings]:
        """What is held, without the rows of other phases."""
        parts = []
        for each in held:
            going = [key for key in each.keys if self.goes(each.table.row(key))]
            unnamed = self.goes(_unkeyed(each.table.name))
            part = replace(
                each,
                keys=KeySet(going),
                in_doubt=each.in_doubt if self.doubts else {},
                keyless_unknown=each.keyless_unknown if unnamed else 0,
                keyless_rows=each.keyless_rows if unnamed else [],
                keyless_in_doubt=each.keyless_in_doubt if unnamed else 0,
            )
            if part:
                parts.append(part)
        return parts

    def others(self, held: Iterable[TableHoldings]) -> dict[Place, KeySet]:
        """The rows of other phases: what they reference stays as long as they do."""
        return {
            each.table.place: KeySet(key for key in each.keys if not self.goes(each.table.row(key)))
            for each in held
        }

    def kept(self, held: Iterable[TableHoldings]) -> Kept:
        """Rows of a database that stay for another tracker's sake."""
        tables = {each.table.name for each in held}
        kept: Kept = {}
        for row, reason in self.held.items():
            if isinstance(row, RowKey) and row.table in tables:
                kept.setdefault(row.table.place, {})[stored(row.key)] = reason
        return kept


class ResourceCleanup:
    """One cleanup of rows and external resources.

    ``delete`` deletes the rows of a phase in every database, and returns what is left over.
    """

    def __init__(self, run: CleanupRun, delete: Callable[[Phase], Sequence[Leftover]]) -> None:
        self._run = run
        self._tracker = run.tracker
        self._delete = delete
        self._stay: dict[Item, Reason] = {}
        self._tried: set[RowKey] = set()

    def run(self, references: Sequence[tuple[TableName, TableName]]) -> list[Leftover]:
        """Delete the rows and remove the resources, as far as that can be done."""
        ties = {tie.resource: tie for tie in self._tracker.ties()}
        tracked = [held.table.name for held in self._tracker.store.snapshot()]
        order = removal_order(list(ties.values()), references, tracked)
        leftovers: list[Leftover] = []
        for circle in order.circles:
            reason = Reason(LeftoverKind.CIRCULAR, names=tuple(map(str, circle.path)))
            self._stay.update(dict.fromkeys(circle.members, reason))
            leftovers += [
                Leftover(None, None, reason, resource=each)
                for each in ties
                if each in circle.members
            ]
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

    def _rows(self, order: RemovalOrder, later: set[Item], *, doubts: bool) -> list[Leftover]:
        """Delete the rows that wait for nothing any more."""

        def goes(row: RowKey) -> bool:
            if row in self._tried or self._reason(row) is not None:
                return False
            return order.node(row) not in later

        for each in self._run.report.held:
            if each.row is not None:
                reason = Reason(LeftoverKind.HELD, item=each.row, holder=each.by)
                self._stay.setdefault(each.row, reason)
        held = {row: reason for row, reason in self._stay.items() if reason.holder}
        phase = Phase(goes, doubts, held)
        if not phase.of(self._tracker.store.snapshot()):
            return []
        leftovers = list(self._delete(phase))
        for left in phase.of(self._tracker.store.snapshot()):
            self._tried.update(map(left.table.row, left.keys))
            if left.keyless_count:
                self._tried.add(_unkeyed(left.table.name))
        return leftovers

    def _reason(self, row: RowKey) -> Reason | None:
        """Why a row is not to be touched, if so."""
        return self._stay.get(row) or self._stay.get(row.table)

    def _untouched(self) -> list[Leftover]:
        leftovers = []
        for held in self._tracker.store.snapshot():
            name = held.table.name
            for row in map(held.table.row, held.keys.in_order()):
                reason = self._reason(row)
                if reason is None or row in self._tried:
                    continue
                if reason.holder is None:
                    leftovers.append(Leftover(name, row, reason))
                else:
                    self._run.report.held += (Held(row, reason.holder),)
            if held.keyless_count and name in self._stay:
                leftovers.append(Leftover(name, None, self._stay[name], held.keyless_count))
        return leftovers

    # -- resources -----------------------------------------------------------------------------

    def _resource(self, tie: Tie) -> list[Leftover]:
        """Remove a resource; where it stays, so does what it needs."""
        reason = self._stay.get(tie.resource) or self._needed(tie) or self._removed(tie.resource)
        if reason is None:
            self._tracker.forget_external(tie.resource)
            count_in(self._run.report.external, tie.resource.kind, 1)
            return []
        needs = Reason(LeftoverKind.NEEDED, item=tie.resource, holder=reason.holder)
        for item in tie.before:
            self._stay.setdefault(item, needs)
        if reason.holder is not None:
            self._run.report.held += (Held(None, reason.holder, tie.resource),)
            return []
        return [Leftover(None, None, reason, resource=tie.resource)]

    def _needed(self, tie: Tie) -> Reason | None:
        """What needs this resource and is still there."""
        there = {held.table.name: held for held in self._tracker.store.snapshot()}
        for item in tie.after:
            blocker = self._still(item, there)
            if blocker is None:
                continue
            held = {each.resource or each.row: each.by for each in self._run.report.held}
            return Reason(LeftoverKind.NEEDED, item=blocker, holder=held.get(blocker))
        return None

    def _still(self, item: Item, there: Mapping[TableName, TableHoldings]) -> Any:
        if isinstance(item, ExternalResource):
            return item if item in self._tracker.externals() else None
        held = there.get(item.table if isinstance(item, RowKey) else item)
        if held is None:
            return None
        if isinstance(item, RowKey):
            key = stored(item.key)
            return item if key in held.keys or key in held.in_doubt else None
        for key in (*held.keys.in_order(), *held.in_doubt):
            return held.table.row(key)
        return item

    def _removed(self, resource: ExternalResource) -> Reason | None:
        """Call the handler; why the resource is still there, if it is."""
        handler = handler_of(resource.kind)
        if handler is None:
            return Reason(LeftoverKind.NO_HANDLER, names=(resource.kind,))
        remaining = self._run.remaining()
        if remaining <= 0:
            return Reason(LeftoverKind.LATE)

        def on_retry(attempt: int, error: BaseException) -> None:
            self._run.report.retries += 1
            log_retry(f"handler of {resource.kind}", attempt, error)

        try:
            self._run.options.retry.run(
                lambda: handler.remove(plain(resource.kind, resource.payload)),
                is_transient=lambda error: isinstance(error, handler.retry_on),
                on_retry=on_retry,
                deadline=remaining,
            )
        except Exception as error:  # noqa: BLE001 -- a handler may raise anything; it is the resource's reason, and the manager raises from it
            self._run.fail(error)
            return Reason(LeftoverKind.HANDLER_FAILED, error)
        return None


def _unkeyed(name: TableName) -> RowKey:
    """All rows of a table without a primary key, as if they were one."""
    return RowKey(name, ())
