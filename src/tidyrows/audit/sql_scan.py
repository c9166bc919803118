"""Which tables an SQL string writes to and reads from, as far as its words tell.

The string that goes to the driver is looked at, so that raw SQL and SQLAlchemy's own are the same.
A word too many costs one more look at a table, and accuses nobody.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from tidyrows.capture.raw_sql import first_word, is_ddl

_PART = r'(?:[\w$]+|"(?:[^"]|"")+"|`(?:[^`]|``)+`|\[[^\]]+\])'
_NAME = rf"({_PART}(?:\s*\.\s*{_PART})*)"
_WRITES = re.compile(
    r"\b(INSERT\s+(?:(?:LOW_PRIORITY|DELAYED|HIGH_PRIORITY|IGNORE)\s+|OR\s+\w+\s+)*(?:INTO\s+)?"
    r"|REPLACE\s+INTO\s+|MERGE\s+INTO\s+|COPY\s+"
    r"|UPDATE\s+(?:OR\s+\w+\s+)?(?:ONLY\s+)?"
    r"|DELETE\s+FROM\s+(?:ONLY\s+)?|TRUNCATE\s+(?:TABLE\s+)?(?:ONLY\s+)?)" + _NAME,
    re.IGNORECASE,
)
_DROPS = re.compile(
    rf"\bDROP\s+TABLE\s+(?:IF\s+EXISTS\s+)?({_NAME}(?:\s*,\s*{_NAME})*)", re.IGNORECASE
)
_READS = re.compile(rf"\b(?:FROM|JOIN)\s+{_NAME}", re.IGNORECASE)
_PIECE = re.compile(_PART)
# What begins with one of these and names no table may still write: a procedure, a block.
_UNCLEAR = frozenset({"CALL", "DO", "EXEC", "EXECUTE", "LOAD"})
# CREATE DATABASE may name another for its template, to which nobody may be connected.
_ALONE = re.compile(r"\s*(?:DROP|ALTER|CREATE)\s+(?:DATABASE|SCHEMA)\b", re.IGNORECASE)

Name = tuple[str | None, str]
"""A schema, if one was written, and a table."""


@dataclass(frozen=True, slots=True)
class Spoken:
    """What one SQL string says.

    Attributes:
        inserts: whether rows may be made by it.
        written: the tables it writes to.
        read: the tables it reads from.
        ddl: it may make or drop tables.
        dropped: the tables it drops.
        unclear: it may write, and does not say where to.
        alone: it may want a database or a schema for itself, while nobody is connected there.
    """

    inserts: frozenset[Name] = frozenset()
    written: frozenset[Name] = frozenset()
    read: frozenset[Name] = frozenset()
    ddl: bool = False
    dropped: frozenset[Name] = frozenset()
    unclear: bool = False
    alone: bool = False


@lru_cache(maxsize=4096)
def spoken(sql: str) -> Spoken:
    """What an SQL string says."""
    word = first_word(sql)
    found = [(match[1].upper(), _name(match[2])) for match in _WRITES.finditer(sql)]
    made = ("INSERT", "REPLACE", "MERGE", "COPY")
    written = frozenset(name for _verb, name in found)
    return Spoken(
        inserts=frozenset(name for verb, name in found if verb.startswith(made)),
        written=written,
        read=frozenset(_name(match[1]) for match in _READS.finditer(sql)) - written,
        ddl=is_ddl(sql),
        dropped=frozenset(
            _name(name) for match in _DROPS.finditer(sql) for name in match[1].split(",")
        ),
        unclear=word in _UNCLEAR,
        alone=_ALONE.match(sql) is not None,
    )


def _name(text: str) -> Name:
    parts = [_bare(part) for part in _PIECE.findall(text)]
    return (parts[-2] if len(parts) > 1 else None), parts[-1]


def _bare(part: str) -> str:
    if part[0] in '"`':
        return part[1:-1].replace(part[0] * 2, part[0])
    return part[1:-1] if part[0] == "[" else part
