"""A database of this process on a server: random name, cleaned between tests, dropped at the end.

A home drops what a test made only where it made something, since DDL is what costs (DROP SCHEMA
with 50 tables takes 250 ms, finding it empty takes 2).
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from typing import ClassVar

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from harness.servers import Server

LOCK_SECONDS = 30
"""No test may hang: a lock that is not granted in this time is an error, also in a DROP."""


class Home(ABC):
    """One database on a server, which serves test after test."""

    backend: str

    def __init__(self, server: Server) -> None:
        self.name = f"tidyrows_{secrets.token_hex(4)}"
        self._server_engine = sa.create_engine(
            server.url, isolation_level="AUTOCOMMIT", poolclass=NullPool
        )
        self.url = server.url.set(database=self.name)
        self._create()
        self._engine = sa.create_engine(self.url, isolation_level="AUTOCOMMIT", pool_size=1)
        self._pristine = self._signature()
        self._metadata: tuple[sa.MetaData, ...] = ()

    def keep(self, *metadata: sa.MetaData) -> None:
        """Make these tables part of the clean state: a test finds them, empty."""
        self._metadata = metadata
        self._make_tables()

    def reset(self) -> None:
        """Throw out sessions that a test left, then bring back the clean state."""
        self._evict()
        if self._signature() != self._pristine:
            self._wipe()
            self._make_tables()
        elif self._metadata:
            self._empty()

    def drop(self) -> None:
        """Remove the database and every schema that a test made beside it."""
        self._evict()
        self._engine.dispose()
        self._drop()
        self._server_engine.dispose()

    def _make_tables(self) -> None:
        with self._engine.begin() as connection:
            for metadata in self._metadata:
                metadata.create_all(connection, checkfirst=False)
        self._pristine = self._signature()

    def _tables(self) -> list[str]:
        quote = self._engine.dialect.identifier_preparer.format_table
        return [quote(table) for metadata in self._metadata for table in metadata.tables.values()]

    def _tables_with_rows(self) -> list[str]:
        """Of the kept tables: to ask about all at once is one statement, to empty each is many."""
        tables = self._tables()
        asked = ", ".join(f"EXISTS (SELECT 1 FROM {table})" for table in tables)
        with self._engine.connect() as connection:
            found = connection.exec_driver_sql(f"SELECT {asked}").one()
        return [table for table, has_rows in zip(tables, found, strict=True) if has_rows]

    def _run(self, *statements: str) -> None:
        with self._engine.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def _on_server(self, *statements: str) -> None:
        with self._server_engine.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    @abstractmethod
    def extra_schema(self, suffix: str) -> str:
        """Make another schema and return its real name."""

    @abstractmethod
    def _create(self) -> None: ...

    @abstractmethod
    def _drop(self) -> None: ...

    @abstractmethod
    def _evict(self) -> None:
        """End every other session in this database: a leaked one would block the next test."""

    @abstractmethod
    def _signature(self) -> object:
        """Equal as long as nobody has changed the schema."""

    @abstractmethod
    def _wipe(self) -> None:
        """Drop everything."""

    @abstractmethod
    def _empty(self) -> None:
        """Delete the rows of the kept tables."""


class PostgresqlHome(Home):
    """A database of its own on a PostgreSQL server."""

    backend = "postgresql"

    # Every new object has a new oid, at or above FirstNormalObjectId.
    _SIGNATURE = """
        SELECT md5(string_agg(line, ' ' ORDER BY line)) FROM (
            SELECT concat('c', oid, relname, relnamespace, relrowsecurity, relacl::text)
                FROM pg_class WHERE oid >= 16384
            UNION ALL SELECT concat('a', attrelid, '.', attname, atttypid, attnotnull, atthasdef)
                FROM pg_attribute WHERE attrelid >= 16384 AND attnum > 0
            UNION ALL SELECT concat('k', oid) FROM pg_constraint WHERE oid >= 16384
            UNION ALL SELECT concat('t', oid, tgenabled) FROM pg_trigger WHERE oid >= 16384
            UNION ALL SELECT concat('p', oid) FROM pg_proc WHERE oid >= 16384
            UNION ALL SELECT concat('y', oid) FROM pg_type WHERE oid >= 16384
            UNION ALL SELECT concat('r', oid) FROM pg_rewrite WHERE oid >= 16384
            UNION ALL SELECT concat('l', oid) FROM pg_policy
            UNION ALL SELECT concat('n', oid, nspname, nspacl::text) FROM pg_namespace
                WHERE nspname !~ '^pg_'
        ) AS lines(line)
    """

    def _create(self) -> None:
        # template0 since nobody is ever connected to it, which would refuse the copy.
        self._on_server(
            f"CREATE DATABASE {self.name} TEMPLATE template0",
            f"ALTER DATABASE {self.name} SET lock_timeout = '{LOCK_SECONDS}s'",
            # No test ends this server: a COMMIT need not wait for the disk.
            f"ALTER DATABASE {self.name} SET synchronous_commit = off",
        )

    def _drop(self) -> None:
        self._on_server(f"DROP DATABASE {self.name} WITH (FORCE)")

    def extra_schema(self, suffix: str) -> str:
        self._run(f'CREATE SCHEMA "{suffix}"')
        return suffix

    def _evict(self) -> None:
        self._run(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND backend_type = 'client backend'"
        )

    def _signature(self) -> object:
        with self._engine.connect() as connection:
            return connection.exec_driver_sql(self._SIGNATURE).scalar()

    def _wipe(self) -> None:
        with self._engine.connect() as connection:
            schemas = connection.exec_driver_sql(
                "SELECT quote_ident(nspname) FROM pg_namespace"
                " WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'"
            ).scalars().all()  # fmt: skip  # the statement, then what is read from it
        self._run(
            *(f"DROP SCHEMA {schema} CASCADE" for schema in schemas),
            "CREATE SCHEMA public",
            "GRANT ALL ON SCHEMA public TO public",
        )
        self._pristine = self._signature()

    def _empty(self) -> None:
        # DELETE, not TRUNCATE, which takes 5 ms per table; the role setting needs a superuser.
        tables = self._tables_with_rows()
        if tables:
            self._run(
                "BEGIN",
                "SET LOCAL session_replication_role = replica",
                *(f"DELETE FROM {table}" for table in tables),
                "COMMIT",
            )


class MysqlHome(Home):
    """A database of its own on a MariaDB or MySQL server, and the extra ones of its tests."""

    backend = "mysql"

    _SIGNATURE: ClassVar = [
        f"SELECT {columns} FROM information_schema.{view} WHERE {kind}_schema = database()"
        for view, kind, columns in (
            ("tables", "table", "table_name, table_type"),
            ("columns", "table", "table_name, column_name, column_type, is_nullable"),
            ("referential_constraints", "constraint", "constraint_name, delete_rule"),
            ("triggers", "trigger", "trigger_name, action_statement"),
            ("routines", "routine", "routine_name, routine_type"),
        )
    ]

    def __init__(self, server: Server) -> None:
        self._extra: list[str] = []
        super().__init__(server)

    def _create(self) -> None:
        self._on_server(f"CREATE DATABASE {self.name} CHARACTER SET utf8mb4")

    def _drop(self) -> None:
        self._on_server(
            "SET foreign_key_checks = 0",  # a foreign key may lead from one to the other
            *(f"DROP DATABASE IF EXISTS {name}" for name in (*self._extra, self.name)),
        )
        self._extra.clear()

    def extra_schema(self, suffix: str) -> str:
        # The prefix tells harness.bystanders that it belongs to this database.
        name = f"{self.name}_{suffix}"
        self._on_server(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
        self._extra.append(name)
        return name

    def _evict(self) -> None:
        with self._engine.connect() as connection:
            others = connection.exec_driver_sql(
                "SELECT id FROM information_schema.processlist"
                f" WHERE db LIKE '{self.name}%%' AND id <> connection_id()"
            ).scalars().all()  # fmt: skip  # the statement, then what is read from it
            for other in others:
                try:
                    connection.exec_driver_sql(f"KILL {other}")
                except sa.exc.OperationalError as error:
                    if error.orig is None or error.orig.args[0] != 1094:  # it has just gone
                        raise

    def _signature(self) -> object:
        with self._engine.connect() as connection:
            answers = [
                sorted(map(repr, connection.exec_driver_sql(question)))
                for question in self._SIGNATURE
            ]
        return answers, tuple(self._extra)

    def _wipe(self) -> None:
        # One statement instead of a search for tables, views, triggers, routines and events.
        self._engine.dispose()
        self._drop()
        self._create()
        self._pristine = self._signature()

    def _empty(self) -> None:
        tables = self._tables_with_rows()
        if tables:
            self._run(
                "SET foreign_key_checks = 0",
                *(f"DELETE FROM {table}" for table in tables),
                "SET foreign_key_checks = 1",
            )
