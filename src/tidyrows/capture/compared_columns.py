"""The columns of a table by which its rows are known again, and the values that prove a row."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.capture.changes import Shape
from tidyrows.dialects.keyless_rows import stored_type

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tidyrows.dialects import Dialect

_LONG = 8  # characters: shorter texts are often states or codes, which many rows have
_RANDOM = frozenset("47")  # the versions of UUIDs that nobody makes twice
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
        """The shape of one or two columns whose values tell a row from others with its key.

        The first has a value that no other row can have, or the longest text, as other rows have
        other texts, while flags and numbers are often equal. The second is another long text.
        With ``strict`` only a column whose value no other row can have is one.
        """
        proof = self.proof(given, tag)
        if strict:
            return self.shape((proof,)) if proof else None
        sizes: dict[str, int] = {}
        for name, values in given.items():
            if name in self.texts and set(map(type, values)) == {str} and all(values):
                sizes[name] = min(map(len, values))
        texts = sorted(sizes, key=sizes.__getitem__, reverse=True)
        names = [proof] if proof else texts[:1]
        names += [each for each in texts if each not in names and sizes[each] >= _LONG][:1]
        if not names:
            return None
        compared = ("", *names)
        if compared not in self.shapes:
            self.shapes[compared] = Shape((names[0],), tuple(names[1:]), either=True)
        return self.shapes[compared]

    def is_proof(self, key: Any, tag: str) -> bool:
        """Whether nobody else gives a row this key: a random UUID, or a text with this tag."""
        values = key if isinstance(key, tuple) else (key,)
        for at in self.own_key:  # a generator is a call
            value = values[at]
            if (isinstance(value, str) and tag in value) or is_random_uuid(value):
                return True
        return False


def is_random_uuid(value: Any) -> bool:
    """Whether this is a UUID, or the text of one, that nobody makes twice."""
    if isinstance(value, uuid.UUID):
        return value.version in {4, 7}
    return isinstance(value, str) and value.count("-") == 4 and _is_random(value)  # noqa: PLR2004 -- a UUID's dashes


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
    unique += [index for index in table.indexes if index.unique]
    return {
        next(iter(each.columns))
        for each in unique
        if len(each.columns) == 1 and len(getattr(each, "expressions", each.columns)) == 1
    }
