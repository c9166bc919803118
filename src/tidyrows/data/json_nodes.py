"""JSON with the place of each value; Python's own parser does not tell places."""

from __future__ import annotations

import re
from bisect import bisect_right
from json.decoder import JSONDecodeError, scanstring  # type: ignore[attr-defined]  # untyped
from typing import Any

from tidyrows.data.nodes import Node, Place, at, twice

_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = re.compile(r"(-?(?:0|[1-9]\d*))(\.\d+)?([eE][-+]?\d+)?")
_WORDS = {"true": True, "false": False, "null": None}


def read_json(file: str, text: str) -> Node:
    """The nodes of a JSON text."""
    return _Parser(file, text.removeprefix("\ufeff")).read()


class _Parser:
    def __init__(self, file: str, text: str) -> None:
        self.file, self.text, self.end = file, text, 0
        self.starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def read(self) -> Node:
        node = self.value()
        if self.next() is not None:
            raise self.wrong("the end of the file is expected here")
        return node

    def place(self, index: int) -> Place:
        line = bisect_right(self.starts, index)
        return Place(line, index - self.starts[line - 1] + 1)

    def wrong(self, text: str, index: int | None = None) -> Exception:
        return at(self.file, self.place(self.end if index is None else index), f"no JSON: {text}.")

    def next(self) -> str | None:
        """The next character that is no space."""
        match = _SPACE.match(self.text, self.end)
        self.end = match.end() if match else self.end
        return self.text[self.end] if self.end < len(self.text) else None

    def take(self, *expected: str) -> str:
        char = self.next()
        if char is None or char not in expected:
            raise self.wrong(f"{' or '.join(expected)} is expected here")
        self.end += 1
        return char

    def string(self) -> str:
        self.take('"')
        try:
            text: str
            text, self.end = scanstring(self.text, self.end)
        except JSONDecodeError as error:
            raise self.wrong(error.msg, error.pos) from None
        return text

    def value(self) -> Node:
        char = self.next()
        place = self.place(self.end)
        if char == "{":
            return self.object(place)
        if char == "[":
            return Node(self.list(), place)
        if char == '"':
            return Node(self.string(), place)
        for word, value in _WORDS.items():
            if self.text.startswith(word, self.end):
                self.end += len(word)
                return Node(value, place)
        match = _NUMBER.match(self.text, self.end)
        if match is None:
            raise self.wrong("a value is expected here")
        self.end = match.end()
        number: Any = float(match[0]) if match[2] or match[3] else int(match[0])
        return Node(number, place)

    def list(self) -> list[Node]:
        self.take("[")
        found: list[Node] = []
        if self.next() == "]":
            self.end += 1
            return found
        while True:
            found.append(self.value())
            if self.take(",", "]") == "]":
                return found

    def object(self, place: Place) -> Node:
        self.take("{")
        node = Node({}, place)
        if self.next() == "}":
            self.end += 1
            return node
        while True:
            self.next()
            start = self.place(self.end)
            name = self.string()
            if name in node.value:
                raise at(self.file, start, twice(name, node.names[name]))
            self.take(":")
            node.names[name] = start
            node.value[name] = self.value()
            if self.take(",", "}") == "}":
                return node
