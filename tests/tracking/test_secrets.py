"""No password, and no parameter of a URL, stands in what tidyrows says or reports."""

from __future__ import annotations

import sqlite3

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from harness.targets import on
from tidyrows import (
    CleanupError,
    CleanupManager,
    NotBoundError,
    ProductionDatabaseError,
    ResourceTracker,
    RetryPolicy,
    SessionStateError,
    TidyRowsError,
    UnknownTableError,
    UntrackedRowsWarning,
    with_retries,
)
from tidyrows.capture.changes import Inserted

SECRET = "s3cr3t-Xq"
ONCE = RetryPolicy(attempts=1)
SERVERS = on("postgresql+psycopg", "postgresql+psycopg2", "mysql+pymysql", "mysql+mysqldb")
SHOWN = sa.make_url(f"postgresql+psycopg://joe:{SECRET}@prod-1/app?sslpassword={SECRET}&service=a")


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "accounts"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    token: Mapped[str | None] = mapped_column(sa.String(40))


class Login(Base):
    __tablename__ = "logins"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    account_id: Mapped[int] = mapped_column(sa.ForeignKey(Account.id))
    token: Mapped[str | None] = mapped_column(sa.String(40))


def said(error):
    """All that an exception says: its texts, notes and attributes, and its causes' too."""
    texts = []
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        texts += [str(error), repr(error), *getattr(error, "__notes__", ())]
        if isinstance(error, TidyRowsError):  # psycopg's have a PGconn that tells
            texts += [f"{name}={value!r}" for name, value in vars(error).items()]
        for leftover in getattr(error, "leftovers", ()):
            texts += [str(leftover), repr(leftover)]
        report = getattr(error, "report", None)
        texts += [str(report), repr(report)]
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


class Guarded:
    """An engine whose URL is full of secrets, and connects by other means until it is broken."""

    def __init__(self, database):
        self.parameter = "sslpassword" if database.backend == "postgresql" else "ssl_key"
        url = database.url.set(username="joe", password=SECRET)
        self.engine = sa.create_engine(url.update_query_dict({self.parameter: SECRET}))
        self.broken = None
        real = self.engine.dialect.create_connect_args(database.url)[1]

        @sa.event.listens_for(self.engine, "do_connect")
        def connect(dialect, record, arguments, parameters):
            parameters.clear()
            parameters.update(real)
            if self.broken is not None:
                parameters.pop("password", None)
                parameters.pop("passwd", None)
                parameters.update(self.broken)

    def breaks(self, **parameters):
        self.broken = parameters
        self.engine.dispose()


@pytest.fixture
def guarded(database):
    made = Guarded(database)
    Base.metadata.create_all(made.engine)
    yield made
    made.engine.dispose()


def with_a_row(engine):
    tracker = ResourceTracker(engine).start()
    with Session(engine) as session:
        session.add(Account(id=1, token=SECRET))
        session.commit()
    tracker.stop()
    return tracker


BROKEN = {
    "wrong password": {"user": "nobody_known", "password": SECRET},
    "unknown host": {"host": "nowhere.invalid", "password": SECRET},
    "closed port": {"host": "127.0.0.1", "port": 1, "password": SECRET},
}


@SERVERS
@pytest.mark.parametrize("how", BROKEN)
def test_a_cleanup_that_cannot_connect(guarded, how):
    """The drivers say who and where, never the password; SQLAlchemy's error is our cause."""
    tracker = with_a_row(guarded.engine)
    guarded.breaks(**BROKEN[how])
    with pytest.raises(CleanupError) as caught:
        CleanupManager(tracker, retry=ONCE).cleanup()
    assert caught.value.leftovers
    assert SECRET not in said(caught.value)
    with pytest.raises(ZeroDivisionError) as test, CleanupManager(tracker, retry=ONCE):
        raise ZeroDivisionError
    assert test.value.__notes__
    assert SECRET not in said(test.value)


@SERVERS
def test_a_cleanup_that_goes_wrong(guarded):
    """The parameters of the rows' INSERT are in no leftover, report, plan or repr."""
    tracker = with_a_row(guarded.engine)
    other = ResourceTracker.from_json(tracker.to_json(), guarded.engine)
    manager = CleanupManager(tracker, retry=ONCE, protect=[Login])
    texts = [str(manager.plan()), repr(tracker), str(list(tracker.rows())), tracker.to_json()]
    with guarded.engine.begin() as connection:
        connection.execute(sa.insert(Login).values(id=1, account_id=1, token=SECRET))
    with pytest.raises(CleanupError) as caught:
        manager.cleanup()
    texts += [said(caught.value), str(manager.report), repr(manager.report)]
    Base.metadata.drop_all(guarded.engine)
    with pytest.raises(UnknownTableError) as unknown:
        ResourceTracker.from_json(other.to_json(), guarded.engine)
    texts.append(said(unknown.value))
    with pytest.raises(UnknownTableError) as unknown:
        tracker.track_rows(Account, [1])
    texts.append(said(unknown.value))
    assert SECRET not in "\n".join(texts)


@SERVERS
def test_a_cleanup_that_goes_well(guarded):
    tracker = with_a_row(guarded.engine)
    manager = CleanupManager(tracker)
    report = manager.cleanup()
    assert report.total_deleted == 1
    assert SECRET not in f"{report} {report!r}"


def test_a_refusal_of_production():
    engine = sa.create_engine(SHOWN)
    for bind in (engine, Session(engine), sessionmaker(engine)):
        with pytest.raises(ProductionDatabaseError) as caught:
            ResourceTracker(bind)
        assert SECRET not in said(caught.value)
        assert "joe" not in said(caught.value)


def test_a_raw_insert_is_told_of_without_its_values(sqlite_engine):
    Base.metadata.create_all(sqlite_engine)
    tracker = ResourceTracker(sqlite_engine).start()
    try:
        with pytest.warns(UntrackedRowsWarning) as warned, sqlite_engine.begin() as connection:
            connection.exec_driver_sql(f"INSERT INTO accounts VALUES (1, '{SECRET}')")
            connection.execute(
                sa.text("INSERT INTO accounts VALUES (2, :token)"), {"token": SECRET}
            )
    finally:
        tracker.stop()
    assert SECRET not in "".join(str(each.message) for each in warned)


def test_an_error_about_a_key_names_no_argument_of_its_type(sqlite_engine):
    """A type that encrypts may have its key there."""

    class Encrypted(sa.types.UserDefinedType[str]):
        cache_ok = True

        def __init__(self, key):
            self.key = key

        def get_col_spec(self, **options):
            return "VARCHAR(40)"

        def bind_processor(self, dialect):
            return lambda value: value + self.key + 1

    assert SECRET in repr(Encrypted(SECRET))
    metadata = sa.MetaData()
    table = sa.Table("things", metadata, sa.Column("k", Encrypted(SECRET), primary_key=True))
    metadata.create_all(sqlite_engine)
    tracker = ResourceTracker(sqlite_engine)
    with sqlite_engine.connect() as connection:
        keyed = tracker.sessions.real_table_on(connection, table)
    tracker.store.apply(Inserted(keyed, ["x"]))
    with pytest.raises(TidyRowsError) as caught:
        tracker.to_json()
    assert SECRET not in said(caught.value)


@pytest.mark.parametrize("bind", [SHOWN.render_as_string(hide_password=False), SHOWN], ids=type)
@pytest.mark.parametrize(
    "use", [ResourceTracker, CleanupManager, lambda bind: with_retries(bind, print)]
)
def test_a_url_in_the_place_of_an_engine(bind, use):
    with pytest.raises((NotBoundError, TypeError)) as caught:
        use(bind)
    assert SECRET not in said(caught.value)


def test_a_transaction_that_is_open_on_a_shared_connection():
    url = sa.make_url(f"sqlite:///:memory:?cache=private&nolock={SECRET}&uri=true")
    engine = sa.create_engine(
        url, creator=lambda: sqlite3.connect(":memory:"), poolclass=sa.StaticPool
    )
    Base.metadata.create_all(engine)
    tracker = with_a_row(engine)
    try:
        with engine.connect() as connection:
            connection.execute(sa.insert(Account).values(id=2))
            with pytest.raises(SessionStateError) as caught:
                CleanupManager(tracker).cleanup()
            connection.rollback()
    finally:
        engine.dispose()
    assert SECRET not in said(caught.value)


def test_a_late_query_that_fails(sqlite_engine):
    tracker = ResourceTracker(sqlite_engine)
    query = sa.select(Account).where(Account.token == SECRET)
    with pytest.raises(ZeroDivisionError) as test, CleanupManager(tracker, retry=ONCE):
        tracker.track_query(query, late=True)
        raise ZeroDivisionError
    notes = "".join(test.value.__notes__)
    assert "accounts" in notes
    assert SECRET not in notes
