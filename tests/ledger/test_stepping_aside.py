"""The ledger's connection is in nobody's way while the process has no entries; then it is back."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from harness.ledgers import Worker, entries, family, ids, numbered, sweep
from harness.targets import on
from tidyrows import CleanupManager, ResourceTracker
from tidyrows.dialects import dialect_for

pytestmark = pytest.mark.slow

POSTGRESQL, MYSQL = "postgresql+psycopg", "mysql+pymysql"


def is_alive(outside, owner):
    with outside.connect() as connection:
        return dialect_for(outside).is_alive(connection, int(owner, 16))


def owner_of(worker):
    (journal,) = worker.tracker.journals._journals.values()
    return journal.process.id


@pytest.fixture
def idle(database, outside, ledgers):
    """A worker whose block has ended."""
    parents, _children = family(outside)
    worker = Worker(database, ledgers)
    with CleanupManager(worker.tracker), worker.engine.begin() as connection:
        connection.execute(sa.insert(parents), numbered([1]))
    return worker, parents


@on(POSTGRESQL)
@pytest.mark.parametrize("how", ["after dispose", "by a statement"])
def test_a_database_is_cloned_and_renamed_after_a_block(database, ledgers, how):
    """The database is this test's own: the harness has connections to the other one."""
    name = f"{database.url.database}_own"
    admin = sa.create_engine(database.url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    own = sa.create_engine(database.url.set(database=name), poolclass=sa.NullPool)
    with admin.connect() as connection:
        run = connection.exec_driver_sql
        run(f'CREATE DATABASE "{name}"')
        try:
            parents, _children = family(own)
            ledger = ledgers.installed(own)
            with CleanupManager(ResourceTracker(own, ledger=ledger)), own.begin() as inside:
                inside.execute(sa.insert(parents), numbered([1]))
            if how == "after dispose":  # and another process sends the statements
                own.dispose()
                seen = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}'"
                for _try in range(50):
                    if not run(seen).scalar():
                        break
                    run("SELECT pg_sleep(0.1)")
                assert not run(seen).scalar()
            run(f'CREATE DATABASE "{name}_clone" TEMPLATE "{name}"')
            run(f'DROP DATABASE "{name}_clone"')
            run(f'ALTER DATABASE "{name}" RENAME TO "{name}_away"')
            run(f'ALTER DATABASE "{name}_away" RENAME TO "{name}"')
        finally:
            ledgers.close()
            run(f'DROP DATABASE "{name}" WITH (FORCE)')
    own.dispose()
    admin.dispose()


@on(POSTGRESQL, MYSQL)
def test_a_process_comes_back_alive_before_its_next_entry(outside, idle):
    worker, parents = idle
    before = owner_of(worker)
    with worker:
        before = owner_of(worker)
        worker.engine.dispose()
        assert not is_alive(outside, before)
        with worker.engine.begin() as connection:
            connection.execute(sa.insert(parents), numbered([2]))
        (entry,) = entries(outside)
        assert entry["owner"] != before
        assert is_alive(outside, entry["owner"])
        assert sweep(outside).total_deleted == 0
        assert ids(outside, parents) == [2]
    assert CleanupManager(worker.tracker).cleanup().total_deleted == 1
    assert not entries(outside)


@on(POSTGRESQL, MYSQL)
def test_a_process_with_entries_or_an_open_transaction_stays(outside, idle):
    worker, parents = idle
    with worker:
        with worker.engine.begin() as connection:
            connection.execute(sa.insert(parents), numbered([2]))
        worker.engine.dispose()
        owner = owner_of(worker)
        assert is_alive(outside, owner)
        with outside.connect() as connection, pytest.raises(sa.exc.DBAPIError):
            connection.exec_driver_sql("CREATE DATABASE")  # no name: the statement alone is seen
        assert is_alive(outside, owner)
    assert CleanupManager(worker.tracker).cleanup().total_deleted == 1
