"""What the user selects of a tracker: rows that it shall own, and rows that it owns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.capture.changes import Inserted
from tidyrows.errors import TidyRowsError
from tidyrows.key_json import to_project_values
from tidyrows.keys import KeyedTable, RowKey, TableName
from tidyrows.tracking import named_rows, tags
from tidyrows.tracking.inheritance import table_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tidyrows.retry import RetryPolicy
    from tidyrows.tracking.journals import Journals
    from tidyrows.tracking.sessions import Sessions
    from tidyrows.tracking.store import Store
    from tidyrows.tracking.tags import Whose
    from tidyrows.worker import WorkerContext


class Selection:
    """Rows that the user names, and questions about rows."""

    def __init__(
        self, context: WorkerContext, sessions: Sessions, store: Store, journals: Journals
    ) -> None:
        self._context = context
        self._sessions = sessions
        self._engines = sessions.engines
        self._store = store
        self._journals = journals
        self._late: list[Callable[[], int]] = []

    # -- rows that the user names --------------------------------------------------------------

    def track(self, *instances: Any) -> None:
        """See :meth:`ResourceTracker.track`."""
        self._sessions.refuse_blocking("track(...)")
        rows = [
            row for each in instances for row in named_rows.rows_of_instance(self._sessions, each)
        ]
        for table, key in rows:
            self._hold_committed(table, [key])

    def track_rows(self, table: Any, keys: Iterable[Any]) -> None:
        """See :meth:`ResourceTracker.track_rows`."""
        self._sessions.refuse_blocking("track_rows(...)")
        for keyed, stored in named_rows.named_rows(self._sessions, table, keys):
            self._hold_committed(keyed, stored)

    def track_query(self, select: sa.Select[Any], *, late: bool) -> int:
        """See :meth:`ResourceTracker.track_query`."""
        self._sessions.refuse_blocking("track_query(...)")
        if late:
            named_rows.selected_model(select)
            self._late.append(lambda: self.track_query(select, late=False))
            return 0
        found, count = named_rows.rows_of_query(self._sessions, select)
        for keyed, keys in found:
            self.hold(keyed, keys)
        return count

    def track_tagged(self, column: Any, template: str, *, whose: Whose, late: bool) -> int:
        """See :meth:`ResourceTracker.track_tagged`."""
        self._sessions.refuse_blocking("track_tagged(...)")
        tag = self._context.tag
        if late:
            tags.refuse_unusable(tag, column, template, whose)
            self._late.append(lambda: self.track_tagged(column, template, whose=whose, late=False))
            return 0
        found = tags.rows_of_tag(self._sessions, tag, column, template, whose)
        for keyed, keys in found:
            self.hold(keyed, keys)
        return max((len(keys) for _keyed, keys in found), default=0)

    def run_late(self, retry: RetryPolicy) -> list[Exception]:
        """Run the queries that a cleanup begins with; returns their errors.

        One query that fails keeps no other from being run, and no row from being deleted.
        """
        errors: list[Exception] = []
        for query in list(self._late):
            try:
                retry.run(query, is_transient=self._engines.is_transient)
            except (sa.exc.SQLAlchemyError, TidyRowsError) as error:
                errors.append(error)
        return errors

    def hold(self, table: KeyedTable, keys: list[Any]) -> None:
        """Hold rows that the user named, and record them in the ledger."""
        named = Inserted(table, keys, named=True)
        self._store.apply(named)
        self._journals.add(named)

    def _hold_committed(self, table: KeyedTable, keys: list[Any]) -> None:
        """The same for rows that may be pending: such an insert counts when it is committed."""
        self._engines.resolve()  # an insert that is committed is pending no more
        pending = set(self._engines.pending_keys(table.table))
        self.hold(table, [key for key in keys if key not in pending] if pending else keys)

    # -- questions -----------------------------------------------------------------------------

    def mine(self, model: Any) -> sa.ColumnElement[bool]:
        """See :meth:`ResourceTracker.mine`."""
        table = table_of(model)
        self._engines.resolve()
        keys: list[Any] = []
        for held in self._store.snapshot():
            if _is_of(held.table, table):
                dialect = self._engines.of(held.table.name.database).dialect
                keys.extend(to_project_values(held.table, held.keys.in_order(), table, dialect))
        keys.extend(self._engines.pending_keys(table))
        columns = tuple(table.primary_key)
        if len(columns) == 1 and isinstance(columns[0].type, sa.Integer):
            # written into the statement: there may be more keys than it takes parameters
            return columns[0].in_(sa.bindparam(None, keys, expanding=True, literal_execute=True))
        if len(columns) == 1:
            return columns[0].in_(keys)
        # one OR per row: a tuple IN scans the whole table on SQLite
        return sa.or_(
            sa.false(),
            *(
                sa.and_(*(column == value for column, value in zip(columns, key, strict=True)))
                for key in keys
            ),
        )

    def explain(self, row: Any) -> str:
        """See :meth:`ResourceTracker.explain`."""
        if isinstance(row, RowKey):
            key = row.key[0] if len(row.key) == 1 else row.key
            return self._explain_key(row.table, key, str(row))
        return "\n".join(
            self._explain_key(table.name, key, str(table.row(key)))
            for table, key in named_rows.rows_of_instance(self._sessions, row)
        )

    def _explain_key(self, name: TableName, key: Any, label: str) -> str:
        self._engines.resolve()
        held = next((held for held in self._store.snapshot() if held.table.name == name), None)
        if held is not None and key in held.told:
            return (
                f"{label} is ours: the tracker was told of it (track, track_rows or track_query)."
            )
        if held is not None and key in held.keys:
            return (
                f"{label} is ours: its INSERT was committed while the tracker of "
                f"{self._context.tag} was listening."
            )
        if held is not None and key in held.doubtful:
            return (
                f"{label} is in doubt: its INSERT was seen, and the answer to its COMMIT was lost. "
                f"It is deleted only if nobody else can hold this key."
            )
        for change in self._engines.pending_changes():
            if change.table.name == name and key in change.keys:
                return f"{label} is not ours yet: its INSERT is not committed."
        return (
            f"{label} is not ours: no committed INSERT of it was seen, and nobody told the tracker."
        )


def _is_of(held: KeyedTable, table: sa.Table) -> bool:
    """Whether held rows are of this Table; ``from_json`` knows them by reflected ones."""
    if held.table.metadata is table.metadata:
        return held.table is table
    return held.table.name == table.name and table.schema in {None, held.name.schema}
