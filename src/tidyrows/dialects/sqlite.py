"""SQLite, with the standard library's driver and aiosqlite."""

from __future__ import annotations

import json
import os
import re
import weakref
from contextlib import closing
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.dialects.aliases import KEYS, ROW
from tidyrows.dialects.base import CommitOutcome, CycleForm, Dialect, Fault, Look, Loss, RealTable
from tidyrows.dialects.blockers import holders_of_files
from tidyrows.dialects.database_names import database_name
from tidyrows.dialects.keys import (
    as_sent,
    chunks,
    delete_plainly,
    delete_runs,
    driver_values,
    find_plainly,
    integer_runs,
    look_plainly,
    run,
    those_there,
    typed_rows,
)
from tidyrows.dialects.liveness_file import (
    FileLife,
    beat_age,
    database_file,
    file_identity,
    is_held,
    is_in_memory,
    life_file,
    missing_file,
    remove,
    remove_all,
)
from tidyrows.dialects.liveness_lock import PATIENCE, Life
from tidyrows.dialects.whole_rows import same_row

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from tidyrows.dialects.blocker import Blocker
    from tidyrows.keys import KeyedTable

_BUSY, _LOCKED, _CONSTRAINT = 5, 6, 19
# Measured: from 500 to 30,000 keys the time is the same; every SQLite takes 999 variables.
_KEYS = 500
# An OR of more than 1000 terms is too deep a tree.
_COMPOSITE_KEYS = 250
_JSON_KEYS = 50_000
_SAVED = "tidyrows.sqlite.session"
# Of CREATE TRIGGER; AFTER and UPDATE keep no row. SQLite says BEFORE where nothing is said.
_BEFORE_DELETE = re.compile(r"(?<!AFTER)\s+DELETE\s+ON\b", re.IGNORECASE)
_LEGACY = -1  # sqlite3.LEGACY_TRANSACTION_CONTROL, the only way there was before Python 3.12


class SQLite(Dialect):
    """One writer at a time; a failed COMMIT leaves its transaction open."""

    name = "sqlite"
    reuses_keys = True
    whole_rows = True
    cycle_form = CycleForm.DEFERRED
    foreign_key_pragmas = True
    locks_rows = False
    release_commits = True
    asks_for_blockers = False
    clock = "((julianday('now') - 2440587.5) * 86400.0)"
    beats_in_file = True

    def __init__(self, dialect: sa.Dialect) -> None:
        super().__init__(dialect)
        self._conflicts: weakref.WeakKeyDictionary[Any, frozenset[str]]
        self._conflicts = weakref.WeakKeyDictionary()

    # ----- errors ------------------------------------------------------------------------------

    def _fault_of(self, error: BaseException) -> Fault:
        code = _code(error)
        if code in {_BUSY, _LOCKED}:
            return Fault.TRANSIENT
        return Fault.CONSTRAINT if code == _CONSTRAINT else Fault.OTHER

    def waited(self, error: BaseException) -> bool:
        """Somebody else writes."""
        return _code(error) in {_BUSY, _LOCKED}

    def is_private(self, engine: sa.Engine) -> bool:
        """In memory."""
        return is_in_memory(engine.url)

    def missing_file(self, engine: sa.Engine) -> str | None:
        """By the URL, since a look through a connection would be too late."""
        return missing_file(engine.url)

    def _server_id(self, raw: Any) -> int | None:
        """Locks are the process's: its own id, for a connection that is in a transaction."""
        return os.getpid() if self.in_transaction(raw) else None

    def waits_as(self, connection: sa.Connection) -> list[str]:
        """The files of the database and of what is attached."""
        return [path for _n, _name, path in self._ask(connection, "PRAGMA database_list") if path]

    def blockers(self, cursor: Any, waiting: list[str]) -> list[Blocker]:
        """Who has locked the file, as far as the operating system tells."""
        return holders_of_files(waiting)

    def loss(self, error: BaseException, dbapi_connection: Any) -> Loss:
        """Some errors roll the transaction back (disk full, RAISE(ROLLBACK)): ask the driver."""
        return Loss.NOTHING if self.in_transaction(dbapi_connection) else Loss.EVERYTHING

    def commit_outcome(self, error: BaseException, connection: sa.Connection) -> CommitOutcome:
        """BUSY and deferred foreign keys leave the transaction open."""
        if connection.closed or connection.invalidated:
            return CommitOutcome.DOUBT
        if self.in_transaction(connection.connection.dbapi_connection):
            return CommitOutcome.OPEN
        return CommitOutcome.DOUBT if _code(error) is None else CommitOutcome.GONE

    # ----- the user's transaction --------------------------------------------------------------

    def in_transaction(self, dbapi_connection: Any) -> bool | None:
        """What sqlite3_get_autocommit says."""
        raw = getattr(dbapi_connection, "driver_connection", dbapi_connection)
        return bool(raw.in_transaction)

    def is_begun(self, dbapi_connection: Any) -> bool:
        """Not to be told with ``autocommit=False``, where a transaction is always open."""
        raw = getattr(dbapi_connection, "driver_connection", dbapi_connection)
        always = getattr(raw, "autocommit", _LEGACY) is False
        return not always and super().is_begun(raw)

    def resolve(self, connection: sa.Connection, schema: str | None, name: str) -> RealTable | None:
        """An unqualified name means temp, then main, then what is attached, in that order."""
        attached = [row[1] for row in self._ask(connection, "PRAGMA database_list")]
        # temp is listed only once it has been used
        places = ["temp", *(place for place in attached if place != "temp")]
        if schema is not None:
            places = [place for place in places if place.lower() == schema.lower()]
        for place in places:
            master = (
                "temp.sqlite_temp_master" if place == "temp" else f"{_quoted(place)}.sqlite_master"
            )
            rows = self._ask(
                connection,
                f"SELECT type, sql FROM {master} "
                "WHERE name = ? COLLATE NOCASE AND type IN ('table', 'view')",
                name,
            )
            if rows:
                kind, sql = rows[0]
                if kind == "view" or str(sql).upper().startswith("CREATE VIRTUAL"):
                    return RealTable(place, "other", plain=False)
                return RealTable(place, "temporary" if place == "temp" else "table", plain=False)
        return None

    def before_savepoint(self, connection: sa.Connection) -> None:
        """BEGIN, in the driver's legacy mode: it begins nothing for a SAVEPOINT.

        The RELEASE of an outermost savepoint commits, whatever the session thinks.
        """
        raw = connection.connection.dbapi_connection
        level = getattr(raw, "isolation_level", None)
        if level is not None and not self.in_transaction(raw):
            with closing(connection.connection.cursor()) as cursor:
                cursor.execute(f"BEGIN {level}")

    # ----- inserts -----------------------------------------------------------------------------

    def upsert(self, insert: sa.Insert) -> bool:
        """ON CONFLICT, OR IGNORE and their kin, and conflict clauses of the table itself."""
        return super().upsert(insert) or bool(self._declared(insert.table))

    def inserted_proof(
        self, insert: sa.Insert, real: RealTable
    ) -> tuple[bool, sa.ColumnElement[bool] | None]:
        """RETURNING of DO NOTHING and IGNORE yields the inserted rows; after DO UPDATE all."""
        prefixes = self._prefixes(insert)
        post = self._post_values(insert)
        sure = (
            prefixes <= {"OR IGNORE"}
            and post in {None, "on_conflict_do_nothing"}
            and self._declared(insert.table) <= {"IGNORE"}
        )
        return sure, None

    def _declared(self, table: Any) -> frozenset[str]:
        """ON CONFLICT clauses that the table's own definition carries."""
        known = self._conflicts.get(table)
        if known is None:
            constraints = getattr(table, "constraints", ())
            options = [
                value
                for item in (*table.columns, *constraints)
                for key, value in getattr(item, "dialect_kwargs", {}).items()
                if key.startswith("sqlite_on_conflict") and value
            ]
            known = frozenset(str(value).upper() for value in options) & {"IGNORE", "REPLACE"}
            self._conflicts[table] = known
        return known

    # ----- cleanup -----------------------------------------------------------------------------

    def gives_again(self, connection: sa.Connection, table: KeyedTable, highest: int) -> bool:
        """Not where the table has AUTOINCREMENT, unless its counter was set back."""
        # The counters' table is there once a table with AUTOINCREMENT is, and holds only such.
        schema = _quoted(table.name.schema)
        known = f"SELECT 1 FROM {schema}.sqlite_master WHERE name = 'sqlite_sequence'"
        if not self._ask(connection, known):
            return True
        counter = f"SELECT max(seq) FROM {schema}.sqlite_sequence WHERE lower(name) = lower(?)"
        ((given,),) = self._ask(connection, counter, table.name.name)
        return given is None or given < highest

    def begin_cleanup(
        self,
        connection: sa.Connection,
        *,
        lock_timeout: float,
        statement_timeout: float | None = None,
        foreign_keys: bool = True,
    ) -> None:
        """BEGIN IMMEDIATE: never a deadlock, whatever the driver or a begin listener does.

        Foreign keys are enforced whether or not the connection's user has switched them on: the
        schema says what may happen to rows that reference ours.
        """
        self._begin(connection, "BEGIN IMMEDIATE", lock_timeout, foreign_keys=foreign_keys)

    def begin_reading(
        self,
        connection: sa.Connection,
        *,
        lock_timeout: float,
        statement_timeout: float | None = None,
    ) -> None:
        """BEGIN: no lock before the first look, and then a shared one."""
        self._begin(connection, "BEGIN", lock_timeout)

    def _begin(
        self,
        connection: sa.Connection,
        begin: str,
        lock_timeout: float,
        *,
        foreign_keys: bool | None = None,
    ) -> None:
        raw: Any = connection.connection.dbapi_connection
        mode = getattr(raw, "autocommit", _LEGACY)
        if mode is not False:  # in that mode of Python 3.12 a transaction is always open
            self._refuse_open_transaction(connection)
        (busy,) = self._ask(connection, "PRAGMA busy_timeout")[0]
        enforced = self._ask(connection, "PRAGMA foreign_keys")
        connection.info[_SAVED] = (busy, mode, enforced)
        if mode != _LEGACY:
            raw.autocommit = _LEGACY
            raw.rollback()
        self._ask(connection, f"PRAGMA busy_timeout = {max(1, round(lock_timeout * 1000))}")
        if foreign_keys is not None and enforced != [(int(foreign_keys),)]:
            self._ask(connection, f"PRAGMA foreign_keys = {int(foreign_keys)}")
        connection.begin()
        if self.in_transaction(raw):  # a begin listener, as SQLAlchemy's recipe has it
            self._ask(connection, "ROLLBACK")
        connection.exec_driver_sql(begin)

    def end_cleanup(self, connection: sa.Connection) -> None:
        """Also rolls back what a failed COMMIT left open."""
        if connection.closed or connection.invalidated or _SAVED not in connection.info:
            return
        busy, mode, enforced = connection.info.pop(_SAVED)
        raw: Any = connection.connection.dbapi_connection
        if self.in_transaction(raw):
            raw.rollback()
        self._ask(connection, f"PRAGMA busy_timeout = {busy}")
        for (flag,) in enforced:  # no row where SQLite was built without foreign keys
            self._ask(connection, f"PRAGMA foreign_keys = {flag}")
        if mode != _LEGACY:
            raw.autocommit = mode

    def delete_by_keys(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> int:
        """IN, OR of ANDs, or BETWEEN, with native values; as fast as JSON, right for every type."""
        runs = integer_runs(table, keys)
        if runs is not None:
            # Any column may hold any type: a stranger's 5.5 between our 5 and 6.
            is_integer = sa.func.typeof(table.key_clauses[0]) == "integer"
            return delete_runs(connection, table, runs, is_integer)
        values = driver_values(table, connection.dialect, keys)
        if values is None:
            return delete_plainly(connection, table, keys)
        place, names = _names(connection, table)
        # No WITH: the driver counts rows only of statements that begin with DELETE.
        head = f"DELETE FROM {place} WHERE "
        deleted = 0
        if len(names) == 1:
            for few in chunks(values[0], _KEYS):
                sql = f"{head}{names[0]} IN ({','.join(['?'] * len(few))})"
                deleted += connection.exec_driver_sql(sql, tuple(few)).rowcount
            return deleted
        one = " AND ".join(f"{name} = ?" for name in names)
        for rows in chunks(as_sent(values), _COMPOSITE_KEYS):
            sql = head + " OR ".join([one] * len(rows))
            sent = tuple(value for row in rows for value in row)
            deleted += connection.exec_driver_sql(sql, sent).rowcount
        return deleted

    def find(
        self,
        connection: sa.Connection,
        table: KeyedTable,
        keys: Sequence[Any],
        columns: Sequence[sa.ColumnElement[Any]],
        *,
        lock: bool = False,
        first: bool = False,
    ) -> list[tuple[Any, ...]]:
        """With JSON where there are many keys and the values allow it."""
        if len(keys) <= _KEYS or len(table.key_columns) > 1:
            return find_plainly(connection, table, keys, columns, lock=False, first=first)
        values = driver_values(table, connection.dialect, keys)
        if values is None or not _fits_json(values[0]):
            return find_plainly(connection, table, keys, columns, lock=False, first=first)
        place, (name,) = _names(connection, table)
        quote = connection.dialect.identifier_preparer.quote
        listed = ", ".join(f"{ROW}.{quote(str(column.key))}" for column in columns)
        sql = (
            f"SELECT {listed} FROM {place} AS {ROW} "
            f"WHERE {ROW}.{name} IN (SELECT value FROM json_each(?))"
        )
        if first:
            sql += " LIMIT 1"
        found: list[tuple[Any, ...]] = []
        for part in chunks(values[0], _JSON_KEYS):
            result = connection.exec_driver_sql(sql, (json.dumps(part),))
            found += typed_rows(result, columns, connection.dialect)
        return found

    def lock(self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]) -> None:
        """Nothing: BEGIN IMMEDIATE keeps every other writer out."""

    def what_keeps(self, connection: sa.Connection, table: KeyedTable) -> list[str]:
        """Triggers before a DELETE: RAISE(IGNORE) skips the row."""
        rows = self._ask(
            connection,
            f"SELECT name, sql FROM {_quoted(table.name.schema)}.sqlite_master "
            "WHERE type = 'trigger' AND tbl_name = ? COLLATE NOCASE ORDER BY name",
            table.name.name,
        )
        return [f'trigger "{name}"' for name, sql in rows if _BEFORE_DELETE.search(str(sql))]

    def enforces_foreign_keys(self, connection: sa.Connection) -> bool:
        """What the PRAGMA says."""
        return self._ask(connection, "PRAGMA foreign_keys") == [(1,)]

    def schemas_that_reference(self, connection: sa.Connection, schemas: Iterable[str]) -> set[str]:
        """A key stays inside its file."""
        return set(schemas)

    def delete_cycle(
        self, connection: sa.Connection, batch: Sequence[tuple[KeyedTable, Sequence[Any]]]
    ) -> list[int]:
        """Defers foreign keys, RESTRICT too, until COMMIT, which fails over what was broken."""
        # It stays on to the transaction's end: OFF would forget what was deferred, and COMMIT would
        # leave orphans without a word.
        connection.exec_driver_sql("PRAGMA defer_foreign_keys = ON")
        return super().delete_cycle(connection, batch)

    def read_exactly(self, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
        """As it is stored, whatever the column's type makes of it."""
        return sa.type_coerce(column, sa.types.NullType())

    def delete_rows(
        self, connection: sa.Connection, table: KeyedTable, row: Sequence[Any], count: int
    ) -> int:
        """By rowid, under a name that no column has taken."""
        taken = {column.name.lower() for column in table.table.columns}
        free = [name for name in ("rowid", "_rowid_", "oid") if name not in taken]
        if not free:
            raise LookupError(f"columns of {table.name} have all names of SQLite's own row id")
        rowid: sa.ColumnClause[Any] = sa.literal_column(free[0])
        condition = same_row(table, table.clause, row, self._same)
        ours = sa.select(rowid).select_from(table.clause).where(condition).limit(count)
        delete = sa.delete(table.clause).where(rowid.in_(ours.correlate(None)))
        return run(connection, delete).rowcount

    def _same(self, column: sa.ColumnElement[Any], value: Any) -> sa.ColumnElement[bool]:
        sent: Any = sa.bindparam(None, value, type_=sa.types.NullType())
        raw = sa.type_coerce(column, sa.types.NullType())
        return raw.op("COLLATE")(sa.literal_column("BINARY")).op("IS")(sent)

    def existing_keys(
        self, connection: sa.Connection, table: KeyedTable, keys: Sequence[Any]
    ) -> list[Any]:
        """Asks with JSON where the values allow it, else with SQLAlchemy's own statements."""
        found: list[Any] = []
        for part in chunks(keys, _JSON_KEYS):
            values = driver_values(table, connection.dialect, part)
            if values is not None and all(map(_fits_json, values)):
                sent = as_sent(values)
                found += those_there(part, sent, lambda few: _look(connection, table, few))
            else:
                found += those_there(part, part, lambda few: look_plainly(connection, table, few))
        return found

    def _looks(
        self, connection: sa.Connection, tables: Sequence[tuple[KeyedTable, Sequence[Any]]]
    ) -> list[Look | None]:
        """As ``existing_keys`` asks."""
        looks: list[Look | None] = []
        for table, keys in tables:
            values = None
            if 0 < len(keys) <= _KEYS:
                values = driver_values(table, connection.dialect, keys)
            exact = values is not None and all(map(_fits_json, values))
            looks.append(_select(connection, table, as_sent(values)) if values and exact else None)
        return looks

    # ----- who is alive ------------------------------------------------------------------------

    def life(self, engine: sa.Engine, number: int, *, patience: float = PATIENCE) -> Life:
        """A locked file beside the database's own; nothing for a database in memory."""
        return FileLife(engine, number, patience=patience)

    def is_alive(self, connection: sa.Connection, number: int) -> bool | None:
        """Whether its file is locked; None in memory, and where the system has no ``flock``."""
        path = self._life_file(connection, number)
        return None if path is None else is_held(path)

    def file_beat_age(self, connection: sa.Connection, number: int) -> float | None:
        """By the time of the file."""
        path = self._life_file(connection, number)
        return None if path is None else beat_age(path)

    def remove_life(self, connection: sa.Connection, number: int) -> None:
        """Delete the file, under its lock."""
        path = self._life_file(connection, number)
        if path is not None:
            remove(path)

    def remove_lives(self, connection: sa.Connection) -> None:
        """All files that nobody has locked."""
        if is_in_memory(connection.engine.url):
            return
        with closing(connection.connection.cursor()) as cursor:
            database = database_file(cursor)
        if database is not None:
            remove_all(database)

    def _life_file(self, connection: sa.Connection, number: int) -> Path | None:
        if is_in_memory(connection.engine.url):
            return None
        with closing(connection.connection.cursor()) as cursor:
            database = database_file(cursor)
        return None if database is None else life_file(database, number)

    # ----- what has changed --------------------------------------------------------------------

    def identity(self, engine: sa.Engine) -> tuple[Any, ...] | None:
        """The file and its inode: a file that was deleted and made anew is another database."""
        return (database_name(engine),) if self.is_private(engine) else file_identity(engine.url)

    def change_mark(self, connection: sa.Connection, *, lock_timeout: float) -> Any | None:
        """What counts the commits of all other connections, and the changes of this one.

        In memory this one is the suite's own.
        """
        (busy,) = self._ask(connection, "PRAGMA busy_timeout")[0]
        self._ask(connection, f"PRAGMA busy_timeout = {max(1, round(lock_timeout * 1000))}")
        try:
            attached = [
                name for _n, name, path in self._ask(connection, "PRAGMA database_list") if path
            ]
            told = [
                self._ask(connection, f"PRAGMA {_quoted(each)}.data_version") for each in attached
            ]
        finally:
            self._ask(connection, f"PRAGMA busy_timeout = {busy}")
        raw: Any = connection.connection.driver_connection
        return told, getattr(raw, "total_changes", 0)

    def usual_schema(self, bind: sa.Engine | sa.Connection) -> str:
        """The file that was opened, not one that was attached."""
        return "main"

    def own_schemas(self, connection: sa.Connection) -> list[str]:
        """What is attached, too."""
        listed = self._ask(connection, "PRAGMA database_list")
        return [name for _number, name, _path in listed if name != "temp"]

    def parts(self, connection: sa.Connection, schema: str) -> set[str]:
        """The tables in which a virtual table keeps its rows; before SQLite 3.37 nobody tells."""
        listed = self._ask(connection, "PRAGMA table_list")
        return {name for place, name, kind, *_ in listed if (place, kind) == (schema, "shadow")}

    def _ask(self, connection: sa.Connection, sql: str, *values: Any) -> list[Any]:
        """Past SQLAlchemy's events, on the connection's own cursor."""
        with closing(connection.connection.cursor()) as cursor:
            cursor.execute(sql, values)
            return list(cursor.fetchall())


def _fits_json(values: list[Any]) -> bool:
    """JSON has no bytes, and SQLite's JSON neither exact floats nor NUL."""
    kinds = set(map(type, values))
    return kinds <= {int} or (kinds == {str} and "\0" not in "".join(values))


def _look(
    connection: sa.Connection, table: KeyedTable, sent: Sequence[Any]
) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in connection.exec_driver_sql(*_select(connection, table, sent))]


def _select(connection: sa.Connection, table: KeyedTable, sent: Sequence[Any]) -> Look:
    place, names = _names(connection, table)
    listed = ", ".join(f"{ROW}.{name}" for name in names)
    if len(names) == 1:
        wanted = f"{listed} IN (SELECT value FROM json_each(?))"
        sql = f"SELECT {listed} FROM {place} AS {ROW} WHERE {wanted}"
    else:
        # CROSS JOIN holds the order: for each key one look into the index.
        equal = " AND ".join(
            f"{ROW}.{name} = json_extract({KEYS}.value, '$[{i}]')" for i, name in enumerate(names)
        )
        sql = f"SELECT {listed} FROM json_each(?) AS {KEYS} CROSS JOIN {place} AS {ROW} ON {equal}"
    return sql, (json.dumps(sent),)


def _names(connection: sa.Connection, table: KeyedTable) -> tuple[str, list[str]]:
    quote = connection.dialect.identifier_preparer.quote
    place = f"{quote(table.name.schema)}.{quote(table.table.name)}"
    return place, [quote(column.name) for column in table.key_columns]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _code(error: BaseException | None) -> int | None:
    """The primary result code."""
    if isinstance(error, sa.exc.DBAPIError):
        error = error.orig
    code = getattr(error, "sqlite_errorcode", None)
    return code & 0xFF if isinstance(code, int) else None
