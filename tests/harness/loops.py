"""Rows that reference each other: no order of INSERTs is right for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from harness.models import Chicken, Egg, Node, Yang, Yin


def insert_loop(
    connection: sa.Connection, *batches: tuple[Any, Sequence[Mapping[str, Any]]]
) -> None:
    """Insert rows of several tables at once, whatever they reference among themselves.

    PostgreSQL checks at the end of a statement, so all go in one; SQLite defers to COMMIT; the
    MySQL family can do neither, and does not look.

    Args:
        connection: in a transaction, which the caller commits.
        batches: a mapped class or table, and its rows by column name.

    Example:
        >>> insert_loop(c, (Chicken, [{"id": 1, "egg_id": 2}]), (Egg, [{"id": 2, "chicken_id": 1}]))
    """
    inserts = [
        sa.insert(sa.inspect(target).selectable).values(list(rows)) for target, rows in batches
    ]
    if connection.dialect.name == "postgresql":
        whole = sa.select(sa.literal(1))
        for number, insert in enumerate(inserts):
            whole = whole.add_cte(insert.cte(f"batch_{number}"))
        connection.execute(whole)
        return
    sqlite = connection.dialect.name == "sqlite"
    if sqlite:
        # The driver opens no transaction for a PRAGMA, and outside of one it has no effect.
        if not connection.connection.dbapi_connection.in_transaction:
            connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql("PRAGMA defer_foreign_keys = ON")
    else:
        connection.exec_driver_sql("SET foreign_key_checks = 0")
    try:
        for insert in inserts:
            connection.execute(insert)
    finally:
        if not sqlite:
            connection.exec_driver_sql("SET foreign_key_checks = 1")


def chicken_and_egg(connection: sa.Connection, chicken: int, egg: int) -> None:
    """A pair that nobody can insert or delete alone."""
    insert_loop(
        connection,
        (Chicken, [{"id": chicken, "egg_id": egg}]),
        (Egg, [{"id": egg, "chicken_id": chicken}]),
    )


def yin_and_yang(connection: sa.Connection, yin: int, yang: int) -> None:
    """The same where the schema defers the check to COMMIT."""
    connection.execute(sa.insert(Yin).values(id=yin, yang_id=yang))
    connection.execute(sa.insert(Yang).values(id=yang, yin_id=yin))


def root_node(connection: sa.Connection, node: int) -> None:
    """A row that points at itself."""
    connection.execute(sa.insert(Node).values(id=node, parent_id=node))
