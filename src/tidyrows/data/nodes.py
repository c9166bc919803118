"""The values of a data file with their places, whatever the language of the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

from tidyrows.errors import DataFileError

if TYPE_CHECKING:
    from collections.abc import Iterable


class Place(NamedTuple):
    """Line and column in a file, from 1; None where that is not known."""

    line: int | None = None
    column: int | None = None


NOWHERE = Place()


@dataclass(frozen=True, slots=True)
class Node:
    """A value and its place.

    Attributes:
        value: a scalar, a list of nodes, or a dict of nodes.
        place: the beginning of the value.
        names: of a dict, the place of each name.
    """

    value: Any
    place: Place = NOWHERE
    names: dict[str, Place] = field(default_factory=dict)

    @property
    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {name: node.plain for name, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain for node in self.value]
        return self.value


def at(file: str, place: Place, text: str) -> DataFileError:
    """The error about a place of a file."""
    where = ":".join(str(each) for each in (file, *place) if each is not None)
    return DataFileError(f"{where}: {text}", file=file, line=place.line, column=place.column)


def nearest(name: Any, known: Iterable[str]) -> str:
    """A sentence on the known names for an error about an unknown one."""
    names = list(dict.fromkeys(known))
    near = get_close_matches(str(name), names, n=1)
    if near:
        return f"Did you mean {near[0]}?"
    return f"Known: {', '.join(names)}." if names else "None is known."


def twice(name: str, first: Place) -> str:
    """The error about a name that is there already."""
    return f"{name} is there twice; the first is in line {first.line}. Give each its own name."
