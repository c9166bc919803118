"""The MySQL family's catalogue: a schema is a database, and a temporary table hides a real one."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sqlalchemy.dialects.mysql import LONGTEXT

from tidyrows.dialects.base import Dialect
from tidyrows.dialects.catalogue import RealTable
from tidyrows.dialects.errors import Loss

if TYPE_CHECKING:
    from collections.abc import Iterable

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
        """How far InnoDB's log is written, by MariaDB's name or MySQL's; None for either's lack.

        On MariaDB also how many rows were written, by any engine.
        """
        mariadb = getattr(self._dialect(), "is_mariadb", False)
        return self._query(connection, _LOG.format(_WRITTEN if mariadb else "")) or None

    def application_schemas(self, connection: sa.Connection) -> list[str]:
        """The connection's database."""
        ((database,),) = self._query(connection, "SELECT DATABASE()")
        return [] if database is None else [str(database)]


def _quoted(name: str) -> str:
    # SQLAlchemy's own quoting doubles percent signs, which a statement without parameters keeps.
    return "`" + name.replace("`", "``") + "`"
