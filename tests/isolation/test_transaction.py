"""Level transaction: what a test does to its one transaction, and what that cannot be."""

import threading
from contextlib import closing, nullcontext, suppress

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from harness.models import Currency, Group, Org, User, Yang, Yin
from harness.targets import on
from tidyrows import CleanupManager, ProductionDatabaseError, ResourceTracker, TidyRowsError
from tidyrows.capture.engine import capture_for
from tidyrows.dialects import dialect_for
from tidyrows.errors import IsolationError
from tidyrows.isolation.isolate import isolate
from tidyrows.observe.all_engines import AllEngines, ObservingSink

EVERY_DRIVER = True  # drivers differ here

GROUPS = Group.__table__


@pytest.fixture
def db(zoo_engine):
    with isolate(zoo_engine, "transaction") as isolation:
        yield isolation


def add(bind, name):
    """Commit a group through a connection of its own."""
    with bind.begin() as connection:
        connection.execute(sa.insert(GROUPS), {"name": name})


def names(bind):
    with bind.connect() as connection:
        return sorted(connection.scalars(sa.select(Group.name)))


def is_(engine, *backends):
    return engine.dialect.name in backends


# -- two at once ---------------------------------------------------------------------------------


def test_a_session_that_only_reads_takes_nothing_back_with_it(db):
    """In the usual recipe its ROLLBACK undoes what another one has committed since it began."""
    with db.session() as reader:
        assert reader.scalars(sa.select(Group)).all() == []
        add(db.engine, "committed by the application")
        reader.rollback()
        assert names(db.engine) == ["committed by the application"]


@pytest.mark.parametrize("first_ends", ["commit", "rollback"])
@pytest.mark.parametrize("second_ends", ["commit", "rollback"])
def test_a_transaction_may_run_within_another_one(zoo_engine, first_ends, second_ends):
    ended = {"first": first_ends, "second": second_ends}
    refused = pytest.raises(IsolationError, match="has written since, 'INSERT INTO")
    with refused if list(ended.values()) == ["rollback", "commit"] else nullcontext():
        with isolate(zoo_engine, "transaction") as db:
            with db.engine.connect() as first, db.engine.connect() as second:
                first.execute(sa.insert(GROUPS), {"name": "first"})
                second.execute(sa.insert(GROUPS), {"name": "second"})
                getattr(second, second_ends)()
                getattr(first, first_ends)()
            assert names(db.engine) == [name for name, end in ended.items() if end == "commit"]
    assert names(zoo_engine) == []


def test_two_that_write_in_turns_commit_in_any_order(db):
    with db.engine.connect() as first, db.engine.connect() as second, db.engine.connect() as third:
        for name in "ab":
            first.execute(sa.insert(GROUPS), {"name": f"first {name}"})
            second.execute(sa.insert(GROUPS), {"name": f"second {name}"})
        assert third.scalar(sa.select(sa.func.count()).select_from(Group)) == 4
        first.commit()
        third.rollback()
        second.commit()
        third.execute(sa.insert(GROUPS), {"name": "third"})
        third.rollback()
    assert names(db.engine) == ["first a", "first b", "second a", "second b"]


def test_savepoints_of_two_connections_are_kept_apart(db):
    """Their names would be the same, and MariaDB knows the last one of a name only."""
    with db.engine.connect() as first, db.engine.connect() as second:
        first.execute(sa.insert(GROUPS), {"name": "first"})
        outer = first.begin_nested()
        first.execute(sa.insert(GROUPS), {"name": "rolled back"})
        with second.begin_nested():
            assert second.scalars(sa.select(Group.name)).all() == ["first", "rolled back"]
        second.commit()
        outer.rollback()
        first.commit()
    assert names(db.engine) == ["first"]


def test_a_savepoint_around_what_another_one_has_committed_cannot_be_rolled_back(zoo_engine):
    with pytest.raises(IsolationError, match="cannot roll back 'ROLLBACK TO SAVEPOINT"):
        with isolate(zoo_engine, "transaction") as db, db.engine.connect() as first:
            savepoint = first.begin_nested()
            add(db.engine, "committed")
            savepoint.rollback()
    assert names(zoo_engine) == []


def test_a_savepoint_that_is_released_around_another_ones_is_left_to_it(db):
    with db.engine.connect() as first, db.engine.connect() as second:
        savepoint = first.begin_nested()
        first.execute(sa.insert(GROUPS), {"name": "first"})
        second.execute(sa.insert(GROUPS), {"name": "second"})
        savepoint.commit()
        second.rollback()
        first.commit()
    assert names(db.engine) == ["first"]


def test_the_failed_statement_of_one_fails_no_other(db):
    """PostgreSQL refuses everything in a transaction in which a statement has failed."""
    add(db.engine, "committed")
    with db.engine.connect() as first, db.engine.connect() as second:
        first.execute(sa.insert(GROUPS), {"name": "undone"})
        with pytest.raises(sa.exc.DBAPIError):
            first.execute(sa.text("SELECT * FROM there_is_no_such_table"))
        assert "committed" in second.scalars(sa.select(Group.name)).all()
        first.rollback()
        first.execute(sa.insert(GROUPS), {"name": "again"})
        first.commit()
    assert names(db.engine) == ["again", "committed"]


@on("postgresql+psycopg", "postgresql+psycopg2", fixture="zoo_database")
def test_what_has_failed_stays_failed_until_its_rollback(db):
    with db.engine.connect() as first:
        first.execute(sa.insert(GROUPS), {"name": "undone"})
        with pytest.raises(sa.exc.DBAPIError):
            first.execute(sa.text("SELECT 1/0"))
        assert names(db.engine) == []
        with pytest.raises(IsolationError, match=r"before its rollback\(\)"):
            first.execute(sa.insert(GROUPS), {"name": "never"})
        first.commit()  # as PostgreSQL does: a ROLLBACK, and no error
    with db.engine.connect() as first:
        first.execute(sa.insert(GROUPS), {"name": "never"})
        with pytest.raises(sa.exc.DBAPIError):
            first.execute(sa.text("SELECT 1/0"))
        first.commit()
    assert names(db.engine) == []
    assert len(db.tracker) == 0


@pytest.mark.parametrize("ends", ["commit", "rollback"])
def test_the_failed_statement_of_one_loses_no_commit_of_another(zoo_engine, ends):
    """On PostgreSQL the COMMIT would be a ROLLBACK, and that of the one that failed a COMMIT."""
    aborts = is_(zoo_engine, "postgresql")
    refused = pytest.raises(IsolationError, match="has written since, 'INSERT INTO")
    with refused if aborts and ends == "commit" else nullcontext():
        with isolate(zoo_engine, "transaction") as db:
            first, second = db.session(), db.session()
            for session, name in ((first, "first"), (second, "second")):
                session.add(Group(name=name))
                session.flush()
            with pytest.raises(sa.exc.DBAPIError):
                first.execute(sa.text("SELECT * FROM nowhere"))
            getattr(second, ends)()
            first.commit()
            wanted = [] if aborts else ["first"]
            assert names(db.engine) == wanted + (["second"] if ends == "commit" else [])


def test_threads_that_begin_at_once_have_one_statement_each(any_driver_zoo_engine):
    together = threading.Barrier(4)
    errors = []

    def work(number, engine):
        try:
            together.wait(10)
            for each in range(5):
                add(engine, f"{number} {each}")
        except BaseException as error:  # noqa: BLE001 -- it is of another thread
            errors.append(error)

    with isolate(any_driver_zoo_engine, "transaction") as db:
        threads = [threading.Thread(target=work, args=(each, db.engine)) for each in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert len(names(db.engine)) == 20


@on("postgresql+psycopg", fixture="zoo_database")
@pytest.mark.parametrize("sql", ["EXPLAIN ANALYZE DELETE FROM groups", 'SELECT "Clear"()'])
def test_what_looks_like_a_question_and_writes_is_rolled_back(db, sql):
    with db.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION \"Clear\"() RETURNS void LANGUAGE sql AS 'DELETE FROM groups'"
        )
    add(db.engine, "committed")
    with db.engine.connect() as connection:
        connection.exec_driver_sql(sql)
    assert names(db.engine) == ["committed"]


@on("mysql+pymysql", fixture="zoo_database")
def test_a_compound_statement_runs(db):
    with db.engine.begin() as connection:
        connection.exec_driver_sql(
            "BEGIN NOT ATOMIC INSERT INTO `groups` (name) VALUES ('one'); END"
        )
    assert names(db.engine) == ["one"]


def test_a_thread_may_use_it_while_the_test_waits(any_driver_zoo_engine):
    with isolate(any_driver_zoo_engine, "transaction") as db:
        thread = threading.Thread(target=add, args=(db.engine, "by a thread"))
        thread.start()
        thread.join()
        assert names(db.engine) == ["by a thread"]
        assert len(db.tracker) == 1


def test_a_streamed_result_is_read_to_its_end_while_another_one_writes(any_driver_zoo_engine):
    with isolate(any_driver_zoo_engine, "transaction") as db:
        with db.engine.begin() as connection:
            connection.execute(sa.insert(GROUPS), [{"name": f"{each}"} for each in range(30)])
        read = []
        with db.engine.connect() as reader, db.engine.connect() as writer:
            for name in reader.execution_options(yield_per=5).scalars(sa.select(Group.name)):
                read.append(name)
                if len(read) == 7:
                    writer.execute(sa.delete(GROUPS))
                    writer.rollback()
        assert len(read) == 30


# -- what would end the transaction --------------------------------------------------------------


@pytest.mark.parametrize("sql", ["COMMIT", " -- now\n rollback", "END", "BEGIN"])
def test_the_end_of_a_transaction_in_a_string_is_not_sent(zoo_engine, sql):
    with pytest.raises(IsolationError, match=r"cannot send .*Nothing was sent") as caught:
        with isolate(zoo_engine, "transaction") as db, db.engine.connect() as connection:
            connection.execute(sa.insert(GROUPS), {"name": "never"})
            with suppress(TidyRowsError):  # as an application may: the test fails nevertheless
                connection.exec_driver_sql(sql)
            with pytest.raises(IsolationError, match="cannot send"):
                connection.execute(sa.select(Group))
    assert caught.value.level == "transaction"
    assert not caught.value.escaped
    assert names(zoo_engine) == []


def test_ddl_commits_nothing(zoo_engine):
    """It is rolled back with the test, or not sent where it would commit."""
    metadata = sa.MetaData()
    sa.Table("made_by_the_test", metadata, sa.Column("id", sa.Integer, primary_key=True))
    refused = pytest.raises(IsolationError, match="cannot send 'CREATE TABLE made_by_the_test")
    with refused if dialect_for(zoo_engine).ddl_commits else nullcontext():
        with isolate(zoo_engine, "transaction") as db:
            add(db.engine, "never")
            metadata.create_all(db.engine)
            assert sa.inspect(db.engine).has_table("made_by_the_test")
    assert not sa.inspect(zoo_engine).has_table("made_by_the_test")
    assert names(zoo_engine) == []


def test_a_commit_past_sqlalchemy_fails_the_test_and_its_rows_are_deleted(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    add(engine, "a stranger's")
    with pytest.raises(IsolationError, match="ended behind its back") as caught:
        with isolate(engine, "transaction") as db:
            with db.session() as session:
                session.add(Org(name="committed"))
                session.commit()
                session.add(Org(name="in the session"))
                session.flush()
                cursor = session.connection().connection.cursor()
                cursor.execute("COMMIT")
                cursor.close()
                session.rollback()
    error = caught.value
    assert error.escaped
    assert "savepoint is gone after 'a statement past SQLAlchemy'" in str(error)
    assert {row.table.name for row in error.rows} == {"orgs"}
    assert "orgs" in error.__notes__[0]
    with engine.connect() as connection:
        assert connection.scalars(sa.select(Org.name)).all() == []
    assert names(engine) == ["a stranger's"]
    with engine.begin() as connection:
        connection.execute(sa.delete(Group))


def test_a_commit_past_sqlalchemy_at_the_very_end_is_noticed_too(zoo_engine):
    with pytest.raises(IsolationError, match="ended behind its back") as caught:
        with isolate(zoo_engine, "transaction") as db:
            add(db.engine, "committed")
            raw = db.engine.raw_connection()
            raw.cursor().execute("COMMIT")
    assert len(caught.value.rows) == 1
    assert names(zoo_engine) == []


@on("sqlite", fixture="zoo_database")
def test_a_script_that_commits_is_noticed(zoo_engine):
    with pytest.raises(IsolationError, match="ended behind its back"):
        with isolate(zoo_engine, "transaction") as db:
            add(db.engine, "committed")
            with db.engine.connect() as connection:
                connection.connection.executescript("SELECT 1")
    assert names(zoo_engine) == []


@on("mysql+pymysql", fixture="zoo_database")
def test_a_procedure_that_commits_is_noticed(zoo_engine):
    with zoo_engine.begin() as connection:
        connection.exec_driver_sql("CREATE PROCEDURE committing() COMMIT")
    try:
        with pytest.raises(IsolationError, match="gone after 'CALL committing"):
            with isolate(zoo_engine, "transaction") as db, db.engine.connect() as connection:
                connection.execute(sa.insert(GROUPS), {"name": "committed"})
                connection.exec_driver_sql("CALL committing()")
                connection.commit()
    finally:
        with zoo_engine.begin() as connection:
            connection.exec_driver_sql("DROP PROCEDURE committing")
    assert names(zoo_engine) == []


def test_a_cursor_of_the_driver_is_rolled_back_after_a_commit_too(any_driver_zoo_engine):
    groups = any_driver_zoo_engine.dialect.identifier_preparer.format_table(GROUPS)
    with isolate(any_driver_zoo_engine, "transaction") as db:
        raw = db.engine.raw_connection()
        with closing(raw.cursor()) as cursor:
            cursor.execute(f"INSERT INTO {groups} (name) VALUES ('one')")
            raw.commit()
            add(db.engine, "two")
            raw.rollback()
            cursor.execute(f"INSERT INTO {groups} (name) VALUES ('undone')")
            cursor.execute(f"SELECT name FROM {groups} ORDER BY name")
            assert [*cursor.fetchmany(1), *cursor] == [("one",), ("two",), ("undone",)]
            raw.rollback()
        raw.close()
        assert names(db.engine) == ["one", "two"]


@on("postgresql+psycopg", fixture="zoo_database")
def test_the_drivers_own_savepoint_ends_nothing(db):
    with db.engine.connect() as first, db.engine.connect() as second:
        second.execute(sa.insert(GROUPS), {"name": "second"})
        driver = first.connection.driver_connection
        for name in ("one", "two"):
            with driver.transaction(), driver.transaction():
                driver.execute("INSERT INTO groups (name) VALUES (%s)", [name])
        with suppress(ZeroDivisionError), driver.transaction():
            driver.execute("INSERT INTO groups (name) VALUES ('undone')")
            raise ZeroDivisionError
        second.commit()
        first.execute(sa.insert(GROUPS), {"name": "undone too"})
        with driver.transaction():
            driver.execute("INSERT INTO groups (name) VALUES ('undone with it')")
        first.rollback()
    assert names(db.engine) == ["one", "second", "two"]


@on("postgresql+psycopg", "mysql+pymysql", fixture="zoo_database")
@pytest.mark.parametrize("raw", [False, True])
def test_what_the_suites_own_engine_commits_in_the_block_fails_the_test(zoo_engine, raw):
    with pytest.raises(IsolationError, match=r"1 row\(s\) of \S*groups inserted"):
        with isolate(zoo_engine, "transaction") as db:
            add(db.engine, "rolled back")
            if raw:
                with zoo_engine.begin() as connection:
                    sql = (
                        f"INSERT INTO {connection.dialect.identifier_preparer.format_table(GROUPS)}"
                    )
                    connection.exec_driver_sql(f"{sql} (name) VALUES ('stays')")
            else:
                add(zoo_engine, "stays")
    assert names(zoo_engine) == ["stays"]
    assert capture_for(zoo_engine).sinks.watcher is None
    with isolate(zoo_engine, "transaction"):
        assert names(zoo_engine) == ["stays"]
    with zoo_engine.begin() as connection:
        connection.execute(sa.delete(Group))


@on("postgresql+psycopg", fixture="zoo_database")
def test_blocks_that_overlap_leave_nobody_who_listens(zoo_engine):
    first, second = isolate(zoo_engine, "transaction"), isolate(zoo_engine, "transaction")
    first.open()
    second.open()
    first.close()
    add(zoo_engine, "stays")
    with pytest.raises(IsolationError, match="engine has committed"):
        second.close()
    assert capture_for(zoo_engine).sinks.watcher is None
    with zoo_engine.begin() as connection:
        connection.execute(sa.delete(Group))


@on("sqlite", fixture="zoo_database")
def test_a_file_that_the_block_has_locked_says_so_to_the_suites_own_engine(zoo_engine):
    with isolate(zoo_engine, "transaction"), zoo_engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout = 1")
        with pytest.raises(sa.exc.OperationalError) as caught:
            connection.execute(sa.insert(GROUPS), {"name": "one"})
    assert "db.session()" in caught.value.__notes__[0]


def test_a_connection_of_the_pool_commits_and_rolls_back_as_usual(db):
    raw = db.engine.raw_connection()
    insert = "INSERT INTO currencies (code, name) VALUES ('{}', 'x')"
    for code, end in (("AAA", raw.commit), ("BBB", raw.rollback), ("CCC", raw.commit)):
        cursor = raw.cursor()
        cursor.execute(insert.format(code))
        cursor.close()
        end()
    raw.cursor().execute(insert.format("DDD"))
    raw.close()
    with db.engine.connect() as connection:
        assert sorted(connection.scalars(sa.select(Currency.code))) == ["AAA", "CCC"]


def test_the_note_of_an_earlier_break_is_on_the_error_of_the_test(zoo_engine):
    with pytest.raises(AssertionError) as caught:
        with isolate(zoo_engine, "transaction") as db, db.engine.connect() as connection:
            with suppress(TidyRowsError):
                connection.exec_driver_sql("COMMIT")
            raise AssertionError
    assert "cannot send 'COMMIT'" in caught.value.__notes__[0]


# -- what the database does ----------------------------------------------------------------------


def deadlock(db, rows):
    """Run into one: update two rows, in the other order than another connection does."""
    first, second = rows
    update = sa.update(Group).values(name="changed")
    other = db._given.connect()
    other.execute(update.where(Group.id == second))
    reached = threading.Event()

    def cross():
        reached.set()
        try:
            for _ in range(20):  # the lighter transaction is the victim
                other.execute(sa.insert(Org), {"name": "weight"})
            other.execute(update.where(Group.id == first))
        finally:
            other.rollback()
            other.close()

    with db.session() as session:
        session.execute(update.where(Group.id == first))
        thread = threading.Thread(target=cross)
        thread.start()
        reached.wait(10)
        try:
            with pytest.raises(sa.exc.DBAPIError) as caught:
                session.execute(update.where(Group.id == second))
        finally:
            thread.join()
        session.rollback()
    return caught.value


@on("mysql+pymysql", "mysql+mysqldb", fixture="zoo_database")
@pytest.mark.parametrize("commits_before", [False, True])
def test_a_deadlock_surfaces_as_one(zoo_engine, commits_before):
    """InnoDB rolls all back, our savepoints too: 1305 would hide the error that tests retry."""
    with zoo_engine.begin() as connection:
        connection.execute(sa.insert(GROUPS), [{"name": "a"}, {"name": "b"}])
        rows = sorted(connection.scalars(sa.select(Group.id)))
    try:
        if commits_before:
            with pytest.raises(IsolationError, match="rolled back by the database as a whole"):
                with isolate(zoo_engine, "transaction") as db:
                    add(db.engine, "committed before")
                    assert deadlock(db, rows).orig.args[0] == 1213
        else:
            with isolate(zoo_engine, "transaction") as db:
                assert deadlock(db, rows).orig.args[0] == 1213
                add(db.engine, "the retry")
                assert names(db.engine) == ["a", "b", "the retry"]
        assert names(zoo_engine) == ["a", "b"]
    finally:
        with zoo_engine.begin() as connection:
            connection.execute(sa.delete(Group))


@on("postgresql+psycopg", "mysql+pymysql", "mysql+mysqldb", fixture="zoo_database")
def test_a_broken_connection_is_named(zoo_engine, zoo_database):
    other = zoo_database.engine()
    kill = "KILL {}" if is_(zoo_engine, "mysql", "mariadb") else "SELECT pg_terminate_backend({})"
    with pytest.raises(IsolationError, match="lost with its connection"):
        with isolate(zoo_engine, "transaction") as db:
            add(db.engine, "lost")
            with db.session() as session:
                raw = session.connection().connection.dbapi_connection
                number = dialect_for(zoo_engine).server_id(raw)
                with other.connect() as connection:
                    connection.exec_driver_sql(kill.format(number))
                with pytest.raises(sa.exc.DBAPIError):
                    session.execute(sa.select(Group))
            with pytest.raises(IsolationError, match="lost with its connection"):
                names(db.engine)
    assert names(zoo_engine) == []


@on("sqlite", "postgresql+psycopg", fixture="zoo_database")
def test_a_constraint_that_waits_for_the_commit_is_checked_at_each_commit(zoo_engine):
    """MariaDB has no such constraints."""
    with isolate(zoo_engine, "transaction") as db:
        for _ in range(2):
            with pytest.raises(sa.exc.IntegrityError), db.engine.begin() as connection:
                connection.execute(sa.insert(Yin), {"id": 1, "yang_id": 2})
            with db.session() as session:
                session.add(Yin(id=1, yang_id=2))
                session.flush()
                session.add(Yang(id=2, yin_id=1))
                session.commit()
                session.execute(sa.delete(Yang))
                with pytest.raises(sa.exc.IntegrityError):
                    session.commit()
                session.rollback()
                assert len(session.scalars(sa.select(Yang)).all()) == 1
                session.execute(sa.delete(Yang))
                session.execute(sa.delete(Yin))
                session.commit()
        with db.session() as session:
            session.add(Yin(id=1, yang_id=2))
            session.flush()  # and never committed, as a test may


@on("postgresql+psycopg")
def test_a_constraint_that_is_made_in_the_test_is_checked_at_its_end(engine):
    with pytest.raises(IsolationError, match="rows in it that no database would commit") as caught:
        with isolate(engine, "transaction") as db, db.engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE p (id int PRIMARY KEY)")
            connection.exec_driver_sql(
                "CREATE TABLE c (id int REFERENCES p DEFERRABLE INITIALLY DEFERRED)"
            )
            connection.exec_driver_sql("INSERT INTO c VALUES (1)")
    assert not caught.value.escaped


# -- SQLite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///file:/tidy-{}?vfs=memdb&uri=true"])
def test_a_database_in_memory_is_rolled_back(url):
    engine = sa.create_engine(url.format(id(url)))
    try:
        Group.__table__.create(engine)
        with engine.connect():  # else the memdb would be gone with its last connection
            for _ in range(2):
                with isolate(engine, "transaction") as db:
                    add(db.engine, "one")
                    assert names(db.engine) == ["one"]
                    assert len(db.tracker) == 1
        assert names(engine) == []
    finally:
        engine.dispose()


def test_an_open_transaction_on_the_one_connection_is_named():
    engine = sa.create_engine("sqlite://")
    Group.__table__.create(engine)
    with engine.connect() as connection:
        connection.execute(sa.insert(GROUPS), {"name": "open"})
        with pytest.raises(IsolationError, match="has a transaction open"):
            isolate(engine, "transaction").open()
        connection.rollback()
    engine.dispose()


@on("sqlite", fixture="zoo_database")
def test_a_file_has_one_writer_and_the_wait_for_it_ends(zoo_database, zoo_engine):
    other = zoo_database.engine(connect_args={"timeout": 0.05})
    with isolate(zoo_engine, "transaction") as db:
        assert names(db.engine) == []
        with pytest.raises(IsolationError, match=r"could not begin .*locked, held by pid \d+"):
            isolate(other, "transaction").open()
    with isolate(other, "transaction"):
        pass


@on("sqlite", fixture="zoo_database")
def test_a_begin_of_every_engines_listener_is_not_sent(zoo_database):
    """As SQLAlchemy's recipe for SQLite has it, on the class: it would be within a transaction."""

    def begin(connection):
        connection.exec_driver_sql("BEGIN")

    engine = zoo_database.engine()
    with isolate(engine, "transaction"):
        pass
    sa.event.listen(sa.Engine, "begin", begin)
    try:
        with isolate(engine, "transaction") as db:
            add(db.engine, "one")
            assert names(db.engine) == ["one"]
    finally:
        sa.event.remove(sa.Engine, "begin", begin)
    assert names(engine) == []


# -- connections ---------------------------------------------------------------------------------


CHANGES = {
    "mysql": ("SET foreign_key_checks = 0", "SELECT @@foreign_key_checks", 1),
    "postgresql": (
        "SELECT pg_advisory_lock(4711)",
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711",
        0,
    ),
    "sqlite": ("PRAGMA query_only = 1", "PRAGMA query_only", 0),
}


def test_a_changed_session_is_not_given_back(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    change, ask, expected = CHANGES[dialect_for(engine).name]
    with isolate(engine, "transaction") as db, db.engine.connect() as connection:
        connection.exec_driver_sql(change)
    with engine.connect() as connection:
        assert connection.exec_driver_sql(ask).scalar() == expected


def test_an_unchanged_session_is_used_again(zoo_database):
    engine = zoo_database.engine()
    made = []
    sa.event.listen(engine, "connect", lambda *_arguments: made.append(1))
    for number in range(3):
        with isolate(engine, "transaction") as db:
            add(db.engine, f"{number}")
            sa.inspect(db.engine).get_columns("groups")
            assert names(db.engine) == [f"{number}"]
    assert len(made) == 1
    assert engine.pool.checkedout() == 0


def test_dispose_ends_nothing_of_the_test(db):
    add(db.engine, "one")
    db.engine.dispose()
    assert names(db.engine) == ["one"]


def test_what_concerns_the_whole_transaction_is_refused(zoo_engine):
    with isolate(zoo_engine, "transaction") as db:
        with pytest.raises(IsolationError, match="isolation_level='SERIALIZABLE' is asked for"):
            db.engine.execution_options(isolation_level="SERIALIZABLE")
        with db.engine.connect() as connection:
            with pytest.raises(IsolationError, match="isolation_level='AUTOCOMMIT' is asked for"):
                connection.execution_options(isolation_level="AUTOCOMMIT")
            with pytest.raises(IsolationError, match="no transactions in two phases"):
                connection.begin_twophase()
        with pytest.raises(IsolationError, match="another process would not see"):
            db.environ()
        add(db.engine, "one")
    autocommit = zoo_engine.execution_options(isolation_level="AUTOCOMMIT")
    with pytest.raises(IsolationError, match="The engine is in AUTOCOMMIT"):
        isolate(autocommit, "transaction").open()
    assert names(zoo_engine) == []


def test_what_is_used_after_the_block_says_so(zoo_engine):
    with isolate(zoo_engine, "transaction") as db:
        late = db.session()
        late.add(Group(name="late"))
        late.flush()
    with isolate(zoo_engine, "transaction") as other:
        with pytest.raises(IsolationError, match="of a block that has ended"):
            late.commit()
        late.close()
        assert names(other.engine) == []
        add(other.engine, "one")
    with pytest.raises(IsolationError, match="outside of its block"):
        names(db.engine)
    with pytest.raises(IsolationError, match="outside of its block"):
        names(other.engine)
    assert names(zoo_engine) == []


def test_blocks_nest(zoo_engine):
    """What a class needs, and within it what each of its tests writes."""
    with isolate(zoo_engine, "transaction") as around:
        add(around.engine, "of the class")
        for _ in range(2):
            with isolate(around.engine, "transaction") as db:
                add(db.engine, "of the test")
                assert names(db.engine) == ["of the class", "of the test"]
                assert len(db.tracker) == 1
            assert names(around.engine) == ["of the class"]
            assert len(around.tracker) == 1
    assert names(zoo_engine) == []


def test_a_tracker_around_it_hears_nothing(zoo_engine):
    with CleanupManager(ResourceTracker(zoo_engine)) as cleanup:
        add(zoo_engine, "tracked")
        with isolate(zoo_engine, "transaction") as db:
            add(db.engine, "untracked")
            with db.engine.begin() as connection:
                if not is_(zoo_engine, "sqlite"):
                    connection.execute(sa.delete(Group))
        assert len(cleanup.tracker) == 1
    assert names(zoo_engine) == []


def test_the_tracker_answers_in_the_block(db):
    add(db.engine, "one")
    with db.session() as session:
        session.add(User(email="a@example.test", org=Org(name="x")))
        session.commit()
    db.tracker.track_query(sa.select(Group))
    assert len(db.tracker) == 3
    CleanupManager(db.tracker).cleanup()
    assert names(db.engine) == []


def test_production_is_refused(zoo_engine, monkeypatch):
    monkeypatch.setenv("DJANGO_ENV", "production")
    monkeypatch.setenv("APP_ENV", "production")
    with pytest.raises(ProductionDatabaseError):
        with isolate(zoo_engine, "transaction"):
            pass
    with isolate(zoo_engine, "transaction", allow_production=True) as db:
        add(db.engine, "one")
    assert names(zoo_engine) == []
    assert zoo_engine.pool.checkedout() == 0


def test_what_is_inserted_past_sqlalchemy_needs_no_warning(db):
    raw = db.engine.raw_connection()
    raw.cursor().execute("INSERT INTO currencies (code, name) VALUES ('XXX', 'x')")
    raw.commit()
    raw.close()
    with db.engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO currencies (code, name) VALUES ('YYY', 'y')"))


def test_closing_sessions_is_not_needed(zoo_engine):
    kept = []
    for _ in range(2):
        with isolate(zoo_engine, "transaction") as db:
            session = orm.Session(db.engine)
            kept.append(session)
            session.add(Group(name="open"))
            session.flush()
            db.tracker.session.add(Group(name="of the tracker's session"))
            db.tracker.session.flush()
    assert names(zoo_engine) == []
    for session in kept:
        session.close()


class Observer(ObservingSink):
    def __init__(self):
        super().__init__()
        self.heard = []

    def apply(self, change):
        self.heard.append(change)
        return change


@pytest.mark.parametrize("level", ["none", "transaction"])
def test_who_observes_the_suite_takes_no_release_for_a_commit(zoo_database, level):
    observer = Observer()
    engines = AllEngines(lambda _engine: True, lambda _engine: observer)
    engine = zoo_database.engine()
    engines.start()
    try:
        with isolate(engine, level) as db:
            connections = [db.engine.connect(), db.engine.connect()]
            db.tracker.stop()  # the rows of nobody are the observer's
            with connections[0] as connection:
                connection.execute(sa.insert(GROUPS), {"name": "one"})
                connection.commit()
            connections[1].close()
            assert names(db.engine) == ["one"]
            assert (db.engine in engines.known) == (level == "none")
        capture_for(engine).resolve()
    finally:
        engines.stop()
    assert [change.table.name.name for change in observer.heard] == ["groups"] * (level == "none")
    with engine.begin() as connection:
        connection.execute(sa.delete(Group))
