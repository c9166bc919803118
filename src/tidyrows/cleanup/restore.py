"""Put preserved rows back as they were, unless somebody else has changed them too.

Before the deletes, since a setting may reference a row that will be deleted; where a constraint
refuses that, after them.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.cleanup.reasons import LeftoverKind, Reason
from tidyrows.cleanup.report import Leftover, count_in
from tidyrows.dialects import Fault
from tidyrows.dialects.keys import run
from tidyrows.errors import SessionStateError, TidyRowsError
from tidyrows.tracking.preserved import is_same, same_value

if TYPE_CHECKING:
    from tidyrows.cleanup.connection import Database
    from tidyrows.cleanup.run import CleanupRun
    from tidyrows.tracking.preserved import PreservedRow, PreservedTable, State

_WRITES = 2
_SHOWN = 40
"""How many characters of a value an error shows."""


@dataclass(frozen=True, slots=True)
class _Row:
    database: Database
    table: PreservedTable
    key: Any
    preserved: PreservedRow


class _ConflictError(TidyRowsError):
    """Somebody else changed a row too."""


class PreservedRows:
    """One cleanup's work on preserved rows."""

    def __init__(self, run: CleanupRun) -> None:
        self._run = run
        self._preserved = run.tracker.preserved
        self._later: list[tuple[_Row, Exception | None]] = []  # what no try has refused yet: None
        self._leftovers: list[Leftover] = []

    def before_deletes(self) -> None:
        """Put back what no constraint keeps from it."""
        for table in self._preserved.tables():
            self._try_all(self._changed(table))

    def after_deletes(self) -> list[Leftover]:
        """Put back what a constraint refused; returns the rows that are not as they were."""
        # A row may need another one that comes after it: go on while any succeeds.
        waiting = self._later
        while waiting:
            self._later = []
            self._try_all([row for row, _error in waiting])
            if len(self._later) == len(waiting):
                self._leftovers += [_leftover(row, error) for row, error in self._later]
                break
            waiting = self._later
        return self._leftovers

    def _changed(self, table: PreservedTable) -> list[_Row]:
        """The rows that are not as they were; those that are, are forgotten."""
        database = self._run.database(table.table.name.database)
        keys = list(table.rows)

        def look() -> dict[Any, tuple[Any, ...]]:
            with database.reading() as connection:
                return table.read(connection, keys)

        try:
            now = self._run.retry(database, look)
        except SessionStateError as error:
            self._run.refuse(error)
            return []
        except Exception as error:  # noqa: BLE001 -- a project's own column type may raise anything; it is the rows' reason
            self._run.fail(error)
            self._leftovers += [
                _leftover(_Row(database, table, *pair), error) for pair in list(table.rows.items())
            ]
            return []
        changed = []
        # deleted, and inserted again by the test: that row goes first
        held = set(self._run.tracker.held_keys(table.table.name, keys))
        for key, preserved in list(table.rows.items()):
            if key in held:
                self._later.append((_Row(database, table, key, preserved), None))
            elif is_same(now.get(key), preserved.original):
                self._preserved.forget(table, [key])
            else:
                changed.append(_Row(database, table, key, preserved))
        return changed

    def _try_all(self, rows: list[_Row]) -> None:
        """Put rows back, each in its own transaction."""
        for row in rows:
            try:
                written = self._run.retry(row.database, partial(_put_back, row))
            except SessionStateError as error:
                self._run.refuse(error)
            except _ConflictError as error:
                self._leftovers.append(_leftover(row, error))
            except Exception as error:  # noqa: BLE001 -- as above
                if row.database.dialect.fault(error) is Fault.CONSTRAINT:
                    self._later.append((row, error))
                else:
                    self._run.fail(error)
                    self._leftovers.append(_leftover(row, error))
            else:
                count_in(self._run.report.restored, row.table.table.name, int(written))
                self._preserved.forget(row.table, [row.key])


def _put_back(row: _Row) -> bool:
    """Compare the row under its lock and write what differs; whether anything did."""
    table, original = row.table, row.preserved.original
    with row.database.writing() as connection:
        # by one key one row, even if its key is spelled otherwise now
        now = next(iter(table.read(connection, [row.key], lock=True).values()), None)
        if is_same(now, original):
            return False
        _refuse_conflict(row, now)
        left: State = now
        # twice: what the database itself sets at an UPDATE is set back by the next
        for _attempt in range(_WRITES):
            _write(connection, row, left)
            left = next(iter(table.read(connection, [row.key]).values()), None)
            if is_same(left, original):
                return True
        if left is None or not _is_written_by_database(original, now, left):
            raise _ConflictError(
                f"it was written back, but {_difference(table, original, left)}: a trigger, a "
                f"rule or row-level security keeps it so. Put it back yourself, then call "
                f"cleanup() again"
            )
        return True


def _write(connection: sa.Connection, row: _Row, now: State) -> None:
    """Insert the row, or update the columns that differ."""
    table, original = row.table, row.preserved.original
    clause = _clause(table)
    old = {
        column.name: sa.null() if value is None else value
        for column, value in zip(table.columns, original, strict=True)
    }
    if now is None:
        row.database.dialect.insert_exactly(connection, clause, old, always=table.always)
        return
    differing = {
        column.name: old[column.name]
        for column, one, other in zip(table.columns, original, now, strict=True)
        if not same_value(one, other)
    }
    key = row.key if len(table.table.key_clauses) > 1 else (row.key,)
    # SQLAlchemy names the bind of a condition on id as that of a value for id_1, and then refuses.
    conditions = [
        clause.c[column.name] == sa.bindparam("tidyrows_key", value, type_=column.type, unique=True)
        for column, value in zip(table.table.key_clauses, key, strict=True)
    ]
    run(connection, sa.update(clause).where(*conditions).values(differing))


def _is_written_by_database(original: State, now: State, left: State) -> bool:
    """Whether the database itself writes all that differs: the time of the last change, say."""
    if original is None or left is None:
        return original is left
    before = left if now is None else now  # a row that was gone had no values to keep
    return all(
        isinstance(old, dt.date | dt.time) or not same_value(new, after)
        for old, new, after in zip(original, before, left, strict=True)
        if not same_value(old, after)
    )


def _refuse_conflict(row: _Row, now: State) -> None:
    preserved = row.preserved
    own = any(is_same(now, state) for state in preserved.own_states)
    if not preserved.contested and (own or not (preserved.own_states or preserved.other_writer)):
        return
    writer = preserved.other_writer or "somebody else"
    raise _ConflictError(
        f"{_difference(row.table, preserved.original, now)}; {writer} changed this row too; it was "
        f"left as it is. Put the remembered values back yourself once nobody needs the others, "
        f"then call cleanup() again"
    )


def _difference(table: PreservedTable, original: State, now: State) -> str:
    if now is None or original is None:
        return "it was remembered and is not there now"
    return ", ".join(
        f"{column.name} was {_short(old)} and is {_short(new)} now"
        for column, old, new in zip(table.columns, original, now, strict=True)
        if not same_value(old, new)
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _clause(table: PreservedTable) -> sa.TableClause:
    """The table with every column that is remembered, and no defaults."""
    columns = [sa.column(column.name, column.type) for column in table.columns]
    schema = sa.quoted_name(table.table.name.schema, quote=None)
    return sa.table(table.table.name.name, *columns, schema=schema)


def _leftover(row: _Row, error: Exception | None) -> Leftover:
    table = row.table.table
    changed = isinstance(error, _ConflictError)
    kind = LeftoverKind.CHANGED if changed else LeftoverKind.NOT_RESTORED
    return Leftover(table.name, table.row(row.key), Reason(kind, error))
