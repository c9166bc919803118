"""The MySQL family's catalogue, its blockers, and GET_LOCK for live workers."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sqlalchemy.dialects.mysql import LONGTEXT

from tidyrows.dialects.base import Dialect
from tidyrows.dialects.catalogue import RealTable
from tidyrows.dialects.driver import Loss
from tidyrows.dialects.locks import PATIENCE, Blocker, ConnectionLock, LivenessLock, LockStatements

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import sqlalchemy as sa

    from tidyrows.keys import KeyedTable

_NO_SUCH_TABLE = frozenset({1146, 1049})
_LOG = (
    "SHOW GLOBAL STATUS WHERE Variable_name IN "
    "('Innodb_lsn_current', 'Innodb_redo_log_current_lsn'{})"
)
# MyISAM and Aria write no log of InnoDB's. MySQL counts what it is asked here as written, too.
_WRITTEN = ", 'Handler_write', 'Handler_update', 'Handler_delete'"


class MySQLCatalogue(Dialect):
    """By ``information_schema``, and by SHOW CREATE TABLE."""

    table_options = MappingProxyType({"mysql_charset": "utf8mb4", "mariadb_charset": "utf8mb4"})
    long_text = LONGTEXT(charset="ascii")  # JSON, in which everything else is escaped

    def resolve(self, connection: sa.Connection, schema: str | None, name: str) -> RealTable | None:
        """SHOW CREATE TABLE: alone in telling a temporary table, which hides one of its name."""
        if schema is None:
            schema = self._query(connection, "SELECT DATABASE()")[0][0]
            if schema is None:
                return None
        try:
            row = self._query(connection, f"SHOW CREATE TABLE {_quoted(schema)}.{_quoted(name)}")[0]
        except self._dbapi.Error as error:
            if self.loss(error, dbapi_connection=None) is Loss.EVERYTHING:
                raise  # whatever was done before in this transaction is undone
            # Without the right to look, there still is the table that the INSERT went to.
            missing = self.code(error) in _NO_SUCH_TABLE
            return None if missing else RealTable(schema, "table", plain=False)
        definition = str(row[1]).upper()
        if definition.startswith("CREATE TEMPORARY TABLE"):
            return RealTable(schema, "temporary", plain=False)
        is_table = definition.startswith("CREATE TABLE")
        return RealTable(schema, "table" if is_table else "other", plain=False)

    def schemas_that_reference(self, connection: sa.Connection, schemas: Iterable[str]) -> set[str]:
        """Databases of the whole server: a foreign key may stand in any of them."""
        wanted = [str(schema) for schema in schemas]
        marks = ", ".join(["%s"] * len(wanted))
        rows = connection.exec_driver_sql(
            "SELECT DISTINCT constraint_schema FROM information_schema.referential_constraints "
            f"WHERE unique_constraint_schema IN ({marks})",
            tuple(wanted),
        )
        return {row[0] for row in rows}

    def delete_suppressors(self, connection: sa.Connection, table: KeyedTable) -> list[str]:
        """Triggers before a DELETE, which may write the row again."""
        rows = connection.exec_driver_sql(
            "SELECT trigger_name FROM information_schema.triggers WHERE event_object_schema = %s "
            "AND event_object_table = %s AND event_manipulation = 'DELETE' ORDER BY trigger_name",
            (str(table.name.schema), str(table.name.name)),
        )
        return [f'trigger "{row[0]}"' for row in rows]

    def change_mark(self, connection: sa.Connection, *, lock_timeout: float) -> Any | None:
        """How far InnoDB's log is written; on MariaDB also how many rows, by any engine."""
        mariadb = getattr(self._dialect(), "is_mariadb", False)
        return self._query(connection, _LOG.format(_WRITTEN if mariadb else "")) or None

    def application_schemas(self, connection: sa.Connection) -> list[str]:
        ((database,),) = self._query(connection, "SELECT DATABASE()")
        return [] if database is None else [str(database)]


def _quoted(name: str) -> str:
    # SQLAlchemy's quoting doubles percent signs: wrong for a statement without parameters.
    return "`" + name.replace("`", "``") + "`"


_MARIADB_WAITS = """
information_schema.INNODB_LOCK_WAITS w
JOIN information_schema.INNODB_TRX r ON r.trx_id = w.requesting_trx_id
JOIN information_schema.INNODB_TRX t ON t.trx_id = w.blocking_trx_id"""
# By its manual; not tried.
_MYSQL_8_WAITS = """
performance_schema.data_lock_waits w
JOIN information_schema.INNODB_TRX r ON r.trx_id = w.requesting_engine_transaction_id
JOIN information_schema.INNODB_TRX t ON t.trx_id = w.blocking_engine_transaction_id"""
_BLOCKERS = """
SELECT DISTINCT t.trx_mysql_thread_id, p.USER, p.HOST, p.COMMAND, t.trx_state,
       TIMESTAMPDIFF(SECOND, t.trx_started, NOW()), COALESCE(t.trx_query, p.INFO)
FROM {waits}
LEFT JOIN information_schema.PROCESSLIST p ON p.ID = t.trx_mysql_thread_id
WHERE {condition}"""
# Locks of whole tables are not InnoDB's: whoever has a transaction open may hold them, or whoever
# is connected to the same database (LOCK TABLES).
_STATE = "SELECT STATE FROM information_schema.PROCESSLIST WHERE ID = {waiter}"
_CANDIDATES = """
SELECT p.ID, p.USER, p.HOST, p.COMMAND, p.STATE, p.TIME, p.INFO
FROM information_schema.PROCESSLIST p
JOIN information_schema.PROCESSLIST me ON me.ID = {waiter}
WHERE p.DB = me.DB AND p.ID NOT IN (me.ID, CONNECTION_ID())
      AND (p.STATE IS NULL OR p.STATE NOT LIKE 'Waiting%')
ORDER BY 1"""
_NEEDS_PROCESS = 1227


class MySQLLocks(Dialect):
    """InnoDB's lock waits, which only the PROCESS right shows, else the process list."""

    def blockers(self, cursor: Any, waiter: int) -> list[Blocker]:
        """By InnoDB's lock waits, else by the process list."""
        is_mariadb = bool(getattr(self._dialect(), "is_mariadb", False))
        if is_mariadb:
            cursor.execute("SET max_statement_time = 1.5")
        waits = _MARIADB_WAITS if is_mariadb else _MYSQL_8_WAITS
        condition = f"r.trx_mysql_thread_id = {int(waiter)}"
        try:
            rows = _rows(cursor, _BLOCKERS.format(waits=waits, condition=condition))
        except self._dbapi.Error as refused:
            if refused.args[:1] != (_NEEDS_PROCESS,):
                raise
            # That right alone shows InnoDB's waits, and connections of other users.
            candidates = _connected(cursor, waiter)
            if not candidates:
                raise
            return candidates
        if rows:
            return [_blocker(row) for row in rows]
        state = _rows(cursor, _STATE.format(waiter=int(waiter)))
        if not state or not str(state[0][0]).startswith("Waiting"):
            return []
        return _connected(cursor, waiter)

    def liveness_lock(
        self, engine: sa.Engine, number: int, *, patience: float = PATIENCE
    ) -> LivenessLock:
        """GET_LOCK, on a connection of its own."""
        lock = lock_name(number)
        statements = LockStatements(
            "AUTOCOMMIT",
            begin=None,
            acquire=f"SELECT GET_LOCK({lock}, 0)",
            is_held=f"SELECT IS_USED_LOCK({lock}) = CONNECTION_ID()",
            release=f"SELECT RELEASE_LOCK({lock})",
        )
        return ConnectionLock(engine, number, statements, patience=patience)

    def is_alive(self, connection: sa.Connection, number: int) -> bool:
        sql = f"SELECT IS_USED_LOCK({lock_name(number)}) IS NOT NULL"
        ((held,),) = self._query(connection, sql)
        return bool(held)


def lock_name(number: int) -> str:
    """The lock of a worker, quoted; names are the server's, of at most 64 characters."""
    return f"'tidyrows:{int(number):016x}'"


def _connected(cursor: Any, waiter: int) -> list[Blocker]:
    rows = _rows(cursor, _CANDIDATES.format(waiter=int(waiter)))
    return [_blocker(row, certain=False) for row in rows]


def _blocker(row: Sequence[Any], *, certain: bool = True) -> Blocker:
    pid, user, host, command, state, seconds, query = row
    doing = ", ".join(str(each).lower() for each in (command, state) if each)
    age = None if seconds is None else float(seconds)
    host = str(host).rpartition(":")[0] or host if host else None
    return Blocker(int(pid), user, None, host, doing or None, age, query or None, None, certain)


def _rows(cursor: Any, sql: str) -> list[Any]:
    cursor.execute(sql)
    return list(cursor.fetchall())
