"""One's own code as a whole transaction: run again where it was undone, and never twice."""

from __future__ import annotations

import asyncio
import threading

import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from harness.blocks import insert, table
from harness.bystanders import snapshot
from harness.targets import ALL_DRIVERS, on
from tidyrows import NotBoundError, RetryPolicy, SessionStateError, with_retries

SERVERS = tuple(target for target in ALL_DRIVERS if target != "sqlite")
AT_ONCE = RetryPolicy(base=0.0)


@pytest.fixture
def accounts(engine):
    metadata = sa.MetaData()
    made = table(metadata, "accounts", sa.Column("v", sa.Integer))
    metadata.create_all(engine)
    insert(engine, (made, [{"id": 1, "v": 0}, {"id": 2, "v": 0}]))
    return made


def values(engine):
    ((_name, rows),) = snapshot(engine).items()
    return dict(rows)


def add(source, accounts, number, much=1):
    source.execute(sa.update(accounts).where(accounts.c.id == number).values(v=accounts.c.v + much))


def assert_pool_is_clean(engine):
    """Whatever is in the pool commits nothing of anybody's."""
    before = snapshot(engine)
    for _ in range(3):
        with engine.begin() as connection:
            connection.exec_driver_sql("SELECT 1")
    assert snapshot(engine) == before


KINDS = {
    "session": orm.Session,
    "maker": orm.sessionmaker,
    "scoped": lambda engine: orm.scoped_session(orm.sessionmaker(engine)),
    "engine": lambda engine: engine,
}


@on(*ALL_DRIVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_committed_when_the_function_returns(engine, accounts, kind):
    assert with_retries(KINDS[kind](engine), lambda s: add(s, accounts, 1) or "done") == "done"
    assert values(engine) == {1: 1, 2: 0}
    assert_pool_is_clean(engine)


@on(*ALL_DRIVERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_what_is_no_passing_error_rolls_back_and_surfaces_at_once(engine, accounts, kind, error):
    tries = []

    def fail(source):
        tries.append(1)
        add(source, accounts, 1)
        raise error

    with pytest.raises(type(error)) as caught:
        with_retries(KINDS[kind](engine), fail)
    assert caught.value is error
    assert tries == [1]
    assert values(engine) == {1: 0, 2: 0}
    assert_pool_is_clean(engine)


@on(*SERVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_of_a_real_deadlock_end_well(engine, accounts, kind):
    meet = threading.Barrier(2)
    tries = []

    def run(first, second):
        def cross(source):
            tries.append(first)
            add(source, accounts, first)
            if len(tries) <= 2:
                meet.wait(20)
            add(source, accounts, second, 10)

        with_retries(KINDS[kind](engine), cross, retry=AT_ONCE)

    threads = [threading.Thread(target=run, args=pair) for pair in ((1, 2), (2, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(tries) >= 3  # a busy machine may let them meet once more
    assert values(engine) == {1: 11, 2: 11}
    assert_pool_is_clean(engine)


@on(*SERVERS)
def test_a_deadlock_that_the_function_swallows_commits_no_half(engine, accounts):
    """On the MySQL family the first UPDATE would be lost, and what follows committed."""
    meet = threading.Barrier(2)
    tries = {1: 0, 2: 0}

    def run(first, second):
        def cross(session):
            tries[first] += 1
            add(session, accounts, first)
            if sum(tries.values()) <= 2:
                meet.wait(20)
            try:
                add(session, accounts, second, 10)
            except sa.exc.OperationalError:
                if engine.dialect.name == "mysql":
                    add(session, accounts, second, 10)

        with orm.Session(engine) as session:
            while True:
                try:
                    return with_retries(session, cross, retry=AT_ONCE)
                except SessionStateError:
                    assert engine.dialect.name == "postgresql"

    threads = [threading.Thread(target=run, args=pair) for pair in ((1, 2), (2, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sum(tries.values()) >= 3  # a busy machine may let them meet once more
    assert values(engine) == {1: 11, 2: 11}


@on("postgresql+psycopg", "postgresql+psycopg2")
def test_a_swallowed_error_that_would_make_the_commit_void_is_said(engine, accounts):
    def swallow(session):
        add(session, accounts, 1)
        with pytest.raises(sa.exc.DBAPIError):
            session.execute(sa.text("SELEKT"))

    with pytest.raises(SessionStateError, match="savepoint"):
        with_retries(orm.Session(engine), swallow)
    assert values(engine) == {1: 0, 2: 0}


@on("postgresql+psycopg", "postgresql+psycopg2")
def test_a_transaction_that_cannot_be_serialized_is_run_again(engine, accounts):
    serial = engine.execution_options(isolation_level="SERIALIZABLE")
    tries = []

    def skew(session):
        tries.append(1)
        total = session.execute(sa.select(sa.func.sum(accounts.c.v))).scalar_one()
        if len(tries) == 1:
            with serial.begin() as other:
                other.execute(sa.select(sa.func.sum(accounts.c.v))).scalar_one()
                add(other, accounts, 2)
        add(session, accounts, 1, total + 1)

    with_retries(orm.Session(serial), skew, retry=AT_ONCE)
    assert len(tries) == 2
    assert values(engine) == {1: 2, 2: 1}


def kill(engine, connection):
    own = connection.exec_driver_sql(
        "SELECT pg_backend_pid()"
        if engine.dialect.name == "postgresql"
        else "SELECT CONNECTION_ID()"
    ).scalar_one()
    with engine.connect() as other:
        other.exec_driver_sql(
            f"SELECT pg_terminate_backend({own}, 5000)"
            if engine.dialect.name == "postgresql"
            else f"KILL {own}"
        )


@on(*SERVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_lost_before_the_commit_is_another_attempt(engine, accounts, kind):
    tries = []

    def lose(source):
        tries.append(1)
        add(source, accounts, 1)
        if len(tries) == 1:
            kill(
                engine,
                source.connection()
                if hasattr(source, "connection") and kind != "engine"
                else source,
            )
        add(source, accounts, 2)

    with_retries(KINDS[kind](engine), lose, retry=AT_ONCE)
    assert len(tries) == 2
    assert values(engine) == {1: 1, 2: 1}


@on(*ALL_DRIVERS)
def test_connections_that_died_in_the_pool_do_not_matter(engine, accounts):
    if engine.dialect.name == "sqlite":
        pytest.skip("nobody kills a connection to a file")
    with engine.connect() as connection:
        kill(engine, connection)
        connection.invalidate()
    with_retries(engine, lambda connection: add(connection, accounts, 1), retry=AT_ONCE)
    assert values(engine) == {1: 1, 2: 0}


@on(*SERVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_commit_without_an_answer_is_not_run_again(engine, accounts, kind, monkeypatch):
    """It may have succeeded: here it has."""
    tries = []
    real = engine.dialect.do_commit

    def commit(dbapi_connection):
        real(dbapi_connection)
        if tries:
            monkeypatch.undo()
            code = () if engine.dialect.name == "postgresql" else (2013, "gone")
            raise engine.dialect.loaded_dbapi.OperationalError(*code)

    monkeypatch.setattr(engine.dialect, "do_commit", commit)
    if engine.dialect.name == "postgresql":
        monkeypatch.setattr(engine.dialect, "is_disconnect", lambda *_: True)

    def count(source):
        tries.append(1)
        add(source, accounts, 1)

    with pytest.raises(sa.exc.OperationalError) as caught:
        with_retries(KINDS[kind](engine), count, retry=AT_ONCE)
    assert any("nobody knows" in note for note in caught.value.__notes__)
    assert tries == [1]
    assert values(engine) == {1: 1, 2: 0}


@on("sqlite")
@pytest.mark.parametrize(
    ("kind", "reset"), [*((kind, "rollback") for kind in KINDS), ("engine", None)]
)
def test_a_commit_that_finds_the_file_busy_leaves_nothing_in_the_pool(
    database, accounts, kind, reset
):
    """SQLite leaves the transaction open then, and the pool's next user would commit it."""
    engine = database.engine(connect_args={"timeout": 0.05}, pool_reset_on_return=reset)
    reader = database.engine().connect()
    tries = []

    def write(source):
        tries.append(1)
        add(source, accounts, 1)
        if len(tries) == 1:  # who reads keeps a COMMIT out
            reader.exec_driver_sql("BEGIN")
            reader.exec_driver_sql("SELECT * FROM accounts").all()

    def give_up(_attempt):
        assert values(engine) == {1: 0, 2: 0}
        reader.rollback()

    policy = RetryPolicy(base=0.0, on_attempt=give_up)
    with_retries(KINDS[kind](engine), write, retry=policy)
    reader.close()
    assert len(tries) == 2
    assert values(engine) == {1: 1, 2: 0}
    assert_pool_is_clean(engine)


# --- as a decorator


@on("sqlite")
def test_a_decorated_function_gets_the_session_and_its_own_arguments(engine, accounts):
    @with_retries(orm.sessionmaker(engine))
    def pay(session, number, *, much):
        """Pay."""
        add(session, accounts, number, much)
        return much

    assert pay(2, much=5) == 5
    assert pay.__name__ == "pay"
    assert pay.__doc__ == "Pay."
    assert values(engine) == {1: 0, 2: 5}


# --- what cannot be right


def test_a_session_in_a_transaction_is_refused(sqlite_engine):
    with orm.Session(sqlite_engine) as session:
        session.execute(sa.text("SELECT 1"))
        with pytest.raises(SessionStateError, match="in a transaction already"):
            with_retries(session, lambda _session: None)


class Base(orm.DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "things"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)


def test_a_session_with_objects_that_are_not_written_is_refused(sqlite_engine):
    with orm.Session(sqlite_engine) as session:
        session.add(Thing())
        with pytest.raises(SessionStateError, match="adding an object begins one"):
            with_retries(session, lambda _session: None)


@pytest.mark.parametrize("bind", [None, 7, "sqlite://"])
def test_what_gives_no_transaction_is_refused(bind):
    with pytest.raises(NotBoundError, match=r"with_retries\(session, fn\)"):
        with_retries(bind, lambda _session: None)


def test_an_open_connection_is_refused(sqlite_engine):
    with sqlite_engine.connect() as connection:
        with pytest.raises(NotBoundError):
            with_retries(connection, lambda _connection: None)


def test_what_is_no_function_is_refused(sqlite_engine):
    with pytest.raises(TypeError, match="is not a function"):
        with_retries(sqlite_engine, 7)


def test_an_asynchronous_function_for_a_synchronous_engine_is_refused(sqlite_engine):
    async def fn(_connection):
        pass

    with pytest.raises(TypeError, match="AsyncEngine"):
        with_retries(sqlite_engine, fn)


def test_a_plain_function_for_an_asynchronous_engine_is_refused():
    def fn(_connection):
        pass

    engine = create_async_engine("sqlite+aiosqlite://")
    with pytest.raises(TypeError, match="write async def"):
        with_retries(engine, fn)


# --- several databases


@pytest.mark.filterwarnings("ignore:transaction already deassociated")  # SQLAlchemy's own
@on("sqlite")
def test_a_session_of_two_databases_is_not_run_again_once_one_may_have_committed(
    database, accounts, tmp_path
):
    """BUSY at the COMMIT of one, after that of the other."""
    here = database.engine(connect_args={"timeout": 0.05})
    there = sa.create_engine(f"sqlite:///{tmp_path / 'other.db'}", connect_args={"timeout": 0.05})
    others = table(sa.MetaData(), "others", sa.Column("v", sa.Integer))
    others.metadata.create_all(there)
    insert(there, (others, [{"id": 1, "v": 0}]))
    tries = []
    readers = [database.engine().connect(), there.connect()]
    try:
        with orm.Session(binds={accounts: here, others: there}) as session:

            def both(session):
                tries.append(1)
                add(session, accounts, 1)
                add(session, others, 1)
                readers[len(tries) % 2].exec_driver_sql("BEGIN")
                name = ("accounts", "others")[len(tries) % 2]
                readers[len(tries) % 2].exec_driver_sql(f"SELECT * FROM {name}").all()

            with pytest.raises(sa.exc.OperationalError) as caught:
                with_retries(session, both, retry=AT_ONCE)
        assert any("several databases" in note for note in caught.value.__notes__)
        assert tries == [1]
    finally:
        for reader in readers:
            reader.close()
        there.dispose()


@on(*SERVERS)
def test_a_lost_connection_that_the_function_swallows_is_another_attempt(engine, accounts):
    tries = []

    def swallow(connection):
        tries.append(1)
        add(connection, accounts, 1)
        if len(tries) == 1:
            kill(engine, connection)
            with pytest.raises(sa.exc.DBAPIError):
                add(connection, accounts, 2)

    with_retries(engine, swallow, retry=AT_ONCE)
    assert len(tries) == 2
    assert values(engine) == {1: 1, 2: 0}


# --- asynchronous


class Mine(AsyncSession):
    pass


ASYNC = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "mysql": "mysql+aiomysql",
}
ASYNC_KINDS = {
    "session": AsyncSession,
    "session of a class of one's own": Mine,
    "maker": async_sessionmaker,
    "engine": lambda engine: engine,
}


@on("sqlite", "postgresql+psycopg", "mysql+pymysql")
@pytest.mark.parametrize("kind", ASYNC_KINDS)
def test_an_asynchronous_transaction_is_run_again_too(database, engine, accounts, kind):
    tries = []

    async def main():
        asynchronous = create_async_engine(database.url.set(drivername=ASYNC[database.backend]))
        error = asynchronous.dialect.loaded_dbapi.OperationalError
        ticks = []

        async def tick():
            while True:
                ticks.append(1)
                await asyncio.sleep(0.005)

        async def fn(source):
            tries.append(1)
            await source.execute(
                sa.update(accounts).where(accounts.c.id == 1).values(v=accounts.c.v + 1)
            )
            if len(tries) == 1:
                raise ConnectionResetError(error)
            return "done"

        beside = asyncio.create_task(tick())
        policy = RetryPolicy(wait=lambda _state: 0.05)
        try:
            bind = ASYNC_KINDS[kind](asynchronous)
            result = await with_retries(bind, fn, retry=policy)
            if kind.startswith("session"):
                await bind.close()
        finally:
            beside.cancel()
            await asynchronous.dispose()
        return result, len(ticks)

    result, ticks = asyncio.run(main())
    assert result == "done"
    assert ticks > 3  # nobody blocked the loop
    assert len(tries) == 2
    assert values(engine) == {1: 1, 2: 0}


def test_an_asynchronous_decorator_awaits(database, engine, accounts):
    async def main():
        asynchronous = create_async_engine(database.url.set(drivername=ASYNC[database.backend]))

        @with_retries(async_sessionmaker(asynchronous))
        async def pay(session, number):
            await session.execute(sa.update(accounts).where(accounts.c.id == number).values(v=7))
            return number

        try:
            return await pay(2)
        finally:
            await asynchronous.dispose()

    assert asyncio.run(main()) == 2
    assert values(engine) == {1: 0, 2: 7}
