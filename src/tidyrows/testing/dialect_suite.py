"""The tests that every dialect must pass, for the three of tidyrows and for yours.

Subclass :class:`DialectSuite` in a test module, with a fixture ``engine`` on a database where
tables may be created and dropped: docs/dialects.md shows it.
"""

from __future__ import annotations

import random
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from tidyrows.dialects import CommitOutcome, Fault, Loss, dialect_for
from tidyrows.dialects.base import UnknownDialect
from tidyrows.errors import LivenessLockError, SessionStateError
from tidyrows.testing.dialect_statements import CHILDREN, PARENTS, StatementTests, SuiteTables

if TYPE_CHECKING:
    from tidyrows.dialects import Dialect

_NUMBER = 0x7469647900000000
_INSERT = PARENTS.insert().values({"id": 1, "name": "a"})


class DialectSuite(StatementTests):
    """Every test is one promise of :class:`~tidyrows.dialects.Dialect`."""

    # ----- errors

    def test_the_database_has_a_dialect_of_its_own(self, dialect: Dialect) -> None:
        assert not isinstance(dialect, UnknownDialect)

    def test_an_error_that_no_retry_mends_is_raised(self, tables: SuiteTables) -> None:
        dialect = tables.dialect
        for error in (ValueError("no code"), KeyError(), LookupError("x", 1)):
            assert dialect.fault(error) is Fault.OTHER
            assert not dialect.is_timeout(error)
            assert not dialect.is_permission_denied(error)
        with tables.engine.connect() as connection, pytest.raises(sa.exc.DBAPIError) as caught:
            connection.exec_driver_sql("SELEKT 1")
        assert dialect.fault(caught.value) is Fault.OTHER

    def test_an_invalidated_connection_is_lost(self, dialect: Dialect) -> None:
        error = sa.exc.DBAPIError("SELECT 1", None, Exception(), connection_invalidated=True)
        assert dialect.fault(error) is Fault.LOST
        assert dialect.fault(ConnectionRefusedError()) is Fault.LOST

    def test_a_broken_foreign_key_is_a_constraint(self, tables: SuiteTables) -> None:
        tables.insert(PARENTS, [(1, "a")])
        tables.insert(CHILDREN, [(1, 1)])
        with pytest.raises(sa.exc.DBAPIError) as caught:
            tables.delete(PARENTS, [1])
        assert tables.dialect.fault(caught.value) is Fault.CONSTRAINT
        assert tables.keys(PARENTS) == [1]

    def test_a_wait_for_a_lock_ends_and_is_transient(self, tables: SuiteTables) -> None:
        """Promise 4: never hangs."""
        tables.insert(PARENTS, [(1, "a"), (2, "b")])
        with tables.cleanup() as holder:
            tables.dialect.delete_by_keys(holder, tables.real(PARENTS), [1])
            began = time.monotonic()
            with pytest.raises(sa.exc.DBAPIError) as caught:
                tables.delete(PARENTS, [1], lock_timeout=1)
            assert time.monotonic() - began < 10
            assert tables.dialect.fault(caught.value) is Fault.TRANSIENT
            assert tables.dialect.is_timeout(caught.value)
            if tables.dialect.has_row_locks:
                assert tables.delete(PARENTS, [2], lock_timeout=1) == 1

    def test_a_failed_statement_does_not_lose_rows_silently(self, tables: SuiteTables) -> None:
        """``loss`` NOTHING is only right if the earlier rows can still be committed."""
        with tables.engine.connect() as connection:
            connection.execute(_INSERT)
            tables.dialect.before_savepoint(connection)
            savepoint = connection.begin_nested()
            with pytest.raises(sa.exc.DBAPIError) as caught:
                connection.execute(_INSERT)
            loss = tables.dialect.loss(caught.value, connection.connection.dbapi_connection)
            savepoint.rollback()
            connection.commit()
        left = tables.keys(PARENTS)
        assert left == ([] if loss is Loss.EVERYTHING else [1]) or loss is Loss.UNKNOWN

    # ----- sessions

    def test_the_state_of_a_transaction_is_known_or_unknown_and_never_wrong(
        self, tables: SuiteTables
    ) -> None:
        with tables.engine.connect() as connection:
            raw = connection.connection.dbapi_connection
            assert tables.dialect.in_transaction(raw) in {False, None}
            connection.execute(_INSERT)
            assert tables.dialect.in_transaction(raw) in {True, None}
            assert not tables.dialect.is_autocommit(connection)
            assert not tables.dialect.commit_is_void(connection)
            connection.commit()
            assert tables.dialect.in_transaction(raw) in {False, None}
        assert tables.keys(PARENTS) == [1]

    def test_a_cleanup_commits_or_rolls_back_all_of_its_statements(
        self, tables: SuiteTables
    ) -> None:
        tables.insert(PARENTS, [(1, "a"), (2, "b")])
        with pytest.raises(LookupError), tables.cleanup() as connection:
            tables.dialect.delete_by_keys(connection, tables.real(PARENTS), [1])
            raise LookupError
        assert tables.keys(PARENTS) == [1, 2]
        tables.delete(PARENTS, [1])
        assert tables.keys(PARENTS) == [2]
        with tables.engine.connect() as connection:
            tables.dialect.begin_reading(connection, lock_timeout=1)
            assert tables.dialect.existing_keys(connection, tables.real(PARENTS), [1, 2]) == [2]
            connection.rollback()
            tables.dialect.end_cleanup(connection)

    def test_a_cleanup_refuses_a_transaction_of_somebody_else(self, tables: SuiteTables) -> None:
        with tables.engine.connect() as connection:
            connection.execute(sa.select(PARENTS.c.id)).all()
            with pytest.raises(SessionStateError):
                tables.dialect.begin_cleanup(connection, lock_timeout=1)

    def test_a_cleanup_sees_what_others_commit_meanwhile(self, tables: SuiteTables) -> None:
        """READ COMMITTED; where one writer locks the whole database, nobody commits meanwhile."""
        if not tables.dialect.has_row_locks:
            pytest.skip("nobody else can commit during a cleanup")
        real = tables.real(PARENTS)
        with tables.cleanup() as connection:
            assert tables.dialect.existing_keys(connection, real, [1]) == []
            tables.insert(PARENTS, [(1, "a")])
            assert tables.dialect.existing_keys(connection, real, [1]) == [1]

    def test_a_failed_commit_leaves_nothing_to_the_pools_next_user(
        self, tables: SuiteTables
    ) -> None:
        tables.dialect.guard_pool(tables.engine)
        with tables.engine.connect() as connection:
            connection.execute(_INSERT)
            if tables.dialect.in_transaction(connection.connection.dbapi_connection) is None:
                pytest.skip("the driver does not know what a failed COMMIT left open")
            outcome = tables.dialect.commit_outcome(ValueError("a listener's"), connection)
            assert outcome in {CommitOutcome.OPEN, CommitOutcome.UNKNOWN}
            # As SQLAlchemy has it after a COMMIT that raised.
            connection.get_transaction().is_active = False  # type: ignore[union-attr]
        with tables.engine.connect() as connection:
            assert connection.execute(sa.select(PARENTS.c.id)).all() == []

    def test_the_servers_clock_is_in_seconds(self, engine: sa.Engine, dialect: Dialect) -> None:
        with engine.connect() as connection:
            now: Any = connection.execute(sa.select(sa.literal_column(dialect.clock))).scalar_one()
        assert abs(float(now) - time.time()) < 3600

    # ----- locks

    def test_a_blocker_is_named_where_the_database_knows_it(self, tables: SuiteTables) -> None:
        with tables.engine.connect() as first, tables.engine.connect() as second:
            ids = {tables.dialect.server_id(c.connection.dbapi_connection) for c in (first, second)}
            waiter = tables.dialect.waiter(first)
            first.rollback()
            if waiter is None or not tables.dialect.blockers_need_cursor:
                return
            assert len(ids) == 2
            with closing(second.connection.cursor()) as cursor:
                assert tables.dialect.blockers(cursor, waiter) == []  # it does not wait
            second.invalidate()

    def test_a_live_worker_is_seen_and_an_ended_one_is_not(
        self, engine: sa.Engine, dialect: Dialect
    ) -> None:
        number = _NUMBER + random.getrandbits(32)
        lock = dialect.liveness_lock(engine, number, patience=0)
        lock.acquire()
        try:
            lock.renew()
            with engine.connect() as connection:
                seen = dialect.is_alive(connection, number)
                connection.rollback()
                if seen is None:
                    return
                assert seen
                assert dialect.is_alive(connection, number + 1) is False
                connection.rollback()
            with pytest.raises(LivenessLockError):
                dialect.liveness_lock(engine, number, patience=0).acquire()
            if dialect.heartbeat_in_file:
                with engine.connect() as connection:
                    age = dialect.heartbeat_file_age(connection, number)
                assert age is not None
                assert age < 60
        finally:
            lock.release()
            lock.release()
        with engine.connect() as connection:
            assert dialect.is_alive(connection, number) is False
            dialect.remove_liveness_files(connection)

    # ----- catalogue

    def test_a_name_means_the_real_table(self, tables: SuiteTables, dialect: Dialect) -> None:
        with tables.engine.connect() as connection:
            connection.execute(_INSERT)
            real = dialect.resolve(connection, None, PARENTS.name)
            assert real is not None
            assert (real.schema, real.kind) == (tables.schema, "table")
            assert dialect.resolve(connection, tables.schema, PARENTS.name) == real
            assert dialect.resolve(connection, None, "tidyrows_suite_absent") is None
            assert dialect.resolve(connection, "tidyrows_absent", PARENTS.name) is None
            connection.commit()  # the questions did not make the transaction fail
        assert tables.keys(PARENTS) == [1]

    def test_a_view_is_no_table(self, tables: SuiteTables, dialect: Dialect) -> None:
        name = "tidyrows_suite_view"
        with tables.engine.begin() as connection:
            connection.exec_driver_sql(f"CREATE VIEW {name} AS SELECT id FROM {PARENTS.name}")
        try:
            with tables.engine.connect() as connection:
                real = dialect.resolve(connection, None, name)
            assert real is not None
            assert real.kind == "other"
        finally:
            with tables.engine.begin() as connection:
                connection.exec_driver_sql(f"DROP VIEW {name}")

    def test_foreign_keys_are_read(self, tables: SuiteTables, dialect: Dialect) -> None:
        schema = tables.schema
        with tables.engine.connect() as connection:
            keys = dialect.foreign_keys(connection, [schema])
            assert schema in dialect.schemas_that_reference(connection, [schema])
            assert schema in dialect.application_schemas(connection)
            assert dialect.enforces_foreign_keys(connection) in {True, False}
            assert dialect.delete_suppressors(connection, tables.real(PARENTS)) == []
            assert dialect.hidden_tables(connection, [schema]) == set()
            assert dialect.invalid_indexes(connection, schema, CHILDREN.name) == set()
            assert PARENTS.name not in dialect.storage_tables(connection, schema)
        assert dialect.default_schema(tables.engine) == schema
        (key,) = (key for key in keys if key.child == (schema, CHILDREN.name))
        assert (key.parent, key.on_delete) == ((schema, PARENTS.name), "NO ACTION")
        assert (key.child_columns, key.parent_columns) == (("parent_id",), ("id",))

    def test_two_engines_on_one_database_have_one_identity(
        self, engine: sa.Engine, dialect: Dialect
    ) -> None:
        engine.connect().close()
        other = sa.create_engine(engine.url)
        try:
            if not dialect.is_private(engine):
                assert dialect_for(other).identity(other) == dialect.identity(engine)
                assert dialect.identity(engine) is not None
            assert dialect.missing_file(engine) is None
        finally:
            other.dispose()

    def test_a_commit_changes_the_mark(self, tables: SuiteTables, dialect: Dialect) -> None:
        with tables.engine.connect() as connection:
            before = dialect.change_mark(connection, lock_timeout=1)
            connection.rollback()
            if before is None:
                pytest.skip("this database has no mark")
            tables.insert(PARENTS, [(1, "a")])
            assert dialect.change_mark(connection, lock_timeout=1) != before

    def test_the_ledgers_text_is_long_and_takes_any_character(self, tables: SuiteTables) -> None:
        dialect, engine = tables.dialect, tables.engine
        table = sa.Table(
            "tidyrows_suite_ledger",
            sa.MetaData(),
            sa.Column("name", sa.String(40)),
            sa.Column("entry", dialect.long_text),
            **dict[str, Any](dialect.table_options),
        )
        table.create(engine)
        try:
            row = ("né 鍵 🔑", "x" * 200_000)
            with engine.begin() as connection:
                connection.execute(table.insert().values(row))
                assert tuple(connection.execute(sa.select(table)).one()) == row
        finally:
            table.drop(engine)
