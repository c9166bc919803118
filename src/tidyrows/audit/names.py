"""Names of tables as they are written in SQL."""

from __future__ import annotations

import re

PART = r'(?:[\w$]+|"(?:[^"]|"")+"|`(?:[^`]|``)+`|\[[^\]]+\])'
NAME = rf"({PART}(?:\s*\.\s*{PART})*)"
_PIECE = re.compile(PART)

WrittenName = tuple[str | None, str]
"""A table as it is written: the schema, None where there is none, and the name."""


def written_name(text: str) -> WrittenName:
    """The table of a name as it is written in SQL."""
    parts = [_unquoted(part) for part in _PIECE.findall(text)]
    return (parts[-2] if len(parts) > 1 else None), parts[-1]


def _unquoted(part: str) -> str:
    if part[0] in '"`':
        return part[1:-1].replace(part[0] * 2, part[0])
    return part[1:-1] if part[0] == "[" else part
