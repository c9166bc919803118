"""What was observed of the suite's SQL during one test or one shared fixture.

The strings that go to the driver are scanned, so raw SQL and SQLAlchemy's are the same. A table too
many costs one more look at it, and causes no finding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from tidyrows.capture.raw_sql import first_word, is_ddl

if TYPE_CHECKING:
    from tidyrows.keys import RowKey

_PART = r'(?:[\w$]+|"(?:[^"]|"")+"|`(?:[^`]|``)+`|\[[^\]]+\])'
_NAME = rf"({_PART}(?:\s*\.\s*{_PART})*)"
_WRITES = re.compile(
    r"\b(?:INSERT\s+(?:(?:LOW_PRIORITY|DELAYED|HIGH_PRIORITY|IGNORE)\s+|OR\s+\w+\s+)*(?:INTO\s+)?"
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
# A statement that begins with one of these may write and name no table: a procedure, a block.
_UNCLEAR = frozenset({"CALL", "DO", "EXEC", "EXECUTE", "LOAD"})
# CREATE DATABASE may name another database as its template, to which nobody may be connected.
_EXCLUSIVE = re.compile(r"\s*(?:DROP|ALTER|CREATE)\s+(?:DATABASE|SCHEMA)\b", re.IGNORECASE)

WrittenName = tuple[str | None, str]
"""A table as it is written: the schema, None where there is none, and the name."""


@dataclass(frozen=True, slots=True)
class SqlScan:
    """What one SQL string does."""

    written: frozenset[WrittenName]
    read: frozenset[WrittenName]
    ddl: bool  # it may create or drop tables
    dropped: frozenset[WrittenName]
    unclear: bool  # it may write, and does not name the table
    exclusive: bool  # it may need a database to which nobody is connected


@lru_cache(maxsize=4096)
def scan(sql: str) -> SqlScan:
    """Scan one SQL string."""
    written = frozenset(written_name(match[1]) for match in _WRITES.finditer(sql))
    return SqlScan(
        written=written,
        read=frozenset(written_name(match[1]) for match in _READS.finditer(sql)) - written,
        ddl=is_ddl(sql),
        dropped=frozenset(written_name(n) for m in _DROPS.finditer(sql) for n in m[1].split(",")),
        unclear=first_word(sql) in _UNCLEAR,
        exclusive=_EXCLUSIVE.match(sql) is not None,
    )


def written_name(text: str) -> WrittenName:
    """The table of a name as it is written in SQL."""
    parts = [_unquoted(part) for part in _PIECE.findall(text)]
    return (parts[-2] if len(parts) > 1 else None), parts[-1]


def _unquoted(part: str) -> str:
    if part[0] in '"`':
        return part[1:-1].replace(part[0] * 2, part[0])
    return part[1:-1] if part[0] == "[" else part


@dataclass(slots=True)
class DatabaseObservations:
    """What was observed of one database."""

    written: set[WrittenName] = field(default_factory=set)
    read: set[WrittenName] = field(default_factory=set)
    ddl: bool = False
    dropped: set[WrittenName] = field(default_factory=set)
    unclear: bool = False

    @property
    def writes(self) -> bool:
        """Whether a statement of this process may have written."""
        return bool(self.written) or self.ddl or self.unclear


@dataclass(slots=True)
class Observations:
    """What was observed of all databases."""

    databases: dict[str, DatabaseObservations] = field(default_factory=dict)
    loaded: set[RowKey] = field(default_factory=set)  # by the ORM
    inserted: set[RowKey] = field(default_factory=set)  # committed or not
    # ``inserted``, ``updated`` or ``deleted``
    committed: list[tuple[str, RowKey]] = field(default_factory=list)
    unnamed_inserts: set[str] = field(default_factory=set)  # tables; the keys are not known

    def of(self, database: str) -> DatabaseObservations:
        """The observations of one database."""
        return self.databases.setdefault(database, DatabaseObservations())
