"""A block of work that is tracked and cleaned, written in few words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import count
from typing import Any

import pytest
import sqlalchemy as sa

from tidyrows import CleanupError, CleanupManager, ResourceTracker

_numbers = count(1)
INTEGER = {"primary_key": True, "autoincrement": False}


FORBIDDEN = "the audit forbids it"


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
    with pytest.raises(CleanupError) as caught:
        manager.cleanup()
    assert caught.value.leftovers == manager.report.leftovers
    found = {}
    for leftover in caught.value.leftovers:
        key = leftover.row.key
        found[leftover.table.name, key if len(key) > 1 else key[0]] = leftover.cause
        assert str(leftover.row) in str(caught.value) or "more in error.leftovers" in str(
            caught.value
        )
    return found


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
    # The MySQL family wants names that differ in the whole database.
    key = sa.ForeignKey(target, name=f"fk_{next(_numbers)}", **keys)
    return sa.Column(name, key, **{"nullable": False, **options})


def refuse_deletes(engine: sa.Engine, guarded: sa.Table, ids: Iterable[int]) -> None:
    """Have the database refuse to delete these rows: no SQL of ours knows why, or a way around."""
    listed = ", ".join(map(str, ids))
    name = guarded.name
    match engine.dialect.name:
        case "postgresql":
            ddl = [
                (
                    f"CREATE FUNCTION guard_{name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                    f"IF OLD.id IN ({listed}) THEN RAISE EXCEPTION '{FORBIDDEN}'; END IF; "
                    "RETURN OLD; END $$"
                ),
                (
                    f"CREATE TRIGGER guard_{name} BEFORE DELETE ON {name} FOR EACH ROW "
                    f"EXECUTE FUNCTION guard_{name}()"
                ),
            ]
        case "sqlite":
            ddl = [
                (
                    f"CREATE TRIGGER guard_{name} BEFORE DELETE ON {name} "
                    f"WHEN OLD.id IN ({listed}) BEGIN SELECT RAISE(ABORT, '{FORBIDDEN}'); END"
                )
            ]
        case _:
            ddl = [
                (
                    f"CREATE TRIGGER guard_{name} BEFORE DELETE ON {name} FOR EACH ROW BEGIN "
                    f"IF OLD.id IN ({listed}) THEN SIGNAL SQLSTATE '45000' "
                    f"SET MESSAGE_TEXT = '{FORBIDDEN}'; END IF; END"
                )
            ]
    with engine.begin() as connection:
        for statement in ddl:
            connection.exec_driver_sql(statement)
