"""Roles *statements* and *inserts*: delete, find, lock and verify rows by key; prove inserts."""

from __future__ import annotations

import re
from enum import Enum, auto
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import sqlalchemy as sa

from tidyrows.dialects.driver import DriverAccess
from tidyrows.dialects.keyless_rows import stored_type
from tidyrows.dialects.keys import (
    RowsByKey,
    as_sent,
    chunks,
    delete_plainly,
    driver_values,
    find_plainly,
    integer_runs,
    keys_found,
    marked_condition,
    plain_chunks,
    plain_condition,
    positions_of_bits,
    quoted_names,
    run,
    select_bits,
    typed_rows,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tidyrows.dialects.catalogue import RealTable
    from tidyrows.dialects.keys import RowsByKey, Select
    from tidyrows.keys import KeyedTable

_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
# Prefixes of an INSERT after which it still inserts its row or fails.
_HARMLESS = frozenset({"", "LOW_PRIORITY", "HIGH_PRIORITY", "DELAYED", "OR ABORT", "OR ROLLBACK"})

Proof: TypeAlias = "tuple[bool, sa.ColumnElement[bool] | None]"
"""``(False, None)``: nothing is proved, so no row is tracked. ``(True, None)``: RETURNING yields
exactly the rows that were inserted. ``(True, column)``: the rows where this column, added to
RETURNING, is true."""


class Inserts(DriverAccess):
    """INSERT statements, and the keys that the database generates for them."""

    counts_when_closed: bool = True
    """Whether a cursor still has its row count once SQLAlchemy has closed it."""
    returned_table: Callable[[Any], Callable[[int], int]] | None = None
    """Of a cursor with rows of RETURNING: what tells of a column, by its number, the number with
    which incarnations of its table begin."""
    reuses_keys: ClassVar[bool] = True
    """Whether a generated key may come again after its row is gone."""
    explicit_zero_is_generated: ClassVar[bool] = False
    """Whether a key 0 in an INSERT is replaced by the next number."""
    may_alter_keys: ClassVar[bool] = True
    """Whether RETURNING may tell another key than was sent."""
    rounded_types: ClassVar[tuple[type, ...]] = (
        sa.Numeric,
        sa.Float,
        sa.Date,  # of a datetime
        sa.DateTime,
        sa.Time,
    )
    """Types of columns that may store another value than was sent."""

    @property
    def returning(self) -> bool:
        """Whether INSERT has RETURNING (known after the engine's first connect)."""
        return bool(getattr(self._dialect(), "insert_returning", False))

    @property
    def executemany_returning(self) -> bool:
        """Whether INSERT of many rows has RETURNING (known after the engine's first connect)."""
        return bool(getattr(self._dialect(), "insert_executemany_returning", False))

    def delete_returning(self, *, several_tables: bool) -> bool:
        """Whether DELETE has RETURNING, also where its condition reads other tables."""
        flag = "delete_returning_multifrom" if several_tables else "delete_returning"
        return bool(getattr(self._dialect(), flag, False))

    def rounds_keys(self, table: KeyedTable) -> bool:
        """Whether a key column may store another value than was sent, by its type."""
        dialect = self._dialect()
        kinds = (stored_type(column, dialect) for column in table.key_columns)
        return any(isinstance(kind, self.rounded_types) for kind in kinds)

    def read_key(self, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
        """What to read of a key column so that the row is found by it; usually the column."""
        return column

    def reads_as_sent(self, column: sa.Column[Any]) -> bool:
        """Whether the driver reads of a column, without its type, what was sent to it."""
        kind = stored_type(column, self._dialect())
        exact = isinstance(kind, (sa.Integer, sa.Boolean, sa.Date, sa.String))
        return exact and not isinstance(kind, sa.CHAR)  # which is filled up with spaces

    def may_reuse_key(self, connection: sa.Connection, table: KeyedTable, highest: int) -> bool:
        """Whether a number up to ``highest`` that was generated once may be generated again."""
        return self.reuses_keys

    def upsert(self, insert: sa.Insert) -> bool:
        """Whether this INSERT may leave out a row, or change one that was there before."""
        return self._post_values(insert) is not None or bool(self._prefixes(insert))

    def inserted_proof(self, insert: sa.Insert, real: RealTable) -> Proof:
        """How an upsert proves which rows it inserted (see ``Proof``); the default: not at all."""
        return False, None

    def _post_values(self, insert: sa.Insert) -> str | None:
        clause = getattr(insert, "_post_values_clause", None)
        return None if clause is None else str(clause.__visit_name__)

    def _prefixes(self, insert: sa.Insert) -> frozenset[str]:
        """The prefixes that this database would see and that are not known to be harmless."""
        found = set()
        for prefix, only in getattr(insert, "_prefixes", ()):
            if only in {None, "*", getattr(self._dialect(), "name", None)}:
                found.add(" ".join(_COMMENT.sub(" ", str(prefix)).upper().split()))
        return frozenset(found - _HARMLESS)


_PROBES = 100
"""How many tables one statement asks."""
_MANY = 500
"""Keys from which one look at their whole range comes first."""
_INT64 = 2**63
KeysByTable: TypeAlias = "Sequence[tuple[KeyedTable, Sequence[Any]]]"


class CycleForm(Enum):
    """How the rows of a foreign-key cycle are deleted."""

    ONE_STATEMENT = auto()
    """``delete_cycle`` deletes them in one statement."""
    DEFERRED = auto()
    """``delete_cycle`` deletes one table after another; a violation is raised at COMMIT."""
    LEVELS = auto()
    """One level of rows after another with ``delete_by_keys``; ``delete_cycle`` is not used."""


class Statements(DriverAccess):
    """Statements by key, for the cleanup's own transaction.

    The defaults are SQLAlchemy's own statements (IN, or OR of ANDs), right on every database. All
    tables are fully qualified; keys come in the one global order.
    """

    cycle_form: ClassVar[CycleForm] = CycleForm.LEVELS
    probed_together: ClassVar[int] = 20
    """Up to how many keys all tables that may reference them are asked in one statement."""
    verified_at_once: ClassVar[int] = 50_000
    """How many keys of one table are verified at once."""
    verified_together: ClassVar[int] = 100
    """Up to how many keys several tables are verified in one statement."""

    # ----- changes

    guards_deletes: ClassVar[bool] = False
    """Whether ``delete_by_keys`` takes ``guard``, and :meth:`guard` makes one."""

    def guard(self, incarnation: str, highest: int) -> str:
        """SQL for "the table is in this incarnation", as ``Catalogue.incarnations`` tells it."""
        return ""

    def delete_by_keys(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any], guard: str = ""
    ) -> int:
        """Delete the rows of these keys, in the order given; the number of rows deleted.

        No row where the guard, if any, is false: SQL that is true or false for the whole table.
        """
        runs = integer_runs(table, keys)
        guards = None if runs is None else self.guards_of_range(connection, table)
        if runs is not None and guards is not None:
            delete, column = sa.delete(table.clause).where(*guards), table.key_clauses[0]
            if guard:
                delete = delete.where(sa.text(guard))
            ranges = (delete.where(column.between(*each)) for each in runs)
            return sum(run(connection, each).rowcount for each in ranges)
        parts = self.rows_by_key(connection, table, keys)
        if parts is None:
            return delete_plainly(connection, table, keys, guard)
        tail = f" AND {guard}" if guard else ""
        deleted = 0
        for rows in parts:
            deleted += self._run(connection, f"DELETE FROM {rows.delete}{tail}", rows.sent).rowcount
        return deleted

    def delete_cycle(self, connection: sa.Connection, batch: KeysByTable) -> list[int]:
        """Delete rows whose tables, or table, form a cycle; counts in the order given.

        Where ``cycle_form`` is LEVELS, this is no more than one delete after another.
        """
        return [self.delete_by_keys(connection, table, keys) for table, keys in batch]

    def set_null(
        self,
        connection: sa.Connection,
        table: KeyedTable,
        keys: Sequence[Any],
        names: Sequence[str],
    ) -> None:
        """Set these columns of the rows to NULL."""
        update = sa.update(table.clause).values({table.clause.c[name]: sa.null() for name in names})
        for part in plain_chunks(table, keys):
            run(connection, update.where(plain_condition(table, part)))

    def insert_exactly(
        self,
        connection: sa.Connection,
        table: sa.TableClause,
        values: Mapping[str, Any],
        *,
        always: bool,
    ) -> None:
        """Insert one row with exactly these values, those of generated keys too.

        Args:
            connection: in the cleanup's transaction.
            table: fully qualified, with the columns' types.
            values: by column; all that can be written.
            always: a key is GENERATED ALWAYS: the database would replace the value.
        """
        run(connection, sa.insert(table).values(values))

    # ----- looking, with or without a lock

    def find(
        self,
        connection: sa.Connection,
        table: KeyedTable,
        keys: Sequence[Any],
        columns: Sequence[sa.ColumnElement[Any]],
        *,
        lock: bool = False,
        first: bool = False,
    ) -> list[tuple[Any, ...]]:
        """Columns of the rows of these keys, in as few statements as the database allows.

        Args:
            connection: in the cleanup's transaction.
            table: its "primary key" may be any columns, unique or not.
            keys: the values to look for.
            columns: of the table's clause, as Python values of their types.
            lock: lock the rows against change; a row that is changed during the wait is read as it
                is afterwards.
            first: any one row is enough.
        """
        raw = all(column.type.column_expression(column) is None for column in columns)
        parts = self.rows_by_key(connection, table, keys) if raw else None
        if parts is None:
            return find_plainly(connection, table, keys, columns, lock=lock, first=first)
        quote = connection.dialect.identifier_preparer.quote
        place, _names = quoted_names(connection.dialect, table)
        listed = ", ".join(f"{place}.{quote(str(column.key))}" for column in columns)
        tail = (" LIMIT 1" if first else "") + (self._for_update if lock else "")
        found: list[tuple[Any, ...]] = []
        for rows in parts:
            result = self._run(connection, f"SELECT {listed} FROM {rows.select}{tail}", rows.sent)
            found += typed_rows(result, columns, connection.dialect)
            if first and found:
                break
        return found

    def lock(self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]) -> None:
        """Lock the rows of these keys against change, and against new rows that reference them."""
        parts = self.rows_by_key(connection, table, keys)
        if parts is None:
            find_plainly(connection, table, keys, table.key_clauses, lock=True)
            return
        for rows in parts:
            self._run(connection, self._count_locked.format(rows.select), rows.sent).one()

    def tables_with_rows(self, connection: sa.Connection, tables: KeysByTable) -> list[int]:
        """Which of these tables hold a row of one of their keys: positions in ``tables``."""
        found: set[int] = set()
        together: list[tuple[int, Select]] = []
        mark = "?" if connection.dialect.paramstyle == "qmark" else "%s"
        for number, (table, keys) in enumerate(tables):
            few = len(keys) <= self.probed_together
            values = driver_values(table, connection.dialect, keys) if few else None
            if values is not None and keys:
                place, names = quoted_names(connection.dialect, table)
                condition = marked_condition(names, len(keys), mark)
                select = f"SELECT 1 FROM {place} WHERE {condition}"
                sent = tuple(chain.from_iterable(zip(*values, strict=True)))
                together.append((number, (select, sent)))
            elif keys and self.find(connection, table, keys, table.key_clauses, first=True):
                found.add(number)
        return sorted(found | self._which_find(connection, together))

    def _which_find(
        self, connection: sa.Connection, selects: Sequence[tuple[int, Select]]
    ) -> set[int]:
        """The numbers of the SELECTs that find a row; one statement asks for many."""
        found: set[int] = set()
        for part in chunks(selects, _PROBES):
            sql = select_bits([select for _number, (select, _sent) in part])
            sent = chain.from_iterable(sent for _number, (_select, sent) in part)
            (row,) = self._execute(connection, sql, *sent)
            found |= {part[at][0] for at in positions_of_bits(row)}
        return found

    # ----- how a dialect makes the statements above faster than SQLAlchemy's own

    _for_update: ClassVar[str] = " FOR UPDATE"
    _count_locked: ClassVar[str] = "SELECT COUNT(*) FROM {} FOR UPDATE"
    """SQL that locks the rows of ``RowsByKey.select`` and sends one number."""

    def rows_by_key(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> Sequence[RowsByKey] | None:
        """SQL text that names the rows of these keys, in parts that the database handles well.

        None: SQLAlchemy's own statements.
        """
        return None

    def guards_of_range(
        self, connection: sa.Connection, table: KeyedTable
    ) -> Sequence[sa.ColumnElement[bool]] | None:
        """What limits BETWEEN two integer keys to integers; None: no BETWEEN."""
        return None

    # ----- verification, which shares nothing with the statements above: it must see their faults

    def existing_keys(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> list[Any]:
        """Which of these keys still name a row, by the database's own comparison."""
        (types,) = self.verification_types(connection, [table])

        def look(few: Sequence[Any]) -> tuple[Sequence[Any], list[Any]]:
            values = driver_values(table, connection.dialect, few)
            if values is None:
                return few, find_plainly(connection, table, few, table.key_clauses)
            sent = as_sent(values)
            if len(few) >= _MANY and self._range_is_empty(connection, table, types, values):
                return sent, []
            selects = self.select_keys(connection, table, types, sent)
            if selects is None:
                return few, find_plainly(connection, table, few, table.key_clauses)
            return sent, [
                row for each in selects for row in self._execute(connection, each[0], *each[1])
            ]

        found: list[Any] = []
        for part in chunks(keys, self.verified_at_once):
            found += keys_found(part, look)
        return found

    def existing_keys_of_each(
        self, connection: sa.Connection, tables: KeysByTable
    ) -> list[list[Any]]:
        """``existing_keys`` of several tables, in their order.

        Usually no row is left in any of them, so one statement asks for many tables first.
        """
        if len(tables) == 1:
            return [self.existing_keys(connection, *tables[0])]
        few = [
            n for n, (_table, keys) in enumerate(tables) if 0 < len(keys) <= self.verified_together
        ]
        known = self.verification_types(connection, [tables[n][0] for n in few])
        closer = {n for n, (_table, keys) in enumerate(tables) if keys}
        together: list[tuple[int, Select]] = []
        for number, types in zip(few, known, strict=True):
            table, keys = tables[number]
            values = driver_values(table, connection.dialect, keys)
            if values is None:
                continue
            selects = self.select_keys(connection, table, types, as_sent(values))
            if selects is not None:
                together += [(number, each) for each in selects]
                closer.discard(number)
        closer |= self._which_find(connection, together)
        return [
            self.existing_keys(connection, table, keys) if number in closer else []
            for number, (table, keys) in enumerate(tables)
        ]

    def _range_is_empty(
        self, connection: sa.Connection, table: KeyedTable, types: Any, values: list[list[Any]]
    ) -> bool:
        """Whether no row at all has a key from the least to the greatest of many integers."""
        if len(values) > 1 or set(map(type, values[0])) != {int}:
            return False
        least, greatest = min(values[0]), max(values[0])
        if not -_INT64 <= least <= greatest < _INT64:
            return False
        if not self.holds_integers(connection, table, types):
            return False
        place, (name,) = quoted_names(connection.dialect, table)
        rows = f"SELECT 1 FROM {place} WHERE {name} BETWEEN {least} AND {greatest}"
        ((any_row,),) = self._execute(connection, f"SELECT EXISTS({rows})")
        return not any_row

    def holds_integers(self, connection: sa.Connection, table: KeyedTable, types: Any) -> bool:
        """Whether the one key column is of an integer type, by the catalogue."""
        return False

    def verification_types(
        self, connection: sa.Connection, tables: Sequence[KeyedTable]
    ) -> list[Any]:
        """For each table, what ``select_keys`` must know of its key columns."""
        return [None] * len(tables)

    def select_keys(
        self, connection: sa.Connection, table: KeyedTable, types: Any, sent: Sequence[Any]
    ) -> Sequence[Select] | None:
        """SELECTs that find these keys: driver values, as one scalar or tuple per key.

        None where that would not be exact: SQLAlchemy's own statements then look.
        """
        return None
