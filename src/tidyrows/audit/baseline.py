"""A database as it was when the audit met it, and what is different now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tidyrows.audit.tables import listed_keys

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from tidyrows.audit.tables import Key, WatchedTable
    from tidyrows.keys import TableName


@dataclass(frozen=True, slots=True)
class DatabaseChange:
    """What the cleanup after a run could not put back.

    Attributes:
        text: what it is.
        is_setup: an empty table that was made outside of any test; each run begins with that.
    """

    text: str
    is_setup: bool = False


@dataclass(frozen=True, slots=True)
class TableState:
    """One table: all rows of a small one, of a large one how many there are."""

    columns: tuple[str, ...]
    keyless: bool
    count: int
    rows: dict[Key, int] | None

    @classmethod
    def of(cls, table: WatchedTable, count: int) -> TableState:
        """The state of a table that was just read."""
        rows = None if table.is_large else dict(table.rows)
        return cls(table.columns, not table.key, count if rows is None else len(rows), rows)


Baseline = dict["TableName", TableState]


def changes(
    before: Baseline, now: Baseline, of_tests: Collection[TableName]
) -> Iterator[DatabaseChange]:
    """What is different; ``of_tests`` are the tables that tests have made."""
    for name, state in now.items():
        old = before.get(name)
        if old is None:
            rows = f" with {state.count} row(s)" if state.count else ""
            is_setup = not state.count and name not in of_tests
            yield DatabaseChange(f"the table {name} was made{rows}", is_setup)
        elif old.columns != state.columns:
            yield DatabaseChange(f"the table {name} has other columns")
        else:
            yield from _row_changes(str(name), old, state)
    for name in before.keys() - now.keys():
        yield DatabaseChange(f"the table {name} is gone")


def _row_changes(name: str, old: TableState, state: TableState) -> Iterator[DatabaseChange]:
    if old.rows is None or state.rows is None:
        if old.count != state.count:
            yield DatabaseChange(f"{name} has {state.count} rows, and had {old.count}")
        return
    both = old.rows.keys() & state.rows.keys()
    kinds: dict[str, Iterable[Key]] = {
        "was not there": state.rows.keys() - old.rows.keys(),
        "is gone": old.rows.keys() - state.rows.keys(),
        "has changed": [key for key in both if old.rows[key] != state.rows[key]],
    }
    for what, found in kinds.items():
        keys = list(found)
        if keys:
            named = "" if state.keyless else listed_keys(keys)
            plural = what.replace("was", "were").replace("is ", "are ").replace("has", "have")
            yield DatabaseChange(
                f"{len(keys)} row{'s' * (len(keys) > 1)} of {name}{named} "
                f"{what if len(keys) == 1 else plural}"
            )
