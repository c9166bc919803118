"""What was observed of the suite's SQL during one test or one shared fixture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tidyrows.audit.sql_scan import WrittenName
    from tidyrows.keys import RowKey

Operation = Literal["inserted", "updated", "deleted"]


@dataclass(slots=True)
class DatabaseObservations:
    """What was observed of one database.

    Attributes:
        written: tables that were written to.
        unnamed_inserts: names of tables that got rows whose keys are not known.
        read: tables that were read from.
        ddl: tables may have been created or dropped.
        dropped: tables that were dropped, and perhaps created again.
        unclear: a statement may have written that names no table.
    """

    written: set[WrittenName] = field(default_factory=set)
    unnamed_inserts: set[str] = field(default_factory=set)
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
    """What was observed of all databases.

    Attributes:
        databases: by name.
        loaded: rows that the ORM loaded.
        inserted: rows whose INSERT was seen, committed or not.
        committed: operations on rows by key, in transactions that were committed.
    """

    databases: dict[str, DatabaseObservations] = field(default_factory=dict)
    loaded: set[RowKey] = field(default_factory=set)
    inserted: set[RowKey] = field(default_factory=set)
    committed: list[tuple[Operation, RowKey]] = field(default_factory=list)

    def of(self, database: str) -> DatabaseObservations:
        """The observations of one database."""
        return self.databases.setdefault(database, DatabaseObservations())
