"""What was heard of the suite's SQL in one stretch of time: in a test, or in a shared fixture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tidyrows.audit.sql_scan import Name
    from tidyrows.keys import RowKey

Deed = Literal["inserted", "updated", "deleted"]


@dataclass(slots=True)
class HeardThere:
    """What was heard of one database.

    Attributes:
        written: the tables that were written to, by name.
        inserts: those in which rows may have been made that nobody could name.
        read: those that were read from.
        ddl: tables may have been made or dropped.
        dropped: those that were dropped, and perhaps made again.
        unclear: something may have been written that names no table.
    """

    written: set[Name] = field(default_factory=set)
    inserts: set[Name] = field(default_factory=set)
    read: set[Name] = field(default_factory=set)
    ddl: bool = False
    dropped: set[Name] = field(default_factory=set)
    unclear: bool = False

    @property
    def writes(self) -> bool:
        """Whether anything was written, as far as was heard."""
        return bool(self.written) or self.ddl or self.unclear


@dataclass(slots=True)
class Heard:
    """What was heard, of all databases.

    Attributes:
        there: by database.
        loaded: rows that the ORM loaded.
        inserted: rows whose INSERT was seen, committed or not.
        committed: what was done to rows by key, in transactions that were committed.
    """

    there: dict[str, HeardThere] = field(default_factory=dict)
    loaded: set[RowKey] = field(default_factory=set)
    inserted: set[RowKey] = field(default_factory=set)
    committed: list[tuple[Deed, RowKey]] = field(default_factory=list)

    def of(self, database: str) -> HeardThere:
        """What was heard of a database."""
        return self.there.setdefault(database, HeardThere())
