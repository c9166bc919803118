"""TOML: tomllib tells no places, so a line is that of the key, where it can be found."""

from __future__ import annotations

import re
import tomllib
from typing import Any

from tidyrows.data.nodes import Node, Place, at

_HEADER = re.compile(r"\s*\[([^\[\]]+)\]\s*(#.*)?$")
_KEY = re.compile(r"\s*((?:\"[^\"]*\"|'[^']*'|[A-Za-z0-9_-]+)(?:\s*\.\s*[^=\s]+)*)\s*=")
_PART = re.compile(r"\"([^\"]*)\"|'([^']*)'|([A-Za-z0-9_-]+)")
_AT = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


def read_toml(file: str, text: str) -> Node:
    """The nodes of a TOML text; those in an inline table have the line of its key."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        said = _AT.search(str(error))
        place = Place(int(said[1]), int(said[2])) if said and said[1] else Place()
        raise at(file, place, f"no TOML: {_AT.sub('', str(error))}.") from error
    return _node(values, (), _lines(text), Place())


def _lines(text: str) -> dict[tuple[str, ...], Place]:
    """The line of each header and key."""
    found: dict[tuple[str, ...], Place] = {}
    above: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            above = path = _parts(header[1])
        elif key := _KEY.match(line):
            path = (*above, *_parts(key[1]))
        else:
            continue
        for end in range(1, len(path) + 1):
            found.setdefault(path[:end], Place(number))
    return found


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(next(filter(None, match.groups()), "") for match in _PART.finditer(dotted))


def _node(
    value: Any, path: tuple[str, ...], lines: dict[tuple[str, ...], Place], above: Place
) -> Node:
    place = lines.get(path, above)
    if isinstance(value, dict):
        inside = {name: _node(each, (*path, name), lines, place) for name, each in value.items()}
        return Node(inside, place, {name: node.place for name, node in inside.items()})
    if isinstance(value, list):
        return Node([_node(each, path, lines, place) for each in value], place)
    return Node(value, place)
