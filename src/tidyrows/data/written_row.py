"""One row of a tracker as an entry of a data file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.orm import RelationshipDirection

from tidyrows.data.arguments_of_rows import TAG, scoped
from tidyrows.data.values import TIMES, is_own_type, is_text, is_unique, plain
from tidyrows.errors import DataFileError, ScopeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sqlalchemy.orm import RelationshipProperty

    from tidyrows.data.arguments_of_rows import RowName
    from tidyrows.factories.fields import Fields

COUNTER = "(?:[0-7]|[89ab][0-9a-z]|[c-f][0-9a-z]{2}|[g-j][0-9a-z]{3}|[k-z][0-9a-z]{4})"
"""The counter at the end of a tag; its first character tells its length."""

_WORDS = frozenset({"count", "traits"})
"""What else an entry has than arguments of the factory's call."""


@dataclass
class Entry:
    """One row as an entry of a data file.

    Attributes:
        find: the name of the tracked row that has these values in these columns, or None.
        tag: of the test, which becomes ``{tag}``.
        fields: the names that its factory takes.
        instance: its object, with all its columns loaded.
    """

    find: Callable[[Iterable[tuple[Any, Any]]], RowName | None]
    tag: str
    fields: Fields
    instance: Any
    entry: dict[str, Any] = field(default_factory=dict)
    done: set[Any] = field(default_factory=set)

    def written(self) -> dict[str, Any]:
        """The arguments of the factory's call."""
        mapper = self.fields.mapper
        for relationship in mapper.relationships:
            if relationship.direction is RelationshipDirection.MANYTOONE:
                self.add_reference(relationship)
        for attribute in mapper.column_attrs:
            columns = [each for each in attribute.columns if isinstance(each, sa.Column)]
            if columns and not self.done.intersection(columns) and not self.is_made(columns):
                self.add_value(attribute.key, columns[0])
        for name in self.fields.related:
            self.entry[name] = None  # its rows are in the file themselves
        return self.entry

    def value_of(self, column: Any) -> Any:
        """The value of a column."""
        return getattr(self.instance, self.fields.mapper.get_property_by_column(column).key)

    def add_reference(self, relationship: RelationshipProperty[Any]) -> None:
        """Write a reference for the columns of a relationship."""
        name = self.fields.name_of(relationship.key)
        pairs = relationship.local_remote_pairs or []
        local = [here for here, _ in pairs]
        if relationship.viewonly or self.done.intersection(local):
            return
        values = [(there, self.value_of(here)) for here, there in pairs]
        row = self.find(values)
        if row is not None:
            self.entry[name] = {"ref": ".".join(row)}
            self.done.update(local)
        elif all(value is None for _, value in values) and name in self.fields.declared:
            self.entry[name] = None
            self.done.update(local)

    def is_made(self, columns: list[sa.Column[Any]]) -> bool:
        """Whether the database or the mapper gives the value."""
        return any(
            each is each.table.autoincrement_column
            or each is self.fields.mapper.polymorphic_on
            or each.computed is not None
            or (each.primary_key and each.default is not None)
            for each in columns
        )

    def add_value(self, key: str, column: sa.Column[Any]) -> None:
        """Write the value of a column, unless it is the default."""
        name, value = self.fields.name_of(key), self.value_of(column)
        if name not in self.fields.declared and _is_default(column, value):
            return
        for foreign in column.foreign_keys:
            row = self.find([(foreign.column, value)])
            if row is not None and value is not None:
                self.entry[name] = {"ref": ".".join(row)}
                return
        if isinstance(value, str) and is_text(column) and name not in _WORDS:
            self.entry[name] = self.text(column, value)
            return
        is_own = is_own_type(column.type)
        inner = getattr(column.type, "impl_instance", None)
        try:
            form = plain(value)
            json.dumps(form)
            if is_own and form is not value and not isinstance(inner, TIMES):
                raise TypeError(type(value).__name__)  # noqa: TRY301 -- nobody can tell what its type reads
        except TypeError:
            raise unwritten(
                f"{column.table.fullname}.{column.name} holds a {type(value).__name__}, which "
                f"has no form in a file."
            ) from None
        self.entry[name] = form if name not in _WORDS else {"exact": form}

    def text(self, column: sa.Column[Any], value: str) -> Any:
        """A text with the tag of this test as ``{tag}``, so that it is scoped again."""
        tag = re.escape(self.tag)
        text = re.sub(tag + COUNTER, TAG, value)
        is_own = is_unique(column) and not column.foreign_keys
        if (text == value and TAG in value) or (is_own and not _fits(column, text)):
            return {"exact": value}
        return text


def _fits(column: sa.Column[Any], text: str) -> bool:
    try:
        scoped(text, column)
    except ScopeError:
        return False
    return True


def _is_default(column: sa.Column[Any], value: Any) -> bool:
    default = column.default
    if isinstance(default, sa.ColumnDefault) and default.is_scalar:
        return bool(default.arg == value)
    return value is None and default is None and column.server_default is None


def unwritten(text: str) -> DataFileError:
    """The error about rows that cannot be written."""
    return DataFileError(f"dump_rows: {text}")
