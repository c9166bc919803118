"""Primary keys of every type, and tables to hold them."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import uuid
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from tidyrows.keys import KeyedTable, TableName


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"
    BLUE = "blue"
    GREY = "it's, grey"


class Doubled(sa.TypeDecorator[int]):
    """The database holds twice the Python value."""

    impl = sa.Integer
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value * 2

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value // 2


class Boxed:
    """A Python value that compares with nothing but itself."""

    def __init__(self, inside: str) -> None:
        self.inside = inside


class Boxes(sa.TypeDecorator[Boxed]):
    impl = sa.String(30)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else f"box-{value.inside}"

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else Boxed(value[4:])


class Wrapped(sa.TypeDecorator[str]):
    """Its values reach the database through an SQL function."""

    impl = sa.String(30)
    cache_ok = True

    def bind_expression(self, bindvalue: Any) -> Any:
        return sa.func.lower(bindvalue, type_=sa.String())


def keyed(engine: sa.Engine, table: sa.Table, schema: str | None = None) -> KeyedTable:
    """The table where it really is."""
    if schema is None:
        schema = {"postgresql": "public", "sqlite": "main"}.get(
            engine.dialect.name, str(engine.url.database)
        )
    return KeyedTable(TableName(str(engine.url), schema, table.name), table)


def integers(n: int) -> int:
    return n * 1000 - 4000


def uuids(n: int) -> uuid.UUID:
    return uuid.UUID(int=n * 7**30, version=4)  # MariaDB refuses values that no UUID can have


KINDS: dict[str, tuple[sa.types.TypeEngine[Any], Callable[[int], Any]]] = {
    "integer": (sa.Integer(), integers),
    "biginteger": (sa.BigInteger(), lambda n: 2**63 - 1 - n),
    "string": (sa.String(40), lambda n: f"k{n}\\ \"q\" 'é€' {{,}} %s :x"),
    "looks like a number": (sa.String(40), lambda n: f"00{n}"),
    "emoji": (sa.String(40), lambda n: f"\U0001f600{n}"),
    "char": (sa.CHAR(12), lambda n: f"c{n}"),
    "uuid": (sa.Uuid(), uuids),
    "uuid text": (sa.Uuid(native_uuid=False), uuids),
    "uuid string": (sa.Uuid(as_uuid=False), lambda n: str(uuids(n))),
    "type decorator": (Doubled(), integers),
    "boxes": (Boxes(), lambda n: Boxed(str(n))),
    "bind expression": (Wrapped(), lambda n: f"key {n}"),
    "binary": (
        sa.LargeBinary().with_variant(mysql.VARBINARY(20), "mysql", "mariadb"),
        lambda n: bytes([0, 255, 92, 39, 34, 37, n]),
    ),
    "date": (sa.Date(), lambda n: dt.date(2020, 1, n)),
    "datetime": (
        sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb"),
        lambda n: dt.datetime(2020, 1, n, 13, 4, 5, 600 + n),
    ),
    "datetime with zone": (
        sa.DateTime(timezone=True),
        lambda n: dt.datetime(2020, 1, n, 13, 4, 5, tzinfo=dt.UTC),
    ),
    "time": (sa.Time(), lambda n: dt.time(3, 4, n)),
    "interval": (sa.Interval(), lambda n: dt.timedelta(days=n, seconds=n)),
    "numeric": (sa.Numeric(12, 3), lambda n: decimal.Decimal(n) / 8),
    "float": (sa.Double(), lambda n: n / 8),
    "enum": (sa.Enum(Colour), lambda n: list(Colour)[n - 1]),
    "enum text": (sa.Enum(Colour, native_enum=False), lambda n: list(Colour)[n - 1]),
    "boolean": (sa.Boolean(), lambda n: n % 2 == 0),
}

COMPOSITES: dict[str, tuple[str, ...]] = {
    "two integers": ("integer", "biginteger"),
    "text and integer": ("string", "integer"),
    "uuid and text": ("uuid", "char"),
    "date and numeric": ("date", "numeric"),
    "three": ("enum", "datetime", "type decorator"),
    "bind expression": ("bind expression", "integer"),
    "binary": ("binary", "uuid text"),
}


def make(engine: sa.Engine, table: sa.Table, rows: list[tuple[Any, ...]]) -> None:
    table.metadata.create_all(engine)
    names = [column.name for column in table.columns]
    with engine.begin() as connection:
        connection.execute(sa.insert(table), [dict(zip(names, row, strict=True)) for row in rows])
