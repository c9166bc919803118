"""The audit without pytest: the tests' own blocks are the tests of the suite."""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from tidyrows.audit.findings import Known, of_rows
from tidyrows.audit.makers import Book, Maker
from tidyrows.audit.observer import Ear
from tidyrows.audit.watches import Watches


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


class Audited:
    """An audit without pytest: the block of each test is what it did."""

    def __init__(self) -> None:
        self.ear = Ear()
        self.watches = Watches(self.ear.be_deaf_to_this_thread, self.ear.deaf)
        self.book = Book(self.watches.sees)
        self.ear.open(self.watches.meet, self.watches.release)

    def test(self, name: str, *, is_test: bool = True) -> None:
        """All that was done since the last one ended was done by this one."""
        who = Maker(name, is_test=is_test)
        heard = self.ear.take()
        self.book.enter(who, self.watches.look(who, heard), heard)

    @property
    def found(self) -> set[tuple[str, str, str, int]]:
        """What each is accused of: the fault, the table, and how many rows."""
        known = Known(self.ear.models, (), self.watches.own, self.watches.is_keyless)
        return {
            (each.test, each.fault.name.lower(), str(each.table).rpartition(".")[2], each.count)
            for each in of_rows(self.book, known)
        }
