"""SQLite, with the driver of the standard library and aiosqlite."""

from __future__ import annotations

import gc
import os
import re
from contextlib import closing, suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa

from tidyrows.dialects.catalogue import RealTable, filled_tables
from tidyrows.dialects.driver import Loss, database_name, raw_connection
from tidyrows.dialects.sessions import CommitOutcome
from tidyrows.dialects.sqlite.locks import (
    SQLiteLocks,
    database_file,
    is_in_memory,
    named_files,
)
from tidyrows.dialects.sqlite.outer import SQLiteOuter
from tidyrows.dialects.sqlite.spaces import SQLiteFile
from tidyrows.dialects.sqlite.statements import SQLiteStatements, quoted
from tidyrows.greenlets import in_greenlet, wait_for
from tidyrows.schema.reflect import (
    Columns,
    reflect_foreign_keys,
    without_reflection_warnings,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sqlalchemy.engine.interfaces import ReflectedForeignKeyConstraint

    from tidyrows.keys import KeyedTable
    from tidyrows.schema.graph import ForeignKey, Place
    from tidyrows.schema.reflect import ReflectedKeys

_BUSY, _LOCKED, _CONSTRAINT = 5, 6, 19
_SAVED = "tidyrows.sqlite.session"
_LEGACY = -1  # sqlite3.LEGACY_TRANSACTION_CONTROL, the only way there was before Python 3.12
# Of CREATE TRIGGER; AFTER and UPDATE suppress nothing. BEFORE is the default.
_ON_INSERT = re.compile(r"\bINSERT\s+ON\b", re.IGNORECASE)
# UPDATE of a table that sets a key column: before the first WHERE, behind which all is compared.
_SETS = (
    r"""\bUPDATE\b(?:(?!\bSET\b).)*["`\[\s.]{}["`\]\s]+SET\b(?:(?!\bWHERE\b).)*"""
    r"""\b(?:{})["`\]\s]*(?:=|,[^=()]*\)\s*=|\)\s*=)"""
)
_TRIGGER = re.compile(r"\bCREATE\s+(?:TEMP\w*\s+)?TRIGGER\b", re.IGNORECASE)
_BEGIN = re.compile(r"\bBEGIN\b", re.IGNORECASE)
_BEFORE_DELETE = re.compile(r"(?<!AFTER)\s+DELETE\s+ON\b", re.IGNORECASE)


# A virtual table has no page; it holds no key, and asking for its columns needs its module. NOCASE
# folds ASCII letters only, as SQLite does where it compares names. A key that names no columns
# means the parent's primary key, in its order.
_TABLES = """
SELECT name FROM {0}.sqlite_master
WHERE type = 'table' AND rootpage > 0 AND name NOT LIKE 'sqlite!_%' ESCAPE '!' ORDER BY name"""
_FOREIGN_KEYS = """
SELECT m.name, f.id, coalesce(p.name, f."table"), f."from", coalesce(c.name, f."to"), f.on_delete
FROM {0}.sqlite_master AS m JOIN pragma_foreign_key_list(m.name, ?) AS f
LEFT JOIN {0}.sqlite_master AS p
    ON p.type = 'table' AND p.rootpage > 0 AND p.name = f."table" COLLATE NOCASE
LEFT JOIN pragma_table_info(p.name, ?) AS c
    ON CASE WHEN f."to" IS NULL THEN c.pk = f.seq + 1 ELSE c.name = f."to" COLLATE NOCASE END
WHERE m.type = 'table' ORDER BY m.name, f.id, f.seq"""


_COLUMNS = """
SELECT m.name, x.name, x.type, x."notnull", x.pk, x.hidden
FROM {0}.sqlite_master AS m JOIN pragma_table_xinfo(m.name, ?) AS x
WHERE m.type = 'table' AND m.rootpage > 0 ORDER BY m.name, x.cid"""
# No index of expressions, and none of some rows; a primary key of the rowid has no index.
_UNIQUE = """
SELECT m.name, '', x.name FROM {0}.sqlite_master AS m JOIN pragma_table_info(m.name, ?) AS x
WHERE m.type = 'table' AND m.rootpage > 0 AND x.pk > 0
UNION ALL
SELECT m.name, i.name, x.name FROM {0}.sqlite_master AS m
JOIN pragma_index_list(m.name, ?) AS i JOIN pragma_index_info(i.name, ?) AS x
WHERE m.type = 'table' AND m.rootpage > 0 AND i."unique" AND NOT i.partial
      AND NOT EXISTS (SELECT 1 FROM pragma_index_info(i.name, ?) AS e WHERE e.name IS NULL)"""
# A generated column's type says so too.
_GENERATED = re.compile(r"GENERATED|ALWAYS")


def _fills(triggers: str | None) -> tuple[str, ...]:
    """The tables that triggers on INSERT insert into, by the texts of all triggers of a table."""
    bodies = [
        body[0]
        for text in _TRIGGER.split(triggers or "")
        for head, *body in [_BEGIN.split(text, 1)]
        if body and _ON_INSERT.search(head)
    ]
    return filled_tables(" ".join(bodies))


def pragma_foreign_keys(connection: sa.Connection, schema: str) -> ReflectedKeys:
    """One schema's foreign keys by table, as ``PRAGMA foreign_key_list`` lists them.

    The Inspector finds no ON DELETE where a column says ``REFERENCES parent ON DELETE CASCADE`` by
    itself. The PRAGMA lacks names and deferral, which are not needed. A parent's name and columns
    come back as the parent itself spells them.
    """
    place = quoted(schema)
    names = connection.exec_driver_sql(_TABLES.format(place)).scalars()
    tables: dict[str, list[ReflectedForeignKeyConstraint]] = {name: [] for name in names}
    rows = connection.exec_driver_sql(_FOREIGN_KEYS.format(place), (schema, schema))
    for (table, _id, parent, on_delete), columns in groupby(rows, itemgetter(0, 1, 2, 5)):
        pairs = [(row[3], row[4]) for row in columns]
        tables[table].append(
            {
                "name": None,
                "constrained_columns": [child for child, _parent in pairs],
                "referred_schema": schema,
                "referred_table": parent,
                "referred_columns": [named for _child, named in pairs if named is not None],
                "options": {"ondelete": on_delete},
            }
        )
    return tables


class SQLite(SQLiteStatements, SQLiteLocks, SQLiteOuter):
    """One writer at a time; a failed COMMIT leaves its transaction open."""

    name = "sqlite"
    release_commits = True
    counts_every_change = True
    clock = "((julianday('now') - 2440587.5) * 86400.0)"
    transient_codes = frozenset({_BUSY, _LOCKED})
    timeout_codes = transient_codes
    constraint_codes = frozenset({_CONSTRAINT})
    space_kinds = MappingProxyType({"schema": SQLiteFile, "database": SQLiteFile})

    def driver_code(self, error: BaseException) -> int | None:
        """The primary code: the low byte of the extended one."""
        code = getattr(error, "sqlite_errorcode", None)
        return code & 0xFF if isinstance(code, int) else None

    def loss(self, error: BaseException, dbapi_connection: Any) -> Loss:
        """Some errors roll the transaction back (disk full, RAISE(ROLLBACK)): ask the driver."""
        return Loss.NOTHING if self.in_transaction(dbapi_connection) else Loss.EVERYTHING

    # ----- sessions

    def in_transaction(self, dbapi_connection: Any) -> bool | None:
        raw: Any = getattr(dbapi_connection, "driver_connection", dbapi_connection)
        return raw.in_transaction  # type: ignore[no-any-return]  # without a call

    def is_begun(self, dbapi_connection: Any) -> bool:
        """False with ``autocommit=False``, where a transaction is always open."""
        raw: Any = getattr(dbapi_connection, "driver_connection", dbapi_connection)
        return raw.in_transaction and getattr(raw, "autocommit", _LEGACY) is not False

    def guard_pool(self, engine: sa.Engine) -> None:
        """Also end what a connection that is thrown away, say by a cancelled task, has begun."""
        super().guard_pool(engine)
        if self._dialect().is_async and self._end_all not in engine.pool.dispatch.invalidate:
            sa.event.listen(engine.pool, "invalidate", self._end_all)

    def _end_all(self, dbapi_connection: Any, record: Any, error: Any) -> None:
        """A closed connection keeps its locks as long as a cursor with more rows is referenced.

        The traceback of a cancelled task does so.
        """
        raw = raw_connection(dbapi_connection)
        opened = getattr(raw, "_connection", None)  # no public name
        if opened is None or not in_greenlet():
            return
        for each in gc.get_referrers(opened):
            if isinstance(each, self._dbapi.sqlite.Cursor):
                wait_for(raw._execute(each.close))  # noqa: SLF001 -- in the connection's thread
        dbapi_connection.rollback()

    def driver_server_id(self, raw: Any) -> int | None:
        """Locks are the process's: its own id, for a connection that is in a transaction."""
        return os.getpid() if self.in_transaction(raw) else None

    def before_savepoint(self, connection: sa.Connection) -> None:
        """BEGIN in the legacy mode, where the RELEASE of an outermost savepoint would commit."""
        raw = connection.connection.dbapi_connection
        level = getattr(raw, "isolation_level", None)
        if level is not None and not self.in_transaction(raw):
            with closing(connection.connection.cursor()) as cursor:
                cursor.execute(f"BEGIN {level}")

    def commit_is_void(self, connection: sa.Connection) -> bool | None:
        return False if self.in_transaction(connection.connection.dbapi_connection) else None

    def commit_outcome(self, error: BaseException, connection: sa.Connection) -> CommitOutcome:
        """BUSY and deferred foreign keys leave the transaction open."""
        if connection.closed or connection.invalidated:
            return CommitOutcome.UNKNOWN
        if self.in_transaction(connection.connection.dbapi_connection):
            return CommitOutcome.OPEN
        return CommitOutcome.UNKNOWN if self.code(error) is None else CommitOutcome.GONE

    def begin_cleanup(
        self,
        connection: sa.Connection,
        *,
        lock_timeout: float,
        statement_timeout: float | None = None,
        foreign_keys: bool | None = True,
        begin: str = "BEGIN IMMEDIATE",
    ) -> None:
        """BEGIN IMMEDIATE: never a deadlock, whatever the driver or a begin listener does."""
        raw: Any = connection.connection.dbapi_connection
        mode = getattr(raw, "autocommit", _LEGACY)
        if mode is not False:  # in that mode of Python 3.12 a transaction is always open
            self.refuse_open_transaction(connection)
        (busy,) = self._query(connection, "PRAGMA busy_timeout")[0]
        enforced = self._query(connection, "PRAGMA foreign_keys")
        connection.info[_SAVED] = (busy, mode, enforced)
        if mode != _LEGACY:
            raw.autocommit = _LEGACY
            raw.rollback()
        self._query(connection, f"PRAGMA busy_timeout = {max(1, round(lock_timeout * 1000))}")
        # Enforced although the connection's user has not switched them on: the schema says what may
        # happen to rows that reference ours.
        if foreign_keys is not None and enforced != [(int(foreign_keys),)]:
            self._query(connection, f"PRAGMA foreign_keys = {int(foreign_keys)}")
        connection.begin()
        if self.in_transaction(raw):  # a begin listener, as SQLAlchemy's recipe has it
            self._query(connection, "ROLLBACK")
        connection.exec_driver_sql(begin)

    def begin_reading(self, connection: sa.Connection, **limits: Any) -> None:
        """BEGIN: no lock before the first look, and then a shared one."""
        self.begin_cleanup(connection, **limits, foreign_keys=None, begin="BEGIN")

    def end_cleanup(self, connection: sa.Connection) -> None:
        """Also rolls back what a failed COMMIT left open."""
        if connection.closed or connection.invalidated or _SAVED not in connection.info:
            return
        busy, mode, enforced = connection.info.pop(_SAVED)
        raw: Any = connection.connection.dbapi_connection
        if self.in_transaction(raw):
            raw.rollback()
        self._query(connection, f"PRAGMA busy_timeout = {busy}")
        for (flag,) in enforced:  # no row where SQLite was built without foreign keys
            self._query(connection, f"PRAGMA foreign_keys = {flag}")
        if mode != _LEGACY:
            raw.autocommit = mode

    def enforces_foreign_keys(self, connection: sa.Connection) -> bool:
        return self._query(connection, "PRAGMA foreign_keys") == [(1,)]

    # ----- catalogue

    def resolve(self, connection: sa.Connection, schema: str | None, name: str) -> RealTable | None:
        """An unqualified name means temp, then main, then what is attached, in that order."""
        attached = [row[1] for row in self._query(connection, "PRAGMA database_list")]
        # temp is listed only once it has been used
        places = ["temp", *(place for place in attached if place != "temp")]
        if schema is not None:
            places = [place for place in places if place.lower() == schema.lower()]
        for place in places:
            master = f"{quoted(place)}.sqlite_{'temp_' if place == 'temp' else ''}master"
            rows = self._query(
                connection,
                "SELECT type, sql, (SELECT group_concat(sql, ';') "
                f"FROM {master} WHERE type = 'trigger' AND tbl_name = ? COLLATE NOCASE) "
                f"FROM {master} WHERE name = ? COLLATE NOCASE AND type IN ('table', 'view')",
                name,
                name,
            )
            if rows:
                kind, sql, triggers = rows[0]
                if kind == "view" or str(sql).upper().startswith("CREATE VIRTUAL"):
                    return RealTable(place, "other", plain=False)
                moves = triggers is not None and self._moves_keys(connection, place, name, triggers)
                here: Literal["temporary", "table"] = "temporary" if place == "temp" else "table"
                return RealTable(place, here, plain=False, moves_keys=moves, fills=_fills(triggers))
        return None

    def _moves_keys(self, connection: sa.Connection, place: str, name: str, triggers: str) -> bool:
        """Whether a trigger that fires at an INSERT may set a key column, by its text."""
        if not _ON_INSERT.search(triggers):
            return False
        listed = self._query(
            connection, "SELECT name FROM pragma_table_info(?, ?) WHERE pk", name, place
        )
        keys = "|".join(
            re.escape(key) for key in ("rowid", "oid", "_rowid_", *(k for (k,) in listed))
        )
        sets_key = re.compile(_SETS.format(re.escape(name), keys), re.IGNORECASE | re.DOTALL)
        return any(sets_key.search(part) for part in triggers.split(";"))

    def delete_suppressors(self, connection: sa.Connection, table: KeyedTable) -> list[str]:
        """Triggers before a DELETE: RAISE(IGNORE) skips the row."""
        rows = self._query(
            connection,
            f"SELECT name, sql FROM {quoted(table.name.schema)}.sqlite_master "
            "WHERE type = 'trigger' AND tbl_name = ? COLLATE NOCASE ORDER BY name",
            table.name.name,
        )
        return [f'trigger "{name}"' for name, sql in rows if _BEFORE_DELETE.search(str(sql))]

    def foreign_keys(
        self, connection: sa.Connection, schemas: Iterable[str]
    ) -> tuple[ForeignKey, ...]:
        return reflect_foreign_keys(connection, schemas, read=pragma_foreign_keys)

    def unique_columns(
        self, connection: sa.Connection, tables: Iterable[Place]
    ) -> Iterable[tuple[str, str, str, str]]:
        """One statement for each schema; the Inspector sends several for each table."""
        wanted = {(schema, name.lower()): name for schema, name in tables}
        for schema in sorted({schema for schema, _name in wanted}):
            asked = _UNIQUE.format(quoted(schema))
            for table, index, column in connection.exec_driver_sql(asked, (schema,) * 4).all():
                name = wanted.get((schema, table.lower()))
                if name is not None:
                    yield schema, name, index, column

    def columns_of(
        self, connection: sa.Connection, places: Iterable[Place]
    ) -> Mapping[Place, Columns]:
        """One statement for each schema; the Inspector sends several for each table."""
        # names as they are asked for: letters' case is no difference here
        wanted = {(schema, name.lower()): name for schema, name in places}
        type_of = connection.dialect._resolve_type_affinity  # type: ignore[attr-defined]  # noqa: SLF001 -- there is no public way from a type's text to a type
        found: dict[Place, Columns] = {}
        attached = {row[1] for row in self._query(connection, "PRAGMA database_list")}
        for schema in sorted(attached & {schema for schema, _name in wanted}):
            asked = _COLUMNS.format(quoted(schema))
            rows = connection.exec_driver_sql(asked, (schema,)).all()
            for table, group in groupby(rows, itemgetter(0)):
                name = wanted.get((schema, table.lower()))
                if name is None:
                    continue
                columns = list(group)
                key = sorted((row for row in columns if row[4]), key=itemgetter(4))
                texts = {row[1]: _GENERATED.sub("", row[2].upper()).strip() for row in columns}
                with without_reflection_warnings():
                    types = {column: type_of(text) for column, text in texts.items()}
                found[schema, name] = Columns(
                    types,
                    tuple(row[1] for row in key),
                    frozenset(row[1] for row in columns if not (row[3] or row[4] or row[5])),
                )
        return found

    def is_private(self, engine: sa.Engine) -> bool:
        return is_in_memory(engine.url)

    def places_by_url(self, engine: sa.Engine) -> list[tuple[str, str]]:
        """The file behind a symbolic link."""
        if engine.url.host or self.is_private(engine):
            return []
        return [("database", os.path.realpath(each)) for each in named_files(engine.url)]

    def driver_places(self, raw: Any, cursor: Any) -> list[tuple[str, Any]]:
        """The file of ``main``."""
        path = database_file(cursor)
        return [("database", os.path.realpath(path))] if path else []

    def places_of_schema(self, connection: sa.Connection, schema: str) -> list[tuple[str, str]]:
        """The file that was attached under this name."""
        listed = self._query(connection, "PRAGMA database_list")
        return [
            ("database", os.path.realpath(path))
            for _number, name, path in listed
            if path and name.lower() == schema.lower()
        ]

    def prepared_writers(self, connection: sa.Connection, table: str) -> set[str]:
        """None: SQLite prepares no transactions."""
        return set()

    def missing_file(self, engine: sa.Engine) -> str | None:
        """By the URL, since a look through a connection would be too late."""
        if engine.url.host or self.is_private(engine):
            return None
        named = named_files(engine.url)
        try:
            return None if any(Path(each).exists() for each in named) else named[-1]
        except OSError:  # no right to look: connecting gives the reason
            return None

    def identity(self, engine: sa.Engine) -> tuple[Any, ...] | None:
        """The file and its inode: a file that was deleted and made anew is another database."""
        if self.is_private(engine):
            return (database_name(engine),)
        for each in named_files(engine.url):
            with suppress(OSError):
                found = Path(each).stat()
                return str(Path(each).absolute()), found.st_dev, found.st_ino
        return None

    def change_mark(self, connection: sa.Connection, *, lock_timeout: float) -> Any | None:
        """Counts the commits of other connections, and the changes of this one."""
        (busy,) = self._query(connection, "PRAGMA busy_timeout")[0]
        self._query(connection, f"PRAGMA busy_timeout = {max(1, round(lock_timeout * 1000))}")
        try:
            attached = [
                name for _n, name, path in self._query(connection, "PRAGMA database_list") if path
            ]
            versions = [
                self._query(connection, f"PRAGMA {quoted(each)}.data_version") for each in attached
            ]
        finally:
            self._query(connection, f"PRAGMA busy_timeout = {busy}")
        raw: Any = connection.connection.driver_connection
        return versions, getattr(raw, "total_changes", 0)

    def rows_inserted(self, dbapi_connection: Any, *, inside: bool = True) -> Any:
        """Rows that were inserted, changed or deleted, without a question to the database."""
        total: int = raw_connection(dbapi_connection).total_changes
        return {None: total}, {None: total}

    def default_schema(self, bind: sa.Engine | sa.Connection) -> str:
        """The file that was opened, not one that was attached."""
        return "main"

    def application_schemas(self, connection: sa.Connection) -> list[str]:
        """What is attached, too."""
        listed = self._query(connection, "PRAGMA database_list")
        return [name for _number, name, _path in listed if name != "temp"]

    def is_system_table(self, schema: str, name: str) -> bool:
        return name.lower().startswith("sqlite_")

    def storage_tables(self, connection: sa.Connection, schema: str) -> set[str]:
        """The tables in which a virtual table keeps its rows; unknown before SQLite 3.37."""
        listed = self._query(connection, "PRAGMA table_list")
        return {name for place, name, kind, *_ in listed if (place, kind) == (schema, "shadow")}
