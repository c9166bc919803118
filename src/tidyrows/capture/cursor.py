"""Look at each statement before the driver sends it, for what raw SQL strings do.

The rows of a raw INSERT are not tracked, so it triggers a warning. A string may also end or begin a
transaction, change what table names mean, or change the schema.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidyrows.capture import inserts, raw_sql
from tidyrows.capture.sink import INTERNAL

if TYPE_CHECKING:
    import sqlalchemy as sa

    from tidyrows.capture.ownership import Ownership
    from tidyrows.capture.table_resolution import Places
    from tidyrows.capture.transactions import Transactions
    from tidyrows.dialects import Dialect

EVENTS = ("do_execute", "do_executemany", "do_execute_no_params")
"""SQLAlchemy's events of the cursor; each is a method of :class:`CursorEvents`."""


class CursorEvents:
    """The listener at one engine's cursors."""

    def __init__(
        self,
        transactions: Transactions,
        ownership: Ownership,
        places: Places,
        dialect: Dialect,
    ) -> None:
        self._transactions = transactions
        self._ownership = ownership
        self._places = places
        self._dialect = dialect
        self._loses_count = not dialect.counts_when_closed

    def do_execute(self, cursor: Any, sql: str, parameters: Any, context: Any) -> None:
        """Look at what only the cursor sees: raw strings, and an INSERT in the WITH of a SELECT.

        An event of the dialect, not of the connection: on every statement's way, it is cheaper.
        """
        if self._transactions.idle:
            return
        # Before the statement: sqlite3 may begin a transaction for it, and then nobody could tell
        # any more whether the RELEASE before it was a COMMIT.
        if self._transactions.unresolved:
            self._transactions.resolve_on(context.root_connection)
        if context.isddl and self._dialect.ddl_commits:
            self._transactions.before_commit(context.root_connection)
        if context.isinsert:
            if self._loses_count and not context.compiled.effective_returning:
                inserts.keep_count(context)  # the rows of RETURNING are counted as they are
            if sql[:4] == "WITH" and sql.count("INSERT INTO ") > 1:
                self._warn_of_raw_insert(context.root_connection, sql)
            return
        if INTERNAL not in context.execution_options:
            self._look_at(context, sql)

    def _look_at(self, context: Any, sql: str) -> None:
        if context.compiled is None or context.is_text:
            self._raw(context.root_connection, sql, context)
        elif sql[:4] == "WITH":
            self._warn_of_raw_insert(context.root_connection, sql)
        elif not context.isddl and self._dialect.session_setting(sql):
            self._moved(context.root_connection)

    do_executemany = do_execute

    def do_execute_no_params(self, cursor: Any, sql: str, context: Any) -> None:
        """As ``do_execute``."""
        self.do_execute(cursor, sql, (), context)

    def _moved(self, connection: sa.Connection) -> None:
        self._transactions.log(connection).targets.clear()
        self._places.moved(connection)

    def _raw(self, connection: sa.Connection, sql: str, context: Any) -> None:
        if self._dialect.session_setting(sql):
            self._moved(connection)
        if raw_sql.first_word(sql) in {"DELETE", "TRUNCATE"}:
            self._transactions.empty(connection, context, sql)
        move = raw_sql.transaction_move(sql)
        if move is not None:
            self._transactions.move(connection, *move)
        elif raw_sql.is_ddl(sql):
            if self._dialect.ddl_commits:
                self._transactions.before_commit(connection)
            self._tell_of_drop(connection, sql)
            self.ddl(connection)
        self._warn_of_raw_insert(connection, sql)

    def _tell_of_drop(self, connection: sa.Connection, sql: str) -> None:
        """Tell the sink that watches, whose own connections would be in the way of the DROP."""
        watcher, database = self._ownership.watcher, raw_sql.dropped_database(sql)
        if watcher is not None and database is not None:
            watcher.before_drop(connection.engine, database)

    def _warn_of_raw_insert(self, connection: sa.Connection, sql: str) -> None:
        table = raw_sql.inserted_table(sql)
        owner = self._ownership.owner(connection) if table is not None else None
        if owner is not None:
            owner.warn_once(
                ("raw", table),
                f"A raw SQL statement inserted into {table}: nobody can tell which rows it made, "
                f"so they are not tracked and cleanup will not delete them. Write it as "
                f"insert(table), or tell the tracker with tracker.track_query(select(...)) or "
                f"tracker.track_rows(table, keys).",
            )

    def ddl(self, connection: sa.Connection) -> None:
        """The schema was changed; on the MySQL family that has committed."""
        self._transactions.log(connection).targets.clear()
        self._places.changed()
        if self._dialect.ddl_commits:
            self._transactions.commit_unasked(connection)
