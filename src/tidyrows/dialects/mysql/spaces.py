"""Databases of the MySQL family that one test has for itself."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from sqlalchemy.pool import NullPool

from tidyrows.dialects.locks import Blocker
from tidyrows.dialects.redirection import connect_parameters, redirected
from tidyrows.dialects.server_spaces import ServerSpace
from tidyrows.dialects.spaces import LOCK_SECONDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import sqlalchemy as sa

    from tidyrows.schema.graph import Place

_MULTI_STATEMENTS = 1 << 16
"""The protocol's flag."""
_MARKS = "tidy_pool.marks"
# A comment of a database is too short for a mark, and MySQL has none.
_MAKE_MARKS = (
    "CREATE DATABASE IF NOT EXISTS tidy_pool",
    f"""CREATE TABLE IF NOT EXISTS {_MARKS} (
    name VARCHAR(64) CHARACTER SET ascii PRIMARY KEY, mark LONGTEXT CHARACTER SET utf8mb4)""",
)
_HAS_MARKS = "SELECT 1 FROM information_schema.TABLES WHERE TABLE_SCHEMA = 'tidy_pool'"
_DATABASES = """
SELECT SCHEMA_NAME FROM information_schema.SCHEMATA
WHERE SCHEMA_NAME LIKE 'tidy\\_%' AND SCHEMA_NAME <> 'tidy_pool'"""
_SETTINGS = (
    f"SET SESSION innodb_lock_wait_timeout = {LOCK_SECONDS:.0f}, "
    f"lock_wait_timeout = {LOCK_SECONDS:.0f}, wait_timeout = 2147483, "
    "group_concat_max_len = 4294967295, sql_safe_updates = 0"
)
# From one view of the catalogue each; all of them together cost more than to empty the tables.
_QUICK = """
(SELECT MD5(GROUP_CONCAT(TABLE_NAME, '.', COLUMN_NAME, ORDINAL_POSITION, COLUMN_TYPE, IS_NULLABLE,
                         COALESCE(COLUMN_DEFAULT, ''), EXTRA ORDER BY 1 SEPARATOR ' '))
 FROM information_schema.COLUMNS WHERE TABLE_SCHEMA = '{}')"""
_DEFINITIONS = tuple(
    f"SELECT {columns} FROM information_schema.{view} WHERE {owner}_SCHEMA = '{{}}'"
    for view, owner, columns in (
        ("TABLES", "TABLE", "TABLE_NAME, TABLE_TYPE, ENGINE"),
        (
            "COLUMNS",
            "TABLE",
            "TABLE_NAME, COLUMN_NAME, ORDINAL_POSITION, COLUMN_TYPE, IS_NULLABLE, EXTRA",
        ),
        ("STATISTICS", "TABLE", "TABLE_NAME, INDEX_NAME, SEQ_IN_INDEX, COLUMN_NAME, NON_UNIQUE"),
        (
            "REFERENTIAL_CONSTRAINTS",
            "CONSTRAINT",
            "CONSTRAINT_NAME, TABLE_NAME, REFERENCED_TABLE_NAME, DELETE_RULE, UPDATE_RULE",
        ),
        ("VIEWS", "TABLE", "TABLE_NAME, VIEW_DEFINITION"),
        ("TRIGGERS", "TRIGGER", "TRIGGER_NAME, EVENT_OBJECT_TABLE, ACTION_STATEMENT"),
        ("ROUTINES", "ROUTINE", "ROUTINE_NAME, ROUTINE_TYPE, ROUTINE_DEFINITION"),
    )
)
_TABLES = (
    "SELECT TABLE_NAME FROM information_schema.TABLES "
    "WHERE TABLE_SCHEMA = '{}' AND TABLE_TYPE IN ('BASE TABLE', 'SYSTEM VERSIONED') ORDER BY 1"
)
_COLUMNS = (
    "SELECT COLUMN_NAME FROM information_schema.COLUMNS WHERE TABLE_SCHEMA = '{}' "
    "AND TABLE_NAME = %s AND EXTRA NOT LIKE '%%GENERATED%%' ORDER BY ORDINAL_POSITION"
)
_OUT = """
SELECT CONSTRAINT_NAME, TABLE_NAME, UNIQUE_CONSTRAINT_SCHEMA, REFERENCED_TABLE_NAME
FROM information_schema.REFERENTIAL_CONSTRAINTS
WHERE CONSTRAINT_SCHEMA = '{0}' AND UNIQUE_CONSTRAINT_SCHEMA <> '{0}' ORDER BY 1"""
_CONNECTED = """
SELECT p.ID, p.USER, p.HOST, p.COMMAND, p.STATE, p.TIME, p.INFO
FROM information_schema.PROCESSLIST p WHERE p.DB = '{}' AND p.ID <> CONNECTION_ID() ORDER BY 1"""


class MySQLDatabase(ServerSpace):
    """A database, on the same server."""

    kind = "database"

    @classmethod
    def managing(cls, engine: sa.Engine) -> sa.Engine:
        """A connection of its own for each lock, which takes several statements at once."""
        given = connect_parameters(engine).get("client_flag", 0)
        flag = {"client_flag": given | _MULTI_STATEMENTS}
        return redirected(engine, engine.url, pool_class=NullPool, **flag)

    def marks(self) -> dict[str, str | None]:
        """A table of a database of its own has them."""
        if not self._query(_HAS_MARKS):
            _run(self.connection, _MAKE_MARKS)
        marks = dict(self._query(f"SELECT name, mark FROM {_MARKS}"))
        return {name: marks.get(name) for (name,) in self._query(_DATABASES)}

    def prepare(self) -> None:
        self.connection.execution_options(isolation_level="AUTOCOMMIT")
        self._query(_SETTINGS)

    def create(self) -> None:
        self.drop()
        _run(self.connection, [f"CREATE DATABASE {self.name}"])

    def drop(self) -> None:
        """Without its mark first: what is half dropped is not complete."""
        unmark = f"DELETE FROM {_MARKS} WHERE name = '{self.name}'"
        has_marks = self._query(_HAS_MARKS)
        drop = f"DROP DATABASE IF EXISTS {self.name}"
        _run(self.connection, [unmark, drop] if has_marks else [drop])

    def replay(self, statements: Sequence[str]) -> None:
        _run(self.connection, [f"USE {self.name}", *statements])

    def finish(self, mark: str) -> None:
        if not mark:
            return
        driver: Any = self.connection.connection.dbapi_connection
        cursor = driver.cursor()
        cursor.execute(f"REPLACE INTO {_MARKS} VALUES (%s, %s)", (self.name, mark))
        cursor.close()

    def engine(self) -> sa.Engine:
        url = self.suite_engine.url.set(database=self.name)
        return redirected(self.suite_engine, url, default_schema=self.name)

    def foreign_keys_out(self) -> list[str]:
        return [
            f"{child!r} holds {name!r}, which leads to {schema}.{parent}"
            for name, child, schema, parent in self._query(_OUT.format(self.name))
        ]

    def users(self) -> list[Blocker]:
        """The sessions that use the database."""
        return [
            Blocker(pid, user, None, host, state or command, age, query)
            for pid, user, host, command, state, age, query in self._query(
                _CONNECTED.format(self.name)
            )
        ]

    # ----- rows

    def _query(self, sql: str, *values: Any) -> list[Any]:
        return self.dialect._query(self.connection, sql, *values)  # noqa: SLF001 -- as the dialect itself asks

    def _full_signature(self) -> str:
        answers = [
            sorted(map(repr, self._query(question.format(self.name)))) for question in _DEFINITIONS
        ]
        return hashlib.blake2b(repr(answers).encode(), digest_size=16).hexdigest()

    def _quick_signature(self) -> str:
        return _QUICK.format(self.name)

    def _find_tables(self) -> list[Place]:
        return [(self.name, name) for (name,) in self._query(_TABLES.format(self.name))]

    def _references(self) -> list[tuple[Place, Place]]:
        """None are needed: in a session of its own they are not checked."""
        return []

    def _quoted(self, place: Place) -> str:
        return ".".join("`" + name.replace("`", "``") + "`" for name in place)

    def _columns(self, place: Place) -> list[str]:
        """Those that can be written."""
        listed = self._query(_COLUMNS.format(self.name), place[1])
        return ["`" + name.replace("`", "``") + "`" for (name,) in listed]

    def _digest(self, place: Place) -> str:
        row = f"MD5(CONCAT_WS(',', {', '.join(f'QUOTE({c})' for c in self._columns(place))}))"
        parts = ", '.', ".join(
            f"SUM(CAST(CONV(SUBSTR({row}, {start}, 15), 16, 10) AS UNSIGNED))" for start in (1, 16)
        )
        return f"(SELECT CONCAT(COUNT(*), '.', {parts}) FROM {self._quoted(place)})"

    def _copy_of(self, place: Place) -> tuple[list[str], list[Any]]:
        columns = self._columns(place)
        return columns, self._query(f"SELECT {', '.join(columns)} FROM {self._quoted(place)}")

    def _replace(self, groups: Sequence[Sequence[Place]], filled: Sequence[Place]) -> None:
        """Without checks of foreign keys: nobody else uses this session, nor the tables now."""
        deletes = [f"DELETE FROM {self._quoted(place)}" for group in groups for place in group]
        mode = "SET @tidyrows_mode = @@SESSION.sql_mode, SESSION sql_mode = 'NO_AUTO_VALUE_ON_ZERO'"
        driver: Any = self.connection.connection.dbapi_connection
        try:
            _run(
                self.connection,
                [mode, "SET SESSION foreign_key_checks = 0", "START TRANSACTION", *deletes],
            )
            for place in filled:
                columns, rows = self._rows[place]
                marks = ", ".join(["%s"] * len(columns))
                names = ", ".join(columns).replace("%", "%%")
                cursor = driver.cursor()
                into = self._quoted(place).replace("%", "%%")
                cursor.executemany(f"INSERT INTO {into} ({names}) VALUES ({marks})", rows)
                cursor.close()
            end = "COMMIT"
        except BaseException:
            end = "ROLLBACK"
            raise
        finally:
            restore = "SET SESSION sql_mode = @tidyrows_mode, SESSION foreign_key_checks = 1"
            _run(self.connection, [end, restore])


def _run(connection: sa.Connection, statements: Sequence[str]) -> None:
    """All in one round trip."""
    driver: Any = connection.connection.dbapi_connection
    cursor = driver.cursor()
    try:
        cursor.execute(";\n".join(statements))
        while cursor.nextset():
            pass
    finally:
        cursor.close()
