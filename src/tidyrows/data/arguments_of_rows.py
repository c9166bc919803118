"""The arguments of a factory call, as a file gives them: literals, texts, references."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from tidyrows.errors import ScopeError
from tidyrows.factories import Scoped, ScopedEmail
from tidyrows.template import TAG_WIDTH, escaped, fitted

if TYPE_CHECKING:
    from collections.abc import Mapping

    import sqlalchemy as sa

RowName: TypeAlias = tuple[str, str]
"""The name of a factory in a file, and that of the row."""

Made: TypeAlias = "Mapping[RowName, Any]"
"""What has been made: objects, and lists of them for rows with a count."""

TAG, NUMBER = "{tag}", "{n}"


class Argument(Protocol):
    """An argument of a factory call."""

    def value(self, made: Made, number: int | None) -> Any:
        """The argument itself; ``number`` is that of the row in its count, from 1."""


@dataclass(frozen=True, slots=True)
class Literal:
    """A value as it is."""

    literal: Any

    def value(self, made: Made, number: int | None) -> Any:
        """The value; a copy, since several rows may get it."""
        return deepcopy(self.literal)

    def __str__(self) -> str:
        return repr(self.literal)


@dataclass(frozen=True, slots=True)
class Text:
    """A text with the number of the row, or the tag, or both."""

    text: str
    column: sa.Column[Any] | None
    is_scoped: bool

    def value(self, made: Made, number: int | None) -> Any:
        """The text, or the declaration of one that no other worker has."""
        text = self.text if number is None else self.text.replace(NUMBER, str(number))
        return scoped(text, self.column) if self.is_scoped else text

    def __str__(self) -> str:
        return repr(self.value({}, None)) if self.is_scoped else repr(self.text)


@dataclass(frozen=True, slots=True)
class Reference:
    """A row, or an attribute of it."""

    row: RowName
    attribute: str | None = None

    def value(self, made: Made, number: int | None) -> Any:
        """The object, or its attribute; a new list of objects where the row has a count."""
        found = made[self.row]
        if isinstance(found, list):
            return list(found)
        return found if self.attribute is None else getattr(found, self.attribute)

    def __str__(self) -> str:
        return ".".join(filter(None, (*self.row, self.attribute)))


@dataclass(frozen=True, slots=True)
class Many:
    """A list."""

    arguments: tuple[Argument, ...]

    def value(self, made: Made, number: int | None) -> Any:
        """A new list."""
        return [each.value(made, number) for each in self.arguments]

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.arguments))}]"


def scoped(text: str, column: sa.Column[Any] | None) -> Scoped | ScopedEmail:
    """The declaration of a text that no other worker has: with its tags, or one appended.

    Raises:
        ScopeError: the column is too short for it.
    """
    length = getattr(column.type, "length", None) if column is not None else None
    name = None if column is None else f"{column.table.name}.{column.name}"
    if TAG not in text and (address := _address(text)) is not None:
        need = TAG_WIDTH + len(address.domain) + 1
        if length is not None and need > length:
            raise ScopeError(
                f"{name} holds {length} characters, but an address at {address.domain} that no "
                f"other worker can have needs {need}.",
                column=name,
                length=length,
                need=need,
            )
        return address
    parts = text.split(TAG) if TAG in text else [f"{text}-", ""]
    template = TAG.join(map(escaped, parts))
    fitted(template, length, name)
    return Scoped(template)


def _address(text: str) -> ScopedEmail | None:
    local, at, domain = text.partition("@")
    if not (local and at):
        return None
    try:
        return ScopedEmail(local, domain)
    except ScopeError:
        return None
