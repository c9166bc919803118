"""A block of work that is tracked and cleaned, written in few words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from tidyrows import CleanupError, CleanupManager, ResourceTracker

INTEGER = {"primary_key": True, "autoincrement": False}


def insert(engine: sa.Engine, *batches: tuple[sa.Table, list[Mapping[str, Any]]]) -> None:
    """Insert and commit rows, table by table."""
    with engine.begin() as connection:
        for table, rows in batches:
            for row in rows:
                connection.execute(sa.insert(table).values(row))


def tracked(engine: sa.Engine, *batches: tuple[sa.Table, list[Mapping[str, Any]]]) -> Any:
    """A tracker that has seen these rows committed, and listens no more."""
    tracker = ResourceTracker(engine)
    tracker.start()
    try:
        insert(engine, *batches)
    finally:
        tracker.stop()
    return tracker


def left_over(manager: CleanupManager) -> dict[tuple[str, Any], str]:
    """Run a cleanup that must fail; the cause for each row, by table and key."""
    try:
        manager.cleanup()
    except CleanupError as error:
        assert error.leftovers == manager.report.leftovers
        return {
            (leftover.table.name, leftover.row.key if len(leftover.row.key) > 1 else
             leftover.row.key[0]): leftover.cause
            for leftover in error.leftovers
        }  # fmt: skip  # a mapping in one look
    raise AssertionError(f"nothing was left over: {manager.report}")


def table(metadata: sa.MetaData, name: str, *columns: sa.Column[Any], **options: Any) -> sa.Table:
    """A table with an integer key ``id`` that nobody generates."""
    return sa.Table(name, metadata, sa.Column("id", sa.Integer, **INTEGER), *columns, **options)


def reference(name: str, target: str, **options: Any) -> sa.Column[Any]:
    """A column that references ``target``; NOT NULL unless told otherwise."""
    keys = {
        option: options.pop(option)
        for option in ("ondelete", "deferrable", "initially", "use_alter")
        if option in options
    }
    constraint = f"fk_{name}_{target.replace('.', '_')}"
    return sa.Column(
        name, sa.ForeignKey(target, name=constraint, **keys), **{"nullable": False, **options}
    )
