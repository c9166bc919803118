"""The tables of the kills beside those of the storm's shop: keys of every kind, and none."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

import sqlalchemy as sa
from sqlalchemy import orm

from storm import shop


class Base(orm.DeclarativeBase):
    """Metadata of their own."""


class Note(Base):
    """SQLite gives its keys again."""

    __tablename__ = "notes"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    text: orm.Mapped[str] = orm.mapped_column(sa.String(80))


class Token(Base):
    __tablename__ = "tokens"
    id: orm.Mapped[uuid.UUID] = orm.mapped_column(primary_key=True, default=uuid.uuid4)
    text: orm.Mapped[str] = orm.mapped_column(sa.String(80))


class Currency(Base):
    """Its keys are anybody's who comes first."""

    __tablename__ = "currencies"
    code: orm.Mapped[str] = orm.mapped_column(sa.String(80), primary_key=True)
    text: orm.Mapped[str] = orm.mapped_column(sa.String(80))


class Seat(Base):
    """So are these."""

    __tablename__ = "seats"
    hall: orm.Mapped[str] = orm.mapped_column(sa.String(40), primary_key=True)
    number: orm.Mapped[int] = orm.mapped_column(primary_key=True, autoincrement=False)
    text: orm.Mapped[str] = orm.mapped_column(sa.String(80))


log_lines = sa.Table(
    "log_lines",
    Base.metadata,
    sa.Column("text", sa.String(80)),
    sa.Column("n", sa.Integer),
)


class Node(Base):
    """Workers hang theirs on each other's, in circles too."""

    __tablename__ = "nodes"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    text: orm.Mapped[str] = orm.mapped_column(sa.String(80))
    next_id: orm.Mapped[int | None] = orm.mapped_column(sa.ForeignKey("nodes.id"), index=True)


class Pin(Base):
    """It goes with its node, if nobody has entered it."""

    __tablename__ = "pins"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    node_id: orm.Mapped[int] = orm.mapped_column(
        sa.ForeignKey("nodes.id", ondelete="CASCADE"), index=True
    )


OTHER = "other"
other_notes = sa.Table(
    Note.__tablename__,
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("text", sa.String(80)),
    schema=OTHER,
)
"""As those of the first schema, keys too; its real name is given to each child."""

ALL = (shop.Base.metadata, Base.metadata)
LEDGER = "tidyrows_ledger"
PLACES = 6
"""How many natural keys each worker has, over and over again."""


def codes(prefix: str) -> list[str]:
    """The currencies that a worker makes."""
    return [f"{prefix}-{number}" for number in range(PLACES)]


def free(
    connection: sa.Connection, prefixes: Iterable[str]
) -> tuple[list[str], list[tuple[str, int]]]:
    """The codes and seats of some workers that nobody has."""
    taken = {*connection.scalars(sa.select(Currency.code))}
    seats = {tuple(row) for row in connection.execute(sa.select(Seat.hall, Seat.number))}
    return (
        [code for prefix in prefixes for code in codes(prefix) if code not in taken],
        [(hall, n) for hall in prefixes for n in range(PLACES) if (hall, n) not in seats],
    )
