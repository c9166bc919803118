"""Takes the hashes of rows from statements, as they go to the driver."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.capture.changes import Updated
from tidyrows.capture.hashes import Hashes, Shape, common_form, hash_rows
from tidyrows.capture.where_clause import matched_keys

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tidyrows.keys import KeyedTable
    from tidyrows.worker import WorkerContext

_RANDOM = frozenset("47")  # the versions of UUIDs that nobody makes twice
_HEX, _DASHED = (32, 12), (36, 14)  # the length of a UUID's text, and the place of its version


class Recorder:
    """Hashes the rows that are written through one engine."""

    def __init__(self) -> None:
        self._columns: weakref.WeakKeyDictionary[KeyedTable, _Columns] = weakref.WeakKeyDictionary()
        self._places: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()

    def inserted(
        self,
        insert: sa.Insert,
        context: Any,
        target: KeyedTable,
        keys: Sequence[tuple[Any, ...]],
        inserter: WorkerContext,
    ) -> Hashes | None:
        """The hashes of inserted rows; None where no value can be compared.

        Where all rows have a value that no other row can have, that column alone is hashed: the
        application may change the others.
        """
        columns = self._columns_of(target, context.dialect)
        given = self._values(insert, context, columns)
        count = len(next(iter(given.values()), ()))
        if count != len(keys) or not (count == 1 or _in_order(context, target, keys)):
            return None
        proof = columns.proof(given, inserter.tag)
        if proof is not None:
            given = {proof: given[proof]}
        forms = {name: common_form(values) for name, values in given.items()}
        shape = columns.shape(tuple(name for name in forms if forms[name] is not None))
        if not shape.columns:
            return None
        return Hashes(shape, hash_rows(shape, [forms[name] for name in shape.columns]))

    def updated(self, update: sa.Update, context: Any, target: KeyedTable) -> Updated | None:
        """The columns that an UPDATE set: in the rows that it names, else in any row."""
        names = self._columns_of(target, context.dialect).names
        given = context.compiled_parameters[0] if context.compiled_parameters else {}
        written = given.keys() | _computed(context.compiled)
        changed = frozenset(column for name, column in names.items() if name in written)
        if not changed or context.rowcount == 0:
            return None
        keys = matched_keys(update, context, target) or ()
        stored = [key[0] for key in keys] if len(target.key_columns) == 1 else list(keys)
        return Updated(target, stored, changed)

    def _columns_of(self, target: KeyedTable, dialect: sa.Dialect) -> _Columns:
        columns = self._columns.get(target)
        if columns is None:
            columns = self._columns[target] = _Columns.of(target.table, dialect)
        return columns

    def _values(self, insert: sa.Insert, context: Any, columns: _Columns) -> dict[str, list[Any]]:
        """The values of an INSERT by column, as its parameters have them."""
        compiled, rows = context.compiled, context.parameters
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
        return {column: [row[place] for row in rows] for column, place in places.items()}


@dataclass(frozen=True, slots=True)
class _Columns:
    """The columns of a table that can be compared.

    Attributes:
        names: by the parameter's name the database's name.
        references: nullable columns of foreign keys.
        shared: columns of foreign keys: other rows may well have the same value, even with a tag.
        uuids, unique: columns that may have a value that no other row can have.
        shapes: by the columns that are compared.
    """

    names: dict[str, str]
    references: frozenset[str]
    shared: frozenset[str]
    uuids: tuple[str, ...]
    unique: tuple[str, ...]
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
            if maybe and all(type(value) is str and tag in value for value in values):
                return column
        for column in self.unique:
            if column in given and all(map(_is_filled, given[column])):
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


def _is_filled(value: Any) -> bool:
    return isinstance(value, (str, bytes)) and bool(value)


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


def _computed(compiled: Any) -> set[str]:
    """The names of the columns that an UPDATE sets to something else than a plain value."""
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
