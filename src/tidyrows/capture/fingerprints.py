"""Take fingerprints from statements, as they go to the driver."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from tidyrows.capture.changes import Updated
from tidyrows.capture.digests import UNCOMPARED, Layout, Patch, Plan, Prints, digest
from tidyrows.capture.where_clause import matched_keys

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import sqlalchemy as sa

    from tidyrows.keys import KeyedTable
    from tidyrows.worker import WorkerContext


class Recorder:
    """Takes fingerprints of the rows that are written through one engine."""

    def __init__(self) -> None:
        self._layouts: weakref.WeakKeyDictionary[KeyedTable, Layout] = weakref.WeakKeyDictionary()
        self._plans: weakref.WeakKeyDictionary[Any, Plan] = weakref.WeakKeyDictionary()
        self._tag: tuple[WorkerContext | None, str] = (None, "")

    def inserted(
        self,
        insert: sa.Insert,
        context: Any,
        target: KeyedTable,
        keys: Sequence[tuple[Any, ...]],
        whose: WorkerContext,
    ) -> Prints | None:
        """What an INSERT put into these rows; None where nothing can be compared, or nobody knows.

        Args:
            insert: the statement.
            context: its execution.
            target: its table.
            keys: the keys of its rows, in the order of its parameters.
            whose: whose tag makes a value our own.
        """
        layout = self._layout(target, context.dialect)
        compiled, rows = context.compiled, context.parameters
        pairs: list[tuple[Plan, Any]]
        if insert._multi_values:
            count = sum(map(len, insert._multi_values))
            plans = [self._plan(compiled, layout, number) for number in range(count)]
            pairs = [(plan, rows[0]) for plan in plans]
        else:
            known = self._plans.get(compiled)
            if known is None:
                known = self._plans[compiled] = self._plan(compiled, layout)
            if not known:
                return None
            pairs = [(known, row) for row in rows]
        if len(pairs) != len(keys) or not (len(keys) == 1 or _in_order(context, target, keys)):
            return None
        return Prints(layout, pairs, self._tag_of(whose))

    def updated(self, update: sa.Update, context: Any, target: KeyedTable) -> Updated | None:
        """What an UPDATE set: in the rows that it names, else in any row of the table."""
        compiled = context.compiled
        layout = self._layout(target, context.dialect)
        given = context.compiled_parameters[0] if context.compiled_parameters else {}
        computed = _computed(compiled)
        changed = {name for name in layout.places if name in given or name in computed}
        if not changed or context.rowcount == 0:
            return None
        loose: Patch = {layout.names[layout.places[name]]: UNCOMPARED for name in changed}
        keys = matched_keys(update, context, target)
        if keys is None:
            return Updated(target, patches=[loose])
        patches = [loose] * len(keys)
        if len(keys) == len(context.parameters):
            plan = [
                (position, layout.names[place])
                for position, place in self._plan(compiled, layout)
                if layout.names[place] in loose
            ]
            patches = [
                loose | {name: digest(row[position]) for position, name in plan}
                for row in context.parameters
            ]
        stored = [key[0] for key in keys] if len(target.key_columns) == 1 else list(keys)
        certain = context.rowcount == len(keys)
        return Updated(target, stored, patches, certain=certain)

    def _layout(self, target: KeyedTable, dialect: sa.Dialect) -> Layout:
        layout = self._layouts.get(target)
        if layout is None:
            layout = self._layouts[target] = Layout.of(target.table, dialect)
        return layout

    def _plan(self, compiled: Any, layout: Layout, number: int | None = None) -> Plan:
        """Where the parameters of a statement stand, or those of one row of several VALUES."""
        bound: Mapping[str, Any]
        if compiled.positiontup is not None:
            bound = {name: position for position, name in enumerate(compiled.positiontup)}
        else:
            escaped = compiled.escaped_bind_names
            bound = {name: escaped.get(name, name) for name in compiled.bind_names.values()}
        plan = []
        for name, place in layout.places.items():
            spelled = name
            if number is not None and (number or f"{name}_m0" in bound):
                spelled = f"{name}_m{number}"
            if spelled in bound:
                plan.append((bound[spelled], place))
        return plan

    def _tag_of(self, whose: WorkerContext) -> str:
        known, tag = self._tag
        if known is not whose:
            tag = whose.tag
            self._tag = (whose, tag)
        return tag


def _computed(compiled: Any) -> set[str]:
    """The names of what an UPDATE sets to something else than a plain value."""
    statement = compiled.statement
    given = list(statement._values or ())
    # SQLAlchemy 2.0 keeps those of ordered_values() apart
    given += [pair[0] for pair in getattr(statement, "_ordered_values", None) or ()]
    given += [*compiled.postfetch, *compiled.update_prefetch]
    return {getattr(column, "key", column) for column in given}


def _in_order(context: Any, target: KeyedTable, keys: Sequence[tuple[Any, ...]]) -> bool:
    """Whether the keys that a statement was given, if any, are those of its rows, in order."""
    if not context.compiled_parameters:
        return not keys
    given = [
        (place, name)
        for place, name in enumerate(target.key_names)
        if name in context.compiled_parameters[0]
    ]
    if len(keys) != len(context.compiled_parameters):
        return True  # several VALUES: one set of parameters has them all
    return all(
        key[place] == parameters.get(name)
        for place, name in given
        for key, parameters in zip(keys, context.compiled_parameters, strict=True)
        if parameters.get(name) is not None
    )
