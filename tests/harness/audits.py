"""The audit without pytest: the tests' own blocks are the tests of the suite."""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from tidyrows.audit.databases import WatchedDatabases
from tidyrows.audit.findings import Wording, row_findings
from tidyrows.audit.observer import AuditObserver
from tidyrows.audit.row_history import Maker, RowHistory
from tidyrows.capture.changes import INTERNAL


class Base(DeclarativeBase):
    """Two tables: one with a number for a key."""


class Org(Base):
    """By number."""

    __tablename__ = "orgs"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(40), default="")


class Note(Base):
    """By UUID."""

    __tablename__ = "notes"
    id: Mapped[uuid.UUID] = mapped_column(sa.Uuid, primary_key=True, default=uuid.uuid4)
    text: Mapped[str] = mapped_column(sa.String(40), default="")


def unobserved(engine: sa.Engine) -> sa.Engine:
    """The same engine for what another process does."""
    return engine.execution_options(**{INTERNAL: True})


class Audited:
    """An audit without pytest: the block of each test is what it did."""

    def __init__(self) -> None:
        self.observer = AuditObserver()
        self.watches = WatchedDatabases()
        self.history = RowHistory(self.watches.sees)
        self.observer.open(self.watches.meet, self.watches.release)

    def test(self, name: str, *, is_test: bool = True) -> None:
        """All that was done since the last one ended was done by this one."""
        who = Maker(name, is_test=is_test)
        heard = self.observer.pop_observed()
        self.watches.add_look(self.history, who, heard)

    @property
    def found(self) -> set[tuple[str, str, str, int]]:
        """What each is accused of: the fault, the table, and how many rows."""
        known = Wording(self.observer.models, (), self.watches.own, self.watches.is_keyless)
        return {
            (each.test, each.kind.name.lower(), str(each.table).rpartition(".")[2], each.count)
            for each in row_findings(self.history, known)
        }
