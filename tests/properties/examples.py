"""A clean database for each example: hypothesis runs many in one test."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from harness.bystanders import Snapshot, snapshot
from harness.databases import Database

THEIRS = "theirs"
"""What the column ``owner`` says of strangers' rows; it says something else of ours."""


@contextmanager
def emptied(database: Database) -> Iterator[Database]:
    """The test's database, empty again at the end of the block."""
    if database.backend != "sqlite":
        try:
            yield database
        finally:
            database.close()
        return
    another = Database(database.target, database.url)
    try:
        yield another
    finally:
        another.close()
        Path(str(database.url.database)).unlink(missing_ok=True)


def of_strangers(engine: sa.Engine, tables: Iterable[sa.Table]) -> Snapshot:
    """The part of the whole database that is not ours."""
    place = {table.name: list(table.columns.keys()).index("owner") for table in tables}
    return Snapshot({
        table: [row for row in rows if row[place[table.partition(".")[2]]] == THEIRS]
        for table, rows in snapshot(engine).items()
    })  # fmt: skip  # a table, then its rows
