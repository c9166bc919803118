"""Hashes of inserted rows, for databases that may give a key to another row (SQLite).

A hash is of the values as the driver sends and reads them, and it is the same in every process.
SQLite stores the text '5' as a number in a column of numbers, and the number 5 as a text in a
column of texts: so numbers, and texts that read as numbers, are hashed in one common form.
"""

from __future__ import annotations

import weakref
from array import array
from dataclasses import dataclass, field
from itertools import repeat
from marshal import dumps
from operator import itemgetter
from typing import TYPE_CHECKING, Any
from zlib import crc32

import sqlalchemy as sa

from tidyrows.capture.affected_rows import matched_keys
from tidyrows.capture.changes import Hashes, Shape, Updated
from tidyrows.capture.returning import computed_names
from tidyrows.dialects.keys import own_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tidyrows.dialects import Dialect
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
_FORMAT = 0  # of marshal: the only one that depends on the values alone
_RANDOM = frozenset("47")  # the versions of UUIDs that nobody makes twice
_HEX, _DASHED = (32, 12), (36, 14)  # the length of a UUID's text, and the place of its version


class Recorder:
    """Hashes the rows that are written through one engine."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._columns: weakref.WeakKeyDictionary[KeyedTable, _Columns] = weakref.WeakKeyDictionary()
        self._places: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()

    def inserted(
        self,
        connection: sa.Connection,
        context: Any,
        target: KeyedTable,
        keys: Sequence[Any],
        inserter: WorkerContext,
        *,
        generated: bool,
    ) -> Callable[[], Hashes | None] | None:
        """Returns the hashes of inserted rows; None where keys were given and nothing else.

        Where all rows have a value that no other row can have, that column alone is hashed: the
        application may change the others. Where the statement does not tell the values, the rows
        are read back.

        Most suites roll back: a single row is not hashed before that is asked for, if the statement
        tells a value that nobody can change in place until then.
        """
        columns = self._columns_of(target, context.dialect)
        if len(keys) == 1 and len(context.parameters) == 1 and not columns.mutable:
            row, places = context.parameters[0], self._places.get(context.compiled) or {}
            for place in places.values():
                if type(row[place]) in _KINDS:
                    return _Sent(self, context, target, keys, inserter).hashes
        hashes = self._hashes(connection, context, target, keys, generated, inserter.tag)
        return None if hashes is None else hashes.read

    def _hashes(  # noqa: PLR0917 -- one call for all
        self,
        connection: sa.Connection,
        context: Any,
        target: KeyedTable,
        keys: Sequence[Any],
        generated: bool,
        tag: str,
    ) -> Hashes | None:
        hashes = self.sent(context, target, keys, tag)
        given: Any = context.compiled_parameters[0] if context.compiled_parameters else {}
        if hashes is None and (generated or not given.keys() >= {*target.key_names}):
            columns = self._columns_of(target, context.dialect)
            shape = columns.shape(tuple(columns.names.values()))
            if shape.columns or generated:  # else of an association: known by what it references
                hashes = read_hashes(self._dialect, connection, target, keys, shape)
        return hashes

    def sent(
        self, context: Any, target: KeyedTable, keys: Sequence[Any], tag: str
    ) -> Hashes | None:
        """The hashes of the values that a statement was given."""
        columns = self._columns_of(target, context.dialect)
        given = self._values(context, columns)
        count = len(next(iter(given.values()), ()))
        if count != len(keys) or not (count == 1 or _in_order(context, target, keys)):
            return None
        proof = columns.proof(given, tag)
        if proof is not None:
            given = {proof: given[proof]}
        forms = {name: common_form(values) for name, values in given.items()}
        shape = columns.shape(tuple([name for name in forms if forms[name] is not None]))
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
        columns = self._columns_of(target, context.dialect)
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
        compared = set(changed).union(
            *(shape.columns for shape in columns.shapes.values() if changed & {*shape.columns})
        )
        shape = columns.shape(tuple(name for name in names.values() if name in compared))
        hashes = read_hashes(self._dialect, connection, target, stored, shape)
        return Updated(target, stored, changed, hashes=hashes)

    def _columns_of(self, target: KeyedTable, dialect: sa.Dialect) -> _Columns:
        columns = self._columns.get(target)
        if columns is None:
            columns = self._columns[target] = _Columns.of(target.table, dialect)
        return columns

    def _values(self, context: Any, columns: _Columns) -> dict[str, list[Any]]:
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

    def __init__(
        self,
        recorder: Recorder,
        context: Any,
        target: KeyedTable,
        keys: Sequence[Any],
        inserter: WorkerContext,
    ) -> None:
        self.compiled, self.dialect = context.compiled, context.dialect
        self.parameters = context.parameters
        self.compiled_parameters = context.compiled_parameters
        self._asked: Any = recorder, target, keys, inserter
        self._found: Hashes | None = None

    def hashes(self) -> Hashes | None:
        """The hash of its row; read once."""
        if self._asked is not None:
            recorder, target, keys, inserter = self._asked
            self._found = recorder.sent(self, target, keys, inserter.tag)
            self._asked = None
        return self._found


@dataclass(frozen=True, slots=True)
class _Columns:
    """The columns of a table that can be compared.

    Attributes:
        names: by the parameter's name the database's name.
        references: nullable columns of foreign keys.
        shared: columns of foreign keys: other rows may well have the same value, even with a tag.
        uuids, unique: columns that may have a value that no other row can have.
        mutable: a value may be changed in place after it was sent: a bytearray.
        shapes: by the columns that are compared.
    """

    names: dict[str, str]
    references: frozenset[str]
    shared: frozenset[str]
    uuids: tuple[str, ...]
    unique: tuple[str, ...]
    mutable: bool
    shapes: dict[tuple[str, ...], Shape] = field(default_factory=dict)

    @classmethod
    def of(cls, table: sa.Table, dialect: sa.Dialect) -> _Columns:
        columns = [
            column
            for column in table.columns
            if not column.primary_key
            and column.computed is None
            and not _is_wrapped(column, dialect)
        ]
        unique = _unique_columns(table)
        own = [column for column in columns if not column.foreign_keys]
        return cls(
            {column.key: column.name for column in columns},
            frozenset(c.name for c in columns if c.foreign_keys and c.nullable),
            frozenset(c.name for c in columns if c.foreign_keys),
            tuple(c.name for c in own if isinstance(c.type, sa.types.Uuid)),
            tuple(c.name for c in own if c in unique),
            any(isinstance(_inner(c.type), sa.LargeBinary) for c in columns),
        )

    def shape(self, compared: tuple[str, ...]) -> Shape:
        """The shape of these columns."""
        shape = self.shapes.get(compared)
        if shape is None:
            values = tuple(name for name in compared if name not in self.references)
            references = tuple(name for name in compared if name in self.references)
            shape = self.shapes[compared] = Shape(values, references)
        return shape

    def proof(self, given: Mapping[str, Sequence[Any]], tag: str) -> str | None:
        """A column in which each of these rows has a value that no other row can have."""
        for column in self.uuids:
            if column in given and all(map(_is_random, given[column])):
                return column
        for column, values in given.items():
            first = values[0]
            maybe = type(first) is str and tag in first and column not in self.shared
            if maybe and (
                len(values) == 1 or all(type(value) is str and tag in value for value in values)
            ):
                return column
        for column in self.unique:
            values = given.get(column, ())
            if values and all(isinstance(value, (str, bytes)) and value for value in values):
                return column
        return None


def _places(compiled: Any, columns: _Columns, number: int | None = None) -> dict[str, Any]:
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


def _inner(kind: sa.types.TypeEngine[Any]) -> sa.types.TypeEngine[Any]:
    return kind.impl_instance if isinstance(kind, sa.TypeDecorator) else kind


def _is_random(value: Any) -> bool:
    if isinstance(value, bytes):
        return len(value) == 16 and value[6] >> 4 in {4, 7}  # noqa: PLR2004 -- a UUID's bytes
    return isinstance(value, str) and any(
        len(value) == size and value[at] in _RANDOM for size, at in (_HEX, _DASHED)
    )


def _is_wrapped(column: sa.Column[Any], dialect: sa.Dialect) -> bool:
    """Whether SQL around each value makes another of it."""
    sent = column.type.dialect_impl(dialect)
    return any(
        each.bind_expression(sa.bindparam("x", type_=each)) is not None
        for each in (column.type, sent)
    )


def _unique_columns(table: sa.Table) -> set[sa.Column[Any]]:
    unique: list[Any] = [
        each for each in table.constraints if isinstance(each, sa.UniqueConstraint)
    ]
    unique += [index for index in table.indexes if index.unique]
    return {
        next(iter(each.columns))
        for each in unique
        if len(each.columns) == 1 and len(getattr(each, "expressions", each.columns)) == 1
    }


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
    dialect: Dialect,
    connection: sa.Connection,
    table: KeyedTable,
    keys: Sequence[Any],
    shape: Shape,
) -> Hashes:
    """The hashes of the rows with these keys, as they are now."""
    known: dict[Any, int] = {}
    if shape.columns and keys:
        try:
            rows = dialect.find(connection, table, keys, [*table.key_clauses, *raw_columns(shape)])
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
    columns = _Columns.of(table.table, connection.dialect)
    shape = columns.shape(tuple(columns.names.values()))
    return read_hashes(dialect, connection, table, keys, shape) if shape.columns else None


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

    Other values have another hash here: only an equal hash tells something.
    """
    end = start + len(shape.values)
    values = _hashed(map(itemgetter(slice(start, end)), rows)) if shape.values else [0] * len(rows)
    if shape.references:
        values = _joined(values, _hashed(map(itemgetter(slice(end, None)), rows)))
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


_KINDS = {int, bool, float, str, bytes, bytearray, memoryview, type(None)}


def _form(value: Any) -> Any:
    if isinstance(value, str):
        return value if value >= _AFTER_NUMBERS else _number(value)
    if isinstance(value, float):
        if value.is_integer() and -_INTEGERS <= value < _INTEGERS:
            return int(value)
        return None if value != value else f"{value:.15g}"  # noqa: PLR0124 -- SQLite keeps NaN as NULL
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
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
