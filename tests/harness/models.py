"""A zoo of models: one of each kind that the behaviour suite has to handle.

``Base`` works on every database. ``DeferrableBase`` holds what the MySQL family cannot declare.
"""

from __future__ import annotations

import tempfile
import uuid
from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

# Named constraints, without which SQLAlchemy cannot drop tables that form a cycle.
NAMING = {
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
}


class Base(DeclarativeBase):
    metadata = sa.MetaData(naming_convention=NAMING)


class DeferrableBase(DeclarativeBase):
    metadata = sa.MetaData(naming_convention=NAMING)


class PublicIdType(sa.types.TypeDecorator[str]):
    """In Python ``pub_17``, in the database the integer 17."""

    impl = sa.Integer
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> int | None:
        if value is None:
            return None
        assert value.startswith("pub_"), value  # the database's value must never come this way
        return int(value.removeprefix("pub_"))

    def process_result_value(self, value: int | None, dialect: sa.Dialect) -> str | None:
        return None if value is None else f"pub_{value}"


# --- people who belong to something: a NOT NULL parent, a nullable self-reference, many-to-many

user_groups = sa.Table(
    "user_groups",
    Base.metadata,
    sa.Column("user_id", sa.ForeignKey("users.id"), primary_key=True),
    sa.Column("group_id", sa.ForeignKey("groups.id"), primary_key=True),
)


class Org(Base):
    __tablename__ = "orgs"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(40))
    users: Mapped[list[User]] = relationship(back_populates="org")


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(sa.String(60), unique=True)
    name: Mapped[str | None] = mapped_column(sa.String(40))
    org_id: Mapped[int] = mapped_column(sa.ForeignKey("orgs.id"))
    manager_id: Mapped[int | None] = mapped_column(sa.ForeignKey("users.id"))
    org: Mapped[Org] = relationship(back_populates="users")
    manager: Mapped[User | None] = relationship(remote_side="User.id")
    groups: Mapped[list[Group]] = relationship(secondary=user_groups, back_populates="users")
    orders: Mapped[list[Order]] = relationship(back_populates="user")


class Group(Base):
    __tablename__ = "groups"  # a reserved word on MySQL 8
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(40))
    users: Mapped[list[User]] = relationship(secondary=user_groups, back_populates="groups")


# --- a composite key that contains the foreign key


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(sa.ForeignKey("users.id"))
    note: Mapped[str | None] = mapped_column(sa.String(80))
    user: Mapped[User] = relationship(back_populates="orders")
    lines: Mapped[list[OrderLine]] = relationship(
        back_populates="order", cascade="all, delete-orphan"
    )


class OrderLine(Base):
    __tablename__ = "order_lines"
    order_id: Mapped[int] = mapped_column(sa.ForeignKey("orders.id"), primary_key=True)
    line_no: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    sku: Mapped[str] = mapped_column(sa.String(20))
    quantity: Mapped[int] = mapped_column(default=1)
    order: Mapped[Order] = relationship(back_populates="lines")


# --- joined inheritance, three tables deep


class Person(Base):
    __tablename__ = "persons"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(sa.String(20))
    name: Mapped[str] = mapped_column(sa.String(40))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}  # noqa: RUF012 -- SQLAlchemy's way


class Employee(Person):
    __tablename__ = "employees"
    id: Mapped[int] = mapped_column(sa.ForeignKey("persons.id"), primary_key=True)
    salary: Mapped[int] = mapped_column(default=1000)
    __mapper_args__ = {"polymorphic_identity": "employee"}  # noqa: RUF012 -- SQLAlchemy's way


class Engineer(Employee):
    __tablename__ = "engineers"
    id: Mapped[int] = mapped_column(sa.ForeignKey("employees.id"), primary_key=True)
    language: Mapped[str] = mapped_column(sa.String(20), default="Python")
    __mapper_args__ = {"polymorphic_identity": "engineer"}  # noqa: RUF012 -- SQLAlchemy's way


# --- single-table inheritance


class Animal(Base):
    __tablename__ = "animals"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(sa.String(20))
    name: Mapped[str] = mapped_column(sa.String(40))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}  # noqa: RUF012 -- SQLAlchemy's way


class Dog(Animal):
    __mapper_args__ = {"polymorphic_identity": "dog"}  # noqa: RUF012 -- SQLAlchemy's way


class Cat(Animal):
    __mapper_args__ = {"polymorphic_identity": "cat"}  # noqa: RUF012 -- SQLAlchemy's way


# --- keys that are no integers


class Document(Base):
    """A key that Python makes: native on PostgreSQL, and on MariaDB from SQLAlchemy 2.1 on."""

    __tablename__ = "documents"
    id: Mapped[uuid.UUID] = mapped_column(sa.Uuid, primary_key=True, default=uuid.uuid4)
    title: Mapped[str] = mapped_column(sa.String(40))


class Currency(Base):
    """A natural key: the next stranger's 'USD' is the same key."""

    __tablename__ = "currencies"
    code: Mapped[str] = mapped_column(sa.String(3), primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(40))


class Ticket(Base):
    """A generated key whose Python value is not the database's."""

    __tablename__ = "tickets"
    id: Mapped[str] = mapped_column(PublicIdType, primary_key=True)
    title: Mapped[str] = mapped_column(sa.String(40))


# --- cycles of tables


class Team(Base):
    """One way of the cycle is nullable."""

    __tablename__ = "teams"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(40))
    captain_id: Mapped[int | None] = mapped_column(sa.ForeignKey("players.id", use_alter=True))
    captain: Mapped[Player | None] = relationship(foreign_keys=[captain_id], post_update=True)


class Player(Base):
    __tablename__ = "players"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(40))
    team_id: Mapped[int] = mapped_column(sa.ForeignKey("teams.id"))
    team: Mapped[Team] = relationship(foreign_keys=[team_id])


class Chicken(Base):
    """NOT NULL both ways and not deferrable: see :func:`harness.loops.insert_loop`."""

    __tablename__ = "chickens"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    egg_id: Mapped[int] = mapped_column(sa.ForeignKey("eggs.id", use_alter=True))


class Egg(Base):
    __tablename__ = "eggs"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    chicken_id: Mapped[int] = mapped_column(sa.ForeignKey("chickens.id"))


class Node(Base):
    """A NOT NULL self-reference: a root points at itself."""

    __tablename__ = "nodes"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    parent_id: Mapped[int] = mapped_column(sa.ForeignKey("nodes.id"))


# --- tables that are called as our own SQL calls something, or once did, or as SQLAlchemy does

OWN_NAMES = (
    *("parent", "child", "lender", "sent", "ours", "held", "deleted_0", "j", "k", "t"),
    *("tidyrows_row", "tidyrows_keys", "tidyrows_inserted", "anon_1", "parent_1"),
)
OWN_TABLES = [
    sa.Table(
        name,
        Base.metadata,
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("id_1", sa.ForeignKey(f"{name}.id")),  # as SQLAlchemy calls a value for ``id``
    )
    for name in OWN_NAMES
]


_deferred: dict[str, Any] = {"deferrable": True, "initially": "DEFERRED"}


class Yin(DeferrableBase):
    """NOT NULL both ways, checked at COMMIT: PostgreSQL and SQLite only."""

    __tablename__ = "yins"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    yang_id: Mapped[int] = mapped_column(sa.ForeignKey("yangs.id", use_alter=True, **_deferred))


class Yang(DeferrableBase):
    __tablename__ = "yangs"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    yin_id: Mapped[int] = mapped_column(sa.ForeignKey("yins.id", **_deferred))


def _copied(metadata: sa.MetaData) -> sa.MetaData:
    copy = sa.MetaData(naming_convention=NAMING)
    for table in metadata.tables.values():
        table.to_metadata(copy)
    return copy


# Of each backend its own: create_all on one that can ALTER marks the constraints of a cycle as made
# by ALTER for ever after, and SQLite would leave them out.
_METADATA = {
    backend: tuple(map(_copied, (Base.metadata, DeferrableBase.metadata)))
    for backend in ("sqlite", "postgresql", "mysql")
}


def zoo_metadata(backend: str) -> tuple[sa.MetaData, ...]:
    """The tables of the zoo that a database can have, to be created there and nowhere else."""
    if backend == "mysql":
        return _METADATA[backend][:1]
    return _METADATA[backend]


@cache
def zoo_file() -> bytes:
    """An SQLite file with the tables of the zoo: to copy it is faster than to make them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "zoo.db")
        engine = sa.create_engine(sa.URL.create("sqlite", database=str(file)))
        with engine.begin() as connection:
            connection.exec_driver_sql("BEGIN")  # or each table would be a transaction
            for metadata in zoo_metadata("sqlite"):
                metadata.create_all(connection)
        engine.dispose()
        return file.read_bytes()
