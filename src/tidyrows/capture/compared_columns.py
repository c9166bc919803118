"""The columns of a table by which its rows are known again, and the values that prove a row."""

from __future__ import annotations

import datetime as dt
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.capture.changes import Shape
from tidyrows.dialects.keyless_rows import stored_type

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from tidyrows.dialects import Dialect

_SOME, _MUCH = 8, 16  # characters and digits: shorter values are often equal in many rows
_DATE = 4  # digits that a date is worth
_BITS = 53  # of integers that are no counters
_UNIQUE = frozenset({1, 4, 6, 7})  # the versions of UUIDs that nobody makes twice
_RANDOM = frozenset("47")  # those of them that their texts tell from other numbers
_HEX, _DASHED = (32, 12), (36, 14)  # the length of a UUID's text, and the place of its version


@dataclass(frozen=True, slots=True)
class ComparedColumns:
    """The columns of a table that can be compared.

    Attributes:
        names: by the parameter's name the database's name.
        references: nullable columns of foreign keys.
        shared: columns of foreign keys: other rows may well have the same value, even with a tag.
        uuids, unique: columns that may have a value that no other row can have.
        texts: columns of free text.
        usual: by column, the value that rows have by default.
        own_key: the places in the primary key of values that are no reference.
        mutable: a value may be changed in place after it was sent: a bytearray.
        shapes: by the columns that are compared, after "" where either will do.
    """

    names: dict[str, str]
    references: frozenset[str]
    shared: frozenset[str]
    uuids: tuple[str, ...]
    unique: tuple[str, ...]
    texts: frozenset[str]
    usual: dict[str, Any]
    own_key: tuple[int, ...]
    mutable: bool
    shapes: dict[tuple[str, ...], Shape] = field(default_factory=dict)

    @classmethod
    def of(cls, table: sa.Table, dialect: Dialect, sqlalchemy: sa.Dialect) -> ComparedColumns:
        """Those whose values are read as they are sent, by a dialect here and SQLAlchemy's own."""
        columns = [
            column
            for column in table.columns
            if not column.primary_key
            and column.computed is None
            and not _is_wrapped(column, sqlalchemy)
            and dialect.reads_as_sent(column)
        ]
        unique = _unique_columns(table)
        own = [column for column in columns if not column.foreign_keys]
        return cls(
            {column.key: column.name for column in columns},
            frozenset(c.name for c in columns if c.foreign_keys and c.nullable),
            frozenset(c.name for c in columns if c.foreign_keys),
            tuple(c.name for c in own if isinstance(c.type, sa.types.Uuid)),
            tuple(c.name for c in own if c in unique),
            frozenset(c.name for c in own if _is_free_text(stored_type(c, sqlalchemy))),
            {c.name: default for c in columns if (default := _default(c)) is not None},
            tuple(at for at, c in enumerate(table.primary_key) if not c.foreign_keys),
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

    def telling(
        self, given: Mapping[str, Sequence[Any]], tag: str, *, strict: bool
    ) -> Shape | None:
        """The shape of one or two groups of columns that tell a row from others with its key.

        The first group is a value that no other row can have; without one, the longest text;
        without a text, numbers and dates. The second group is another long text, or several short
        values. Flags, and values that equal the default of the column, are in no group, since many
        rows have them. With ``strict`` there is one group: a value that no other row can have.
        """
        proof = self.proof(given, tag)
        if strict:
            return self.shape((proof,)) if proof else None
        weights = {name: self._weight(name, values) for name, values in given.items()}
        ranked = sorted(filter(weights.get, weights), key=weights.__getitem__, reverse=True)
        text = proof or next((name for name in ranked if name in self.texts), None)
        one = [text] if text else _first(ranked, weights, _SOME)
        if not one:
            return None
        enough = _MUCH if proof else _SOME
        other = _first([name for name in ranked if name not in one], weights, enough)
        if sum(map(weights.__getitem__, other)) < enough:
            other = []
        compared = ("", *one, "", *other)
        if compared not in self.shapes:
            self.shapes[compared] = Shape(tuple(one), tuple(other), either=True)
        return self.shapes[compared]

    def _weight(self, name: str, values: Sequence[Any]) -> int:
        """How many characters or digits each of these values has that tell it from others."""
        kinds = set(map(type, values))
        if len(kinds) != 1 or name in self.references or self.usual.get(name) in values:
            return 0
        (kind,) = kinds
        if kind is str and name not in self.texts:
            return 0
        if kind in {str, bytes}:
            return min(map(len, values))
        if kind is int:
            return min(len(str(abs(value))) for value in values)
        return _DATE if kind is dt.date else 0

    def is_proof(self, key: Any, tag: str, made: Container[int]) -> bool:
        """Whether nobody else gives a row this key.

        Such are random UUIDs, texts with this tag, and what a function that is the default of its
        column has made, if it is long; ``made`` has the places of these in the key.
        """
        values = key if isinstance(key, tuple) else (key,)
        for at in self.own_key:  # a generator is a call
            value = values[at]
            if (isinstance(value, str) and tag in value) or is_random_uuid(value):
                return True
            if at in made and _is_long(value):
                return True
        return False


def is_random_uuid(value: Any) -> bool:
    """Whether this is a UUID, or the text of one, that nobody makes twice."""
    if isinstance(value, uuid.UUID):
        return value.version in _UNIQUE
    return isinstance(value, str) and value.count("-") == 4 and _is_random(value)  # noqa: PLR2004 -- a UUID's dashes


def _is_long(value: Any) -> bool:
    """Whether a value is longer than a counter's: it has random parts."""
    if isinstance(value, (str, bytes)):
        return len(value) >= _MUCH
    return isinstance(value, int) and abs(value) >= 2**_BITS


def _first(ranked: Iterable[str], weights: Mapping[str, int], enough: int) -> list[str]:
    """The first columns that weigh enough together, or all."""
    found: list[str] = []
    for name in ranked:
        if sum(map(weights.__getitem__, found)) >= enough:
            break
        found.append(name)
    return found


def _default(column: sa.Column[Any]) -> Any:
    """The value that a row has where none is given, if it is one and the same."""
    default: Any = column.default if column.default is not None else column.server_default
    value = getattr(default, "arg", None)
    return value if isinstance(value, (str, int, dt.date)) else None


def _is_free_text(kind: sa.types.TypeEngine[Any]) -> bool:
    return isinstance(kind, sa.String) and not isinstance(kind, sa.Enum)


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
    unique += [
        index
        for index in table.indexes
        if index.unique and not any(name.endswith("_where") for name in index.dialect_kwargs)
    ]
    return {
        next(iter(each.columns))
        for each in unique
        if len(each.columns) == 1 and len(getattr(each, "expressions", each.columns)) == 1
    }
