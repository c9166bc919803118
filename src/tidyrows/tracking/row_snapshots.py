"""Rows of others as they were, and what has been made of them since."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.dialects.keys import plain_chunks, plain_condition
from tidyrows.execution import INTERNAL

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tidyrows.keys import KeyedTable

State = tuple[Any, ...] | None
"""The values of a row, column by column; None where there is no row."""
_OURS = {"schema_translate_map": None, INTERNAL: True}  # real names, and nobody's business


@dataclass(slots=True, eq=False)
class PreservedRow:
    """One row.

    Attributes:
        then: how it was.
        ours: what committed statements of the tracker have made of it, newest last.
        contested: somebody else changed it after the tracker did.
        other: who else changed it in this process, if anybody did.
    """

    then: tuple[Any, ...]
    ours: list[State] = field(default_factory=list)
    contested: bool = False
    other: str | None = None


@dataclass(slots=True, eq=False)
class PreservedTable:
    """Rows of one table.

    Attributes:
        table: the real table.
        columns: what is remembered: every column that can be written.
        always: the database insists on making a value of one of them (GENERATED ALWAYS).
        rows: by key.
    """

    table: KeyedTable
    columns: tuple[sa.ColumnClause[Any], ...]
    always: bool
    rows: dict[Any, PreservedRow] = field(default_factory=dict)

    def read(
        self, connection: sa.Connection, keys: Sequence[Any], *, lock: bool = False
    ) -> dict[Any, tuple[Any, ...]]:
        """How the rows of these keys are now, by key."""
        wanted = [*self.table.key_clauses, *self.columns]
        width = len(self.table.key_clauses)
        states: dict[Any, tuple[Any, ...]] = {}
        for part in plain_chunks(self.table, keys):
            statement = sa.select(*wanted).where(plain_condition(self.table, part))
            if lock:
                statement = statement.with_for_update()
            for row in connection.execute(statement, execution_options=_OURS):
                key = tuple(row[:width])
                states[key[0] if width == 1 else key] = tuple(row[width:])
        return states


def is_same(one: State, other: State) -> bool:
    """Whether two states of a row are equal."""
    if one is None or other is None:
        return one is other
    return all(map(same_value, one, other))


def same_value(one: Any, other: Any) -> bool:
    """Whether two values of a column are equal; NaN is NaN."""
    try:
        return bool(one == other or (one != one and other != other))  # noqa: PLR0124 -- only NaN does so
    except Exception:  # noqa: BLE001 -- a project's own type may raise anything (arrays have no truth)
        return repr(one) == repr(other)


def each_row(table: PreservedTable) -> Iterator[tuple[Any, PreservedRow]]:
    """The rows of a table, also while they are forgotten one by one."""
    yield from list(table.rows.items())
