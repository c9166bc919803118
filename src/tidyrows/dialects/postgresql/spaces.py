"""Schemas and databases of PostgreSQL that one test has for itself."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from sqlalchemy.pool import NullPool

from tidyrows.dialects.driver import raw_connection
from tidyrows.dialects.locks import Blocker
from tidyrows.dialects.redirection import connect_parameters, redirected
from tidyrows.dialects.server_spaces import ServerSpace
from tidyrows.dialects.spaces import LOCK_SECONDS
from tidyrows.greenlets import wait_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    import sqlalchemy as sa

    from tidyrows.dialects.driver import Errors
    from tidyrows.schema.graph import Place

_AT_ONCE = 300
"""Statements of one round trip, which is one transaction: each new object takes one lock."""
_FILE_COPY_FROM = 200 * 2**20
"""Bytes of a template from which copying its files is faster than writing it to the log."""

_HAS_STRATEGIES = (15,)

_SETTINGS = f"""
SELECT pg_catalog.set_config('lock_timeout', '{LOCK_SECONDS:g}s', false),
       pg_catalog.set_config('statement_timeout', '0', false),
       pg_catalog.set_config('search_path', 'pg_catalog', false),
       pg_catalog.set_config('standard_conforming_strings', 'on', false),
       CASE WHEN pg_catalog.current_setting('idle_session_timeout', true) IS NOT NULL
            THEN pg_catalog.set_config('idle_session_timeout', '0', false) END"""
_SCHEMA_MARKS = """
SELECT nspname, pg_catalog.obj_description(oid, 'pg_namespace') FROM pg_catalog.pg_namespace
WHERE nspname ~ '^tidy_'"""
_DATABASE_MARKS = """
SELECT datname, pg_catalog.shobj_description(oid, 'pg_database') FROM pg_catalog.pg_database
WHERE datname ~ '^tidy_'"""
_EXTENSION_SCHEMAS = """
SELECT DISTINCT pg_catalog.quote_ident(n.nspname)
FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
WHERE n.nspname !~ '^(pg_|tidy_)'"""
_EXTENSIONS = """
SELECT pg_catalog.quote_ident(e.extname)
FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
WHERE n.nspname = '{}'"""

# A new object has a new oid, a changed one a new xmin; what ANALYZE, TRUNCATE and REINDEX change
# is left out.
_SIGNATURE = """
(SELECT pg_catalog.md5(pg_catalog.string_agg(line, ' ' ORDER BY line)) FROM (
    SELECT pg_catalog.concat('c', c.oid, c.relname, c.relrowsecurity, c.relhasrules, c.reloptions)
    FROM n JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid
    UNION ALL SELECT pg_catalog.concat('a', a.attrelid, '.', a.attnum, '.', a.xmin)
    FROM n JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relkind IN ('r', 'p', 'c')
           JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
    UNION ALL SELECT pg_catalog.concat('k', k.oid, '.', k.xmin)
    FROM n JOIN pg_catalog.pg_constraint k ON k.connamespace = n.oid
    UNION ALL SELECT pg_catalog.concat('d', d.oid, '.', d.xmin)
    FROM n JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid
           JOIN pg_catalog.pg_attrdef d ON d.adrelid = c.oid
    UNION ALL SELECT pg_catalog.concat('t', t.oid, '.', t.xmin)
    FROM n JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid
           JOIN pg_catalog.pg_trigger t ON t.tgrelid = c.oid
    UNION ALL SELECT pg_catalog.concat('r', r.oid, '.', r.xmin)
    FROM n JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid
           JOIN pg_catalog.pg_rewrite r ON r.ev_class = c.oid
    UNION ALL SELECT pg_catalog.concat('l', l.oid, '.', l.xmin)
    FROM n JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid
           JOIN pg_catalog.pg_policy l ON l.polrelid = c.oid
    UNION ALL SELECT pg_catalog.concat('p', p.oid, '.', p.xmin)
    FROM n JOIN pg_catalog.pg_proc p ON p.pronamespace = n.oid
    UNION ALL SELECT pg_catalog.concat('y', y.oid, y.typname)
    FROM n JOIN pg_catalog.pg_type y ON y.typnamespace = n.oid
    UNION ALL SELECT pg_catalog.concat('e', e.oid, '.', e.xmin)
    FROM n JOIN pg_catalog.pg_type y ON y.typnamespace = n.oid
           JOIN pg_catalog.pg_enum e ON e.enumtypid = y.oid
) AS lines(line))"""
# What most changes show, at a tenth of the price.
_QUICK = """
(SELECT pg_catalog.concat(pg_catalog.count(*), '.', pg_catalog.sum(pg_catalog.hashtext(
    pg_catalog.concat(c.oid, '.', relname, relnatts, relchecks, relhasrules, relhastriggers,
                      relrowsecurity))))
 FROM n JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid)"""
_NAMESPACES = "SELECT oid, nspname FROM pg_catalog.pg_namespace WHERE {}"
_TABLES = """
SELECT n.nspname, c.relname
FROM n JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                      WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
                            AND d.objid = c.oid AND d.deptype = 'e')
ORDER BY 1, 2"""
_REFERENCES = """
SELECT DISTINCT n.nspname, c.relname, pn.nspname, p.relname
FROM n JOIN pg_catalog.pg_constraint k ON k.connamespace = n.oid AND k.contype = 'f'
JOIN pg_catalog.pg_class c ON c.oid = k.conrelid JOIN pg_catalog.pg_class p ON p.oid = k.confrelid
JOIN pg_catalog.pg_namespace pn ON pn.oid = p.relnamespace"""
_OUT = """
SELECT DISTINCT k.conname, c.relname, pn.nspname, p.relname
FROM n JOIN pg_catalog.pg_constraint k ON k.connamespace = n.oid AND k.contype = 'f'
JOIN pg_catalog.pg_class c ON c.oid = k.conrelid JOIN pg_catalog.pg_class p ON p.oid = k.confrelid
JOIN pg_catalog.pg_namespace pn ON pn.oid = p.relnamespace
WHERE pn.oid <> n.oid ORDER BY 1"""
_END_SESSIONS = """
SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
WHERE datname = '{}' AND usename = CURRENT_USER"""
"""What migrations have left in their pools; CREATE DATABASE waits for the end."""
_COLUMNS = """
SELECT pg_catalog.quote_ident(attname) FROM pg_catalog.pg_attribute
WHERE attrelid = {}::pg_catalog.regclass AND attnum > 0 AND NOT attisdropped
      AND attgenerated = '' ORDER BY attnum"""
_HOLDERS = """
SELECT DISTINCT a.pid, a.usename, a.application_name, pg_catalog.host(a.client_addr), a.state,
       extract(epoch FROM pg_catalog.clock_timestamp() - a.xact_start)::float8, a.query
FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
WHERE a.pid <> pg_catalog.pg_backend_pid() AND l.granted AND l.locktype = 'relation'
      AND l.database = (SELECT oid FROM pg_catalog.pg_database
                        WHERE datname = pg_catalog.current_database())
      AND l.relation IN (SELECT c.oid FROM n JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid)
ORDER BY 1"""


class _PostgreSQLSpace(ServerSpace):
    """What a schema and a database of PostgreSQL have in common."""

    _where: str
    """Its schemas, as a condition on pg_namespace."""

    @classmethod
    def managing(cls, engine: sa.Engine) -> sa.Engine:
        """A connection of its own for each lock, which lasts as long as the lock."""
        return redirected(engine, engine.url, pool_class=NullPool)

    def prepare(self) -> None:
        self.connection.execution_options(isolation_level="AUTOCOMMIT")
        self.dialect._query(self.connection, _SETTINGS)  # noqa: SLF001 -- as the dialect itself asks

    def _work(self) -> sa.Connection:
        """A connection on which its rows are reached."""
        found: sa.Connection = self.connection
        return found

    def _query(self, sql: str) -> list[Any]:
        return self.dialect._query(self._work(), sql)  # noqa: SLF001 -- as the dialect itself asks

    def _run(self, sql: str, connection: sa.Connection | None = None) -> None:
        """One or more statements in one round trip, and in one transaction."""
        connection = connection or self._work()
        driver: Any = connection.connection.dbapi_connection
        raw = raw_connection(driver)
        if hasattr(raw, "get_server_pid"):  # asyncpg's cursors take one statement only
            wait_for(raw.execute(sql))
            return
        cursor = driver.cursor()
        try:
            cursor.execute(sql)
        finally:
            cursor.close()

    def replay(self, statements: Sequence[str]) -> None:
        for first in range(0, len(statements), _AT_ONCE):
            self._run_inside(statements[first : first + _AT_ONCE])

    def _run_inside(self, statements: Sequence[str]) -> None:
        """With unqualified names as the application has them: functions have such names."""
        inside = [self._enter(), *statements, "SET search_path TO pg_catalog"]
        self._run(";\n".join(inside))

    def _enter(self) -> str:
        """The statement after which unqualified names lead into it."""
        return "RESET search_path"

    def _in_schemas(self, sql: str) -> str:
        return f"WITH n AS ({_NAMESPACES.format(self._where)}) {sql}"

    def _full_signature(self) -> str:
        return str(self._query(f"SELECT {self._with_schemas(_SIGNATURE)}")[0][0])

    def _quick_signature(self) -> str:
        return self._with_schemas(_QUICK)

    def _with_schemas(self, value: str) -> str:
        namespaces = _NAMESPACES.format(self._where)
        return value.replace("(SELECT", f"(WITH n AS ({namespaces}) SELECT", 1)

    def _find_tables(self) -> list[Place]:
        return [(schema, name) for schema, name in self._query(self._in_schemas(_TABLES))]

    def _references(self) -> list[tuple[Place, Place]]:
        found = self._query(self._in_schemas(_REFERENCES))
        return [((schema, child), (other, parent)) for schema, child, other, parent in found]

    def foreign_keys_out(self) -> list[str]:
        found = self._query(self._in_schemas(_OUT))
        return [
            f"{child!r} holds {name!r}, which leads to {schema}.{parent}"
            for name, child, schema, parent in found
        ]

    def _quoted(self, place: Place) -> str:
        quote = self.suite_engine.dialect.identifier_preparer.quote_identifier
        return ".".join(map(quote, place)).replace("%%", "%")

    def _digest(self, place: Place) -> str:
        row = "pg_catalog.md5(CAST(tidyrows_row AS pg_catalog.text))"
        return (
            f"(SELECT pg_catalog.md5(pg_catalog.string_agg({row}, '' ORDER BY {row})) "
            f"FROM {self._quoted(place)} AS tidyrows_row)"
        )

    def _copy_of(self, place: Place) -> tuple[str, str]:
        """The columns that can be written, and all rows as JSON."""
        name = self._quoted(place)
        listed = self._query(_COLUMNS.format(_literal(name)))
        rows = self._query(
            f"SELECT CAST(pg_catalog.json_agg(tidyrows_row) AS pg_catalog.text) "
            f"FROM {name} AS tidyrows_row"
        )
        return ", ".join(column for (column,) in listed), str(rows[0][0])

    def _replace(self, groups: Sequence[Sequence[Place]], filled: Sequence[Place]) -> None:
        """One statement deletes from all tables of a cycle: constraints are checked at its end."""
        statements = []
        for group in groups:
            *others, last = (f"DELETE FROM {self._quoted(place)}" for place in group)
            parts = ", ".join(f"t{n} AS ({each})" for n, each in enumerate(others))
            statements.append(f"WITH {parts} {last}" if others else last)
        inserts = [self._insert(place) for place in filled]
        if inserts:
            *others, last = inserts
            parts = ", ".join(f"t{n} AS ({each})" for n, each in enumerate(others))
            statements.append(f"WITH {parts} {last}" if others else last)
        self._run_inside(statements)

    def _insert(self, place: Place) -> str:
        columns, rows = self._rows[place]
        name = self._quoted(place)
        return (
            f"INSERT INTO {name} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns} "
            f"FROM pg_catalog.json_populate_recordset(CAST(NULL AS {name}), {_literal(rows)})"
        )

    def users(self) -> list[Blocker]:
        """The sessions that hold a lock on a table of it."""
        return [
            Blocker(pid, user, application or None, host, state, age, query or None)
            for pid, user, application, host, state, age, query in self._query(
                self._in_schemas(_HOLDERS)
            )
        ]


class PostgreSQLSchema(_PostgreSQLSpace):
    """A schema; engines reach it by the search_path with which they connect."""

    kind = "schema"

    def __init__(
        self, dialect: Errors, engine: sa.Engine, name: str, connection: sa.Connection | None
    ) -> None:
        super().__init__(dialect, engine, name, connection)
        self._where = f"nspname = '{name}'"

    def marks(self) -> dict[str, str | None]:
        """The comments of the schemas."""
        return dict(self._query(_SCHEMA_MARKS))

    def create(self) -> None:
        self._run(f"DROP SCHEMA IF EXISTS {self.name} CASCADE; CREATE SCHEMA {self.name}")

    def drop(self) -> None:
        self._run(f"DROP SCHEMA IF EXISTS {self.name} CASCADE")

    def finish(self, mark: str) -> None:
        """An extension that was made here is moved to where the other schemas find it."""
        for (extension,) in self._query(_EXTENSIONS.format(self.name)):
            self._run(f"ALTER EXTENSION {extension} SET SCHEMA public")
        self.__dict__.pop("_path", None)
        self._run(f"COMMENT ON SCHEMA {self.name} IS {_literal(mark)}")

    def engine(self) -> sa.Engine:
        """Also the schemas of extensions are on its path, behind it."""
        path = self._path
        given = connect_parameters(self.suite_engine)
        if self.dialect.driver == "asyncpg":
            settings = {**(given.get("server_settings") or {}), "search_path": path}
            more: dict[str, Any] = {"server_settings": settings}
            url = self.suite_engine.url
        else:
            escaped = path.replace("\\", "\\\\").replace(" ", "\\ ")
            options = f"{given.get('options') or ''} -csearch_path={escaped}".strip()
            more = {"options": options}
            url = self.suite_engine.url.update_query_dict(more)
        return redirected(self.suite_engine, url, default_schema=self.name, **more)

    def _enter(self) -> str:
        return f"SET search_path TO {self._path}"

    @cached_property
    def _path(self) -> str:
        return ",".join([self.name, *(name for (name,) in self._query(_EXTENSION_SCHEMAS))])


class PostgreSQLDatabase(_PostgreSQLSpace):
    """A database, copied from one that was built once; a second connection reaches its rows."""

    kind = "database"
    is_copied = True
    _where = "nspname !~ '^pg_' AND nspname <> 'information_schema'"
    _inside: sa.Connection | None = None

    def marks(self) -> dict[str, str | None]:
        """The comments of the databases."""
        return dict(self.dialect._query(self.connection, _DATABASE_MARKS))  # noqa: SLF001 -- as the dialect itself asks

    def create(self) -> None:
        self.drop()
        self._run(f"CREATE DATABASE {self.name} TEMPLATE template0", self.connection)

    def copy(self, template: str) -> None:
        """Through the log where it is small, by its files where it is large."""
        self.drop()
        strategy = ""
        if (self.suite_engine.dialect.server_version_info or ()) >= _HAS_STRATEGIES:
            size = f"SELECT pg_catalog.pg_database_size('{template}')"
            bytes_of = self.dialect._query(self.connection, size)[0][0]  # noqa: SLF001 -- as the dialect itself asks
            strategy = f" STRATEGY {'FILE_COPY' if bytes_of > _FILE_COPY_FROM else 'WAL_LOG'}"
        self._run(f"CREATE DATABASE {self.name} TEMPLATE {template}{strategy}", self.connection)

    def finish(self, mark: str) -> None:
        self._run(f"COMMENT ON DATABASE {self.name} IS {_literal(mark)}", self.connection)
        if self.name.endswith("_t"):  # a template with a connection cannot be copied
            self._leave()
            self._run(_END_SESSIONS.format(self.name), self.connection)

    def drop(self) -> None:
        self._leave()
        self._run(f"DROP DATABASE IF EXISTS {self.name} WITH (FORCE)", self.connection)

    def is_clean(self) -> bool:
        """Also whether the connection that holds its lock is still there."""
        self.dialect._query(self.connection, "SELECT 1")  # noqa: SLF001 -- as the dialect itself asks
        return super().is_clean()

    def release(self) -> None:
        """Also the second connection."""
        self._leave()

    def engine(self) -> sa.Engine:
        return redirected(self.suite_engine, self.suite_engine.url.set(database=self.name))

    def foreign_keys_out(self) -> list[str]:
        """None: PostgreSQL has no foreign keys between databases."""
        return []

    def _work(self) -> sa.Connection:
        if self._inside is None or self._inside.closed:
            url = self.suite_engine.url.set(database=self.name)
            inside = redirected(self.suite_engine, url, pool_class=NullPool)
            self._inside = inside.connect()
            self._inside.execution_options(isolation_level="AUTOCOMMIT")
            self.dialect._query(self._inside, _SETTINGS)  # noqa: SLF001 -- as the dialect itself asks
        return self._inside

    def _leave(self) -> None:
        inside, self._inside = self._inside, None
        if inside is not None:
            inside.invalidate()
            inside.close()


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
