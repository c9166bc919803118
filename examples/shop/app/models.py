"""The shop's tables, shared by the application and its tests."""

from __future__ import annotations

from datetime import UTC, datetime
from zlib import crc32

from sqlalchemy import (
    Connection,
    DateTime,
    Engine,
    ForeignKey,
    String,
    create_engine,
    event,
    insert,
    select,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from werkzeug.security import check_password_hash, generate_password_hash

GIFT_CARD = "gift-card"
"""The one product that is always there, and that everybody buys."""


def now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(String(80), unique=True)
    name: Mapped[str] = mapped_column(String(80))
    password_hash: Mapped[str] = mapped_column(String(200))
    last_login: Mapped[datetime | None] = mapped_column(DateTime)


class LoginSession(Base):
    __tablename__ = "login_sessions"
    token: Mapped[str] = mapped_column(String(64), primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    began: Mapped[datetime] = mapped_column(default=now)
    user: Mapped[User] = relationship()


class Product(Base):
    __tablename__ = "products"
    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str] = mapped_column(String(40), unique=True)
    name: Mapped[str] = mapped_column(String(80))
    cents: Mapped[int]
    stock: Mapped[int | None]  # None: there is always more


class BasketItem(Base):
    __tablename__ = "basket_items"
    token: Mapped[str] = mapped_column(
        ForeignKey("login_sessions.token", ondelete="CASCADE"), primary_key=True
    )
    product_id: Mapped[int] = mapped_column(ForeignKey("products.id"), primary_key=True, index=True)
    quantity: Mapped[int]
    product: Mapped[Product] = relationship()


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    placed: Mapped[datetime] = mapped_column(default=now)
    lines: Mapped[list[OrderLine]] = relationship(order_by="OrderLine.id")

    @property
    def cents(self) -> int:
        return sum(line.quantity * line.cents for line in self.lines)


class OrderLine(Base):
    __tablename__ = "order_lines"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"), index=True)
    product_id: Mapped[int] = mapped_column(ForeignKey("products.id"), index=True)
    quantity: Mapped[int]
    cents: Mapped[int]
    product: Mapped[Product] = relationship()


class AuditRow(Base):
    """What happened. It outlives whom it is about: both references may be NULL."""

    __tablename__ = "audit_rows"
    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(default=now)
    action: Mapped[str] = mapped_column(String(40))
    email: Mapped[str] = mapped_column(String(80))
    user_id: Mapped[int | None] = mapped_column(ForeignKey("users.id"), index=True)
    order_id: Mapped[int | None] = mapped_column(ForeignKey("orders.id"), index=True)


def hash_password(password: str) -> str:
    return generate_password_hash(password, method="scrypt:4096:8:1")


def is_password(user: User | None, password: str) -> bool:
    return user is not None and check_password_hash(user.password_hash, password)


def connect(url: str) -> Engine:
    """An engine on the shop's database; SQLite waits for other writers, and keeps foreign keys."""
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def prepare(dbapi, _record):
            dbapi.execute("PRAGMA busy_timeout = 30000")
            dbapi.execute("PRAGMA foreign_keys = ON")

    return engine


def create_schema(engine: Engine) -> None:
    """Make what is not there. One process at a time, however many begin at once."""
    with engine.connect() as connection:
        _wait_for_turn(connection)
        Base.metadata.create_all(connection)
        if connection.scalar(select(Product.id).where(Product.sku == GIFT_CARD)) is None:
            connection.execute(insert(Product).values(sku=GIFT_CARD, name="Gift card", cents=2500))
        connection.commit()


def _wait_for_turn(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    elif connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({crc32(b'shop schema')})")
