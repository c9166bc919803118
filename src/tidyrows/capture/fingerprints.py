"""Hashes of inserted rows whose key may come again: one that was given; on SQLite any.

A hash is of the values as the driver sends and reads them, and it is the same in every process.
SQLite stores the text '5' as a number in a column of numbers, and the number 5 as a text in a
column of texts: so numbers, and texts that read as numbers, are hashed in one common form.
"""

from __future__ import annotations

import datetime as dt
import weakref
from array import array
from itertools import repeat
from marshal import dumps
from operator import itemgetter
from typing import TYPE_CHECKING, Any
from zlib import crc32

import sqlalchemy as sa

from tidyrows.capture.affected_rows import matched_keys
from tidyrows.capture.changes import INTERNAL, Hashes, Shape, Updated
from tidyrows.capture.compared_columns import ComparedColumns
from tidyrows.capture.returning import computed_names
from tidyrows.dialects.keys import own_keys, plain_chunks, plain_condition

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tidyrows.dialects import Dialect, RealTable
    from tidyrows.keys import KeyedTable
    from tidyrows.worker import WorkerContext

HASH = "Q"
"""The array type of hashes: 64 bits."""
NEVER = 2**64 - 1
"""A hash that stands for values that are not known: no row is compared as equal."""
VALUES = 2**32 - 1
"""The bits of a hash that are of the values; the others are of the nullable references."""
_AFTER_NUMBERS = ":"  # sorts after all texts that SQLite may read as numbers
_INTEGERS = 2**63
_READING = {"schema_translate_map": None, INTERNAL: True}
_FORMAT = 0  # of marshal: the only one that depends on the values alone


class Recorder:
    """Hashes the rows that are written through one engine."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._columns: weakref.WeakKeyDictionary[KeyedTable, ComparedColumns]
        self._columns = weakref.WeakKeyDictionary()
        self._ambiguous: weakref.WeakKeyDictionary[KeyedTable, bool] = weakref.WeakKeyDictionary()
        self._places: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()

    def inserted(
        self,
        connection: sa.Connection,
        context: Any,
        found: tuple[KeyedTable, RealTable],
        keys: Sequence[Any],
        inserter: WorkerContext,
        *,
        generated: bool,
    ) -> Callable[[], Hashes | None] | None:
        """Returns the hashes of inserted rows; None where their keys cannot come again.

        None, too, where keys were given and nothing else, as of an association, which is known by
        what it references. Where all rows have a value that no other row can have, that column
        alone is hashed; where their keys were given, that or the longest text, and more of the
        rest, one of which is enough: the application may change the others. Where the statement
        does not tell the values, or a trigger may change them, the rows are read back. Of a key
        that names several rows of the database all values are hashed.

        Most suites roll back: a single row is not hashed before that is asked for, if the statement
        tells a value that nobody can change in place until then.
        """
        target, real = found
        columns = self._columns_of(target, context.dialect)
        if not generated and not (
            columns.names and self._may_come_again(context, found, columns, keys, inserter.tag)
        ):
            return None
        strict = generated or self._is_ambiguous(connection, target)
        altered = real.alters_keys and real.returns and self._dialect.may_alter_keys
        is_one = len(keys) == 1 and len(context.parameters) == 1
        if is_one and not columns.mutable and not altered:
            row, places = context.parameters[0], self._places.get(context.compiled) or {}
            for place in places.values():
                if type(row[place]) in _KINDS:
                    return _Sent(self, context, target, keys, inserter, strict).hashes
        told = context, target, keys, inserter.tag
        hashes = self.sent(*told, strict=strict)
        if hashes is None and self._dialect.reuses_keys:
            hashes = self._read(connection, context, target, keys, generated=generated)
        if hashes is not None and altered:
            stored = read_hashes(connection, target, keys, hashes.shape)
            pairs = zip(hashes.values, stored.values, strict=True)
            # a row that is not found by its key, such as a REAL, is known as it was sent
            values = array(HASH, [sent if now == NEVER else now for sent, now in pairs])
            hashes = Hashes(hashes.shape, values)
        return None if hashes is None else hashes.read

    def _may_come_again(
        self,
        context: Any,
        found: tuple[KeyedTable, RealTable],
        columns: ComparedColumns,
        keys: Sequence[Any],
        tag: str,
    ) -> bool:
        """Whether somebody else may give a row one of these keys, which were not generated."""
        target, real = found
        if not self._dialect.reuses_keys:
            given = context.compiled_parameters[0] if context.compiled_parameters else {}
            if real.kind != "table":
                return False
            for name in target.key_names:
                if given.get(name) is None and given.get(f"{name}_m0") is None:
                    return False
        made = {id(each) for each in context.compiled.insert_prefetch if each.default.is_callable}
        places = [at for at, each in enumerate(target.table.primary_key) if id(each) in made]
        for key in keys:  # noqa: SIM110 -- a generator is a call
            if not columns.is_proof(key, tag, places):
                return True
        return False

    def _is_ambiguous(self, connection: sa.Connection, target: KeyedTable) -> bool:
        """Whether the database lets several rows have one key, as where it is a part of a key."""
        known = self._ambiguous.get(target)
        if known is None:
            known = not self._dialect.tables_of_unique_key(connection, [target])
            self._ambiguous[target] = known
        return known

    def _read(
        self,
        connection: sa.Connection,
        context: Any,
        target: KeyedTable,
        keys: Sequence[Any],
        *,
        generated: bool,
    ) -> Hashes | None:
        """The hashes of rows whose values the statement did not tell."""
        given: Any = context.compiled_parameters[0] if context.compiled_parameters else {}
        if not generated and given.keys() >= {*target.key_names}:
            return None
        columns = self._columns_of(target, context.dialect)
        shape = columns.shape(tuple(columns.names.values()))
        return read_hashes(connection, target, keys, shape)

    def sent(
        self, context: Any, target: KeyedTable, keys: Sequence[Any], tag: str, *, strict: bool
    ) -> Hashes | None:
        """The hashes of the values that a statement was given: ``strict`` where all must agree."""
        columns = self._columns_of(target, context.dialect)
        given = self._values(context, columns)
        count = len(next(iter(given.values()), ()))
        if count != len(keys) or not (count == 1 or _in_order(context, target, keys)):
            return None
        shape = columns.telling(given, tag, strict=strict)
        if shape is not None:
            given = {name: given[name] for name in shape.columns}
        forms = {name: common_form(values) for name, values in given.items()}
        names = tuple([name for name in forms if forms[name] is not None])
        if shape is None or names != shape.columns:
            shape = columns.shape(names)
        if not shape.columns:
            return None
        return Hashes(shape, hash_rows(shape, [forms[name] for name in shape.columns]))

    def updated(  # noqa: PLR0917 -- one call for all
        self,
        connection: sa.Connection,
        update: sa.Update,
        context: Any,
        target: KeyedTable,
        held: Callable[[], Iterable[Any]],
        moved: Mapping[Any, Any],
    ) -> Updated | None:
        """The columns that an UPDATE set, and the rows read back: those that it names, or ``held``.

        ``moved`` has the new keys of rows whose key it set, too.
        They are compared from now on in what was set and in all that was compared before.
        """
        columns, reused = self._columns_of(target, context.dialect), self._dialect.reuses_keys
        if not (reused or columns.shapes):
            return None  # no row of the table is compared
        names = columns.names
        given = context.compiled_parameters[0] if context.compiled_parameters else {}
        compiled = context.compiled
        written = given.keys() | computed_names(compiled.statement)
        # columns that are set to something else than a plain value
        written |= {column.key for column in (*compiled.postfetch, *compiled.update_prefetch)}
        changed = frozenset(column for name, column in names.items() if name in written)
        if not changed or context.rowcount == 0:
            return None
        keys = matched_keys(update, context, target) or ()
        stored = [key[0] for key in keys] if len(target.key_columns) == 1 else list(keys)
        stored = [moved.get(key, key) for key in stored or held()]
        touched = [shape for shape in columns.shapes.values() if changed & {*shape.columns}]
        compared = set(changed if reused else ()).union(*(shape.columns for shape in touched))
        if not compared:
            return None
        shape = columns.shape(tuple(name for name in names.values() if name in compared))
        if len(touched) == 1 and touched[0].either:
            (shape,) = touched
        hashes = read_hashes(connection, target, stored, shape)
        return Updated(target, stored, changed, hashes=hashes)

    def _columns_of(self, target: KeyedTable, dialect: sa.Dialect) -> ComparedColumns:
        columns = self._columns.get(target)
        if columns is None:
            columns = self._columns[target] = ComparedColumns.of(
                target.table, self._dialect, dialect
            )
        return columns

    def _values(self, context: Any, columns: ComparedColumns) -> dict[str, list[Any]]:
        """The values of an INSERT by column, as its parameters have them."""
        compiled, rows = context.compiled, context.parameters
        insert = compiled.statement
        if insert._multi_values:
            count = sum(map(len, insert._multi_values))
            each = [_places(compiled, columns, number) for number in range(count)]
            return {
                column: [rows[0][places[column]] for places in each]
                for column in each[0]
                if all(column in places for places in each)
            }
        places = self._places.get(compiled)
        if places is None:
            places = self._places[compiled] = _places(compiled, columns)
        if len(rows) == 1:
            (row,) = rows
            return {column: [row[place]] for column, place in places.items()}
        return {column: [row[place] for row in rows] for column, place in places.items()}


class _Sent:
    """What an INSERT of one row has sent; its execution context would keep much more."""

    __slots__ = ("_asked", "_found", "compiled", "compiled_parameters", "dialect", "parameters")

    def __init__(  # noqa: PLR0917 -- one call for all
        self,
        recorder: Recorder,
        context: Any,
        target: KeyedTable,
        keys: Sequence[Any],
        inserter: WorkerContext,
        strict: bool,
    ) -> None:
        self.compiled, self.dialect = context.compiled, context.dialect
        self.parameters = context.parameters
        self.compiled_parameters = context.compiled_parameters
        self._asked: Any = recorder, target, keys, inserter, strict
        self._found: Hashes | None = None

    def hashes(self) -> Hashes | None:
        """The hash of its row; read once."""
        if self._asked is not None:
            recorder, target, keys, inserter, strict = self._asked
            self._found = recorder.sent(self, target, keys, inserter.tag, strict=strict)
            self._asked = None
        return self._found


def _places(compiled: Any, columns: ComparedColumns, number: int | None = None) -> dict[str, Any]:
    """By column the place of its value in the parameters, or in those of one row of VALUES."""
    bound: dict[str, Any]
    if compiled.positiontup is not None:
        bound = {name: position for position, name in enumerate(compiled.positiontup)}
    else:
        escaped = compiled.escaped_bind_names
        bound = {name: escaped.get(name, name) for name in compiled.bind_names.values()}
    places = {}
    for name, column in columns.names.items():
        spelled = name
        if number is not None and (number or f"{name}_m0" in bound):
            spelled = f"{name}_m{number}"
        if spelled in bound:
            places[column] = bound[spelled]
    return places


def _in_order(context: Any, target: KeyedTable, keys: Sequence[Any]) -> bool:
    """Whether the keys that a statement was given, if any, are those of its rows, in order."""
    if not context.compiled_parameters:
        return not keys
    if len(keys) != len(context.compiled_parameters):
        return True  # several VALUES: one set of parameters has them all
    given = [tuple(map(row.get, target.key_names)) for row in context.compiled_parameters]
    single = len(target.key_columns) == 1
    return all(
        sent is None or sent == value
        for row, key in zip(own_keys(target, context.dialect, given)[0], keys, strict=True)
        for sent, value in zip(row, (key,) if single else key, strict=True)
    )


def row_hashes(shape: Shape, columns: Sequence[Sequence[Any]]) -> array[int]:
    """The hashes of rows, given as one sequence of values per column of the shape."""
    forms = [common_form(values) for values in columns]
    if None in forms:
        return array(HASH, [NEVER]) * len(columns[0])
    return hash_rows(shape, forms)


def read_hashes(
    connection: sa.Connection,
    table: KeyedTable,
    keys: Sequence[Any],
    shape: Shape,
) -> Hashes:
    """The hashes of the rows with these keys, as they are now."""
    known: dict[Any, int] = {}
    if shape.columns and keys:
        select = sa.select(*table.key_clauses, *raw_columns(shape)).select_from(table.clause)
        try:
            rows = [
                tuple(row)
                for part in plain_chunks(table, keys)
                for row in connection.execute(
                    select.where(plain_condition(table, part)), execution_options=_READING
                )
            ]
        except sa.exc.DBAPIError:  # a model may have more columns than its table
            rows = []
        width = len(table.key_columns)
        if rows:
            values = list(zip(*rows, strict=True))[width:]
            found = map(itemgetter(0 if width == 1 else slice(width)), rows)
            known = dict(zip(found, row_hashes(shape, values), strict=True))
    return Hashes(shape, array(HASH, [known.get(key, NEVER) for key in keys]))


def hashes_of_rows(
    dialect: Dialect, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
) -> Hashes | None:
    """The hashes of whole rows as they are now; None where nothing can be compared."""
    columns = ComparedColumns.of(table.table, dialect, connection.dialect)
    shape = columns.shape(tuple(columns.names.values()))
    return read_hashes(connection, table, keys, shape) if shape.columns else None


def raw_columns(shape: Shape) -> list[sa.ColumnClause[Any]]:
    """The columns of a shape without a type, so that values come as the driver reads them."""
    return [sa.column(sa.quoted_name(n, quote=None), sa.types.NullType()) for n in shape.columns]


def hash_rows(shape: Shape, forms: Sequence[Any]) -> array[int]:
    """As :func:`row_hashes`, of values in their common form."""
    count = len(shape.values)
    values = _hashed(zip(*forms[:count], strict=True)) if count else [0] * len(forms[0])
    if shape.references:
        values = _joined(values, _hashed(zip(*forms[count:], strict=True)))
    return array(HASH, values)


def hashes_as_read(shape: Shape, rows: Sequence[tuple[Any, ...]], start: int) -> list[int]:
    """As :func:`row_hashes`, of rows whose values, from this place on, are taken for common forms.

    Other values have another hash here, or none: only an equal hash tells something.
    """
    end = start + len(shape.values)
    values = [0] * len(rows)
    try:
        if shape.values:
            values = _hashed(map(itemgetter(slice(start, end)), rows))
        if shape.references:
            values = _joined(values, _hashed(map(itemgetter(slice(end, None)), rows)))
    except ValueError:  # a date
        return []
    return values


def _hashed(rows: Iterable[tuple[Any, ...]]) -> list[int]:
    return list(map(crc32, map(dumps, rows, repeat(_FORMAT))))


def _joined(values: list[int], references: list[int]) -> list[int]:
    return [a | b << 32 for a, b in zip(values, references, strict=True)]


def common_form(values: Sequence[Any]) -> Sequence[Any] | None:
    """Values in the form in which they are hashed; None where one may be stored as another."""
    kinds = set(map(type, values))
    if kinds == {int} or (kinds == {str} and min(values) >= _AFTER_NUMBERS):
        return values
    if not kinds <= _KINDS:
        return None
    return list(map(_form, values))


_KINDS = {dt.date, int, bool, float, str, bytes, bytearray, memoryview, type(None)}


def _form(value: Any) -> Any:
    if isinstance(value, str):
        return value if value >= _AFTER_NUMBERS else _number(value)
    if isinstance(value, float):
        if value.is_integer() and -_INTEGERS <= value < _INTEGERS:
            return int(value)
        return None if value != value else f"{value:.15g}"  # noqa: PLR0124 -- SQLite keeps NaN as NULL
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, dt.date):
        return str(value)
    return int(value) if isinstance(value, bool) else value


def _number(text: str) -> Any:
    """A text as the number that a column of numbers makes of it; other texts as they are."""
    try:
        number = int(text)
    except ValueError:
        number = _INTEGERS
    if -_INTEGERS <= number < _INTEGERS:
        return number
    try:
        return _form(float(text))
    except ValueError:
        return text
