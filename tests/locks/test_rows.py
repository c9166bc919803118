"""Rows are locked within a bound, and whoever has them is named."""

import re
import threading
import time
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
from sqlalchemy import orm, select
from sqlalchemy.ext.asyncio import AsyncSession

from harness.models import Org, User
from tidyrows import (
    ArgumentError,
    LockTimeoutError,
    NotBoundError,
    SessionStateError,
    locked,
)
from tidyrows.dialects import dialect_for
from tidyrows.isolation.isolate import isolate

ORGS = Org.__table__
SETTINGS = {
    "postgresql": "SHOW lock_timeout",
    "mysql": "SELECT @@innodb_lock_wait_timeout, @@lock_wait_timeout",
    "sqlite": "PRAGMA busy_timeout",
}


@pytest.fixture
def shop(zoo_engine):
    """Two orgs, and a session that is closed at the end."""
    with zoo_engine.begin() as connection:
        connection.execute(ORGS.insert(), [{"id": n, "name": f"org {n}"} for n in (1, 2)])
    with orm.Session(zoo_engine) as session:
        yield session


@contextmanager
def held(engine, statement="UPDATE orgs SET name = 'theirs' WHERE id = 1"):
    """Another connection has a row, and gives up what it has written at the end."""
    theirs = sa.create_engine(engine.url)
    with theirs.connect() as connection:
        connection.exec_driver_sql(statement)
        yield dialect_for(theirs).server_id(connection.connection.dbapi_connection)
        connection.rollback()
    theirs.dispose()


def setting(connection):
    return connection.exec_driver_sql(SETTINGS[connection.dialect.name]).fetchall()


def test_the_rows_are_locked_until_the_transaction_ends(shop):
    before = setting(shop.connection())
    orgs = locked(shop, select(Org).where(Org.id == 1))
    assert [org.name for org in orgs] == ["org 1"]
    assert setting(shop.connection()) == before
    with orm.Session(shop.get_bind()) as other:
        with pytest.raises(LockTimeoutError):
            locked(other, select(Org).where(Org.id == 1), timeout=0)
        orgs[0].name = "mine"
        shop.commit()
        assert locked(other, select(Org.name).order_by(Org.id), timeout=0) == ["mine", "org 2"]


def test_the_error_names_table_and_holder_and_the_transaction_goes_on(shop):
    """Twice: the first is in vain, and the second finds the transaction as it was."""
    engine = shop.get_bind()
    has_row_locks = dialect_for(engine).has_row_locks
    if has_row_locks:
        shop.add(Org(id=3, name="of this transaction"))
    before = setting(shop.connection())
    with held(engine) as pid:
        started = time.monotonic()
        with pytest.raises(LockTimeoutError) as caught:
            locked(shop, select(Org).where(Org.id == 1), timeout=1)
        assert 0.9 < time.monotonic() - started < 5
        assert setting(shop.connection()) == before
        if has_row_locks:
            assert locked(shop, select(Org.id).where(Org.id == 2)) == [2]
    error = caught.value
    assert error.lock == "orgs"
    assert re.match(r"(A row|The database) of orgs was not free within 1 s\. Held by ", str(error))
    (holder,) = error.holders
    assert f"pid {holder.pid}" in str(error)
    if has_row_locks:
        assert holder.pid == pid
        assert locked(shop, select(Org.id).where(Org.name.like("o%")).order_by(Org.id)) == [1, 2, 3]
    else:
        assert "another connection of this very process" in str(error)
        assert locked(shop, select(Org.id).where(Org.id == 1)) == [1]


def test_what_is_waited_for_is_had_and_is_new(shop):
    """The object was read before; its row has another name by the time it is locked."""
    org = shop.get_one(Org, 1)
    shop.commit()
    theirs = sa.create_engine(shop.get_bind().url)
    begun, looked = threading.Event(), threading.Event()

    def change():
        with theirs.begin() as connection:
            connection.execute(ORGS.update().where(ORGS.c.id == 1).values(name="theirs"))
            begun.set()
            looked.wait(0.2)

    thread = threading.Thread(target=change)
    thread.start()
    begun.wait(10)
    assert org.name == "org 1"  # the session has read it again, before that COMMIT
    if not dialect_for(theirs).has_row_locks:
        shop.rollback()  # else it would have to go on with what it has read
    assert locked(shop, select(Org).where(Org.id == 1), timeout=10) == [org]
    assert org.name == "theirs"
    thread.join()
    theirs.dispose()


def test_without_a_wait(shop):
    engine = shop.get_bind()
    with held(engine), pytest.raises(LockTimeoutError, match="was not free at once"):
        locked(shop, select(Org).where(Org.id == 1), nowait=True)
    with engine.connect() as connection:
        assert locked(connection, select(ORGS).where(ORGS.c.id == 2), nowait=True) == [(2, "org 2")]


def test_locked_rows_are_left_out(shop):
    engine = shop.get_bind()
    if not dialect_for(engine).has_row_locks:
        with pytest.raises(ArgumentError, match="SQLite locks no rows, but the whole file"):
            locked(shop, select(Org), skip_locked=True)
        return
    with held(engine):
        assert [each.id for each in locked(shop, select(Org), skip_locked=True)] == [2]


def test_changes_are_written_first_and_a_join_locks_what_it_is_told(shop):
    org = shop.get_one(Org, 1)
    org.name = "mine"
    with shop.no_autoflush:
        assert locked(shop, select(Org).where(Org.id == 1)) == [org]
    assert org.name == "mine"
    shop.add(User(id=1, email="a@example.test", org_id=1))
    shop.commit()
    of_user = select(User.id).join(Org).with_for_update(of=User)
    locked(shop, of_user)
    with orm.Session(shop.get_bind()) as other:
        if shop.get_bind().dialect.name == "postgresql":  # the others have no OF
            assert locked(other, select(Org.id).where(Org.id == 1), timeout=0) == [1]
        with pytest.raises(LockTimeoutError):
            locked(other, select(User), timeout=0)


def test_a_session_with_two_databases_locks_in_that_of_the_table(shop):
    nowhere = sa.create_engine("sqlite://")
    with orm.Session(nowhere, binds={Org: shop.get_bind()}) as session:
        assert locked(session, select(Org.id).where(Org.id == 1)) == [1]
        with pytest.raises(LockTimeoutError):
            locked(shop, select(Org).where(Org.id == 1), timeout=0)


def test_other_errors_are_what_they_were(shop):
    with pytest.raises(sa.exc.DBAPIError) as caught:
        locked(shop, select(sa.Table("absent", sa.MetaData(), sa.Column("id", sa.Integer))))
    assert not isinstance(caught.value, LockTimeoutError)
    shop.rollback()
    assert locked(shop, select(Org.id).order_by(Org.id)) == [1, 2]
    if not dialect_for(shop.get_bind()).has_row_locks:
        shop.connection().exec_driver_sql("CREATE VIEW seen AS SELECT id FROM orgs")
        with pytest.raises(ArgumentError, match=r"seen be locked: .* a view\. Name a table"):
            locked(shop, select(sa.Table("seen", sa.MetaData(), sa.Column("id", sa.Integer))))


def test_versions_without_such_a_lock_are_refused(mysql_engine, monkeypatch):
    with mysql_engine.connect() as connection:
        for version, is_mariadb, how, message in [
            ((10, 5, 9), True, "skip_locked", "MariaDB 10.5.9 has no skip_locked: it came with 10"),
            ((5, 7, 44), False, "nowait", "MySQL 5.7.44 has no nowait: it came with 8.0.1"),
        ]:
            monkeypatch.setattr(mysql_engine.dialect, "server_version_info", version)
            monkeypatch.setattr(mysql_engine.dialect, "is_mariadb", is_mariadb)
            with pytest.raises(ArgumentError, match=re.escape(message)):
                locked(connection, select(ORGS), **{how: True})


def test_wrong_calls_are_told_what_to_write(engine):
    with pytest.raises(NotBoundError, match="this Engine has none"):
        locked(engine, select(Org))
    with pytest.raises(NotBoundError, match="this sessionmaker has none"):
        locked(orm.sessionmaker(engine), select(Org))
    with pytest.raises(SessionStateError, match=re.escape("await locked_async(session, select)")):
        locked(AsyncSession(), select(Org))
    with engine.connect() as connection:
        with pytest.raises(ArgumentError, match=re.escape("select=select(Account)")):
            locked(connection, "SELECT 1")
        with pytest.raises(ArgumentError, match="names no table"):
            locked(connection, select(sa.literal(1)))
        with pytest.raises(ArgumentError, match="Leave one out"):
            locked(connection, select(Org), nowait=True, skip_locked=True)
        with pytest.raises(SessionStateError, match="is in AUTOCOMMIT"):
            locked(connection.execution_options(isolation_level="AUTOCOMMIT"), select(Org))


def test_at_level_transaction_too(shop):
    shop.rollback()
    with isolate(shop.get_bind(), "transaction") as db, db.session() as session:
        assert locked(session, select(Org.id).where(Org.id == 1)) == [1]
        with pytest.raises(LockTimeoutError):
            locked(shop, select(Org).where(Org.id == 1), timeout=0)
