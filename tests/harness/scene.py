"""A test with everybody in it: strangers, us, and the application, which nobody listens to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from harness.blocks import insert, tracked
from harness.bystanders import Snapshot, snapshot
from harness.databases import Database
from tidyrows import CleanupManager, CleanupReport, ResourceTracker

Batch = tuple[sa.Table, list[Mapping[str, Any]]]


class Scene:
    """Who writes what, and what is there in the end.

    Args:
        database: where.
        metadata: tables to make first.

    Attributes:
        engine: ours; trackers listen on it.
        outside: strangers' and the application's.

    Example:
        >>> scene = Scene(database, metadata)
        >>> scene.strangers((parents, [{"id": 1}]))
        >>> tracker = scene.ours((parents, [{"id": 2}]))
        >>> scene.application((children, [{"id": 1, "parent_id": 2}]))
        >>> report = scene.clean(tracker)
        >>> scene.assert_left()
    """

    def __init__(self, database: Database, metadata: sa.MetaData | None = None) -> None:
        self.database = database
        self.engine = database.engine()
        self.outside = database.engine()
        if metadata is not None:
            metadata.create_all(self.outside)
        self._expected = snapshot(self.outside)

    def strangers(self, *batches: Batch) -> None:
        """Rows that must be there afterwards, exactly as they were."""
        insert(self.outside, *batches)
        self._expected = snapshot(self.outside)

    def ours(self, *batches: Batch) -> ResourceTracker:
        """Rows that a tracker saw."""
        tracker: ResourceTracker = tracked(self.engine, *batches)
        return tracker

    def application(self, *batches: Batch) -> None:
        """Rows that no tracker saw."""
        insert(self.outside, *batches)

    def run(self, *statements: str) -> None:
        """DDL or anything else, as the application; committed."""
        with self.outside.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def clean(self, tracker: ResourceTracker, **options: Any) -> CleanupReport:
        """A cleanup that must succeed."""
        report = CleanupManager(tracker, **options).cleanup()
        assert not report.leftovers
        return report

    def rows(self, *batches: Batch) -> dict[str, list[tuple[Any, ...]]]:
        """Rows as the database holds them, by qualified table name."""
        default = sa.inspect(self.outside).default_schema_name
        found: dict[str, list[tuple[Any, ...]]] = {}
        for table, rows in batches:
            name = f"{table.schema or default}.{table.name}"
            columns = [column.name for column in table.columns]
            found.setdefault(name, []).extend(
                tuple(row.get(column) for column in columns) for row in rows
            )
        return found

    def assert_left(self, *batches: Batch) -> None:
        """The whole database: what strangers wrote, these rows, and nothing else."""
        expected: Snapshot = self._expected.plus(self.rows(*batches))
        assert snapshot(self.outside) == expected


def told(found: Mapping[Any, Any]) -> dict[str, list[Any]]:
    """What a report says of rows: their keys by the table's name, a scalar where it is one column.

    Rows without a name are None.
    """
    said: dict[str, list[Any]] = {}
    for name, rows in found.items():
        keys = [row.key if len(row.key) > 1 else row.key[0] for row in rows]
        assert all(row.table == name for row in rows)
        said[name.name] = [*sorted(keys, key=repr), *[None] * (len(rows) - len(keys))]
    return said
