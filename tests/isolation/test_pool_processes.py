"""What is kept for tests belongs to one process at a time, whatever becomes of that process."""

from __future__ import annotations

import os
import select
import signal
from contextlib import ExitStack
from importlib import import_module

import pytest
import sqlalchemy as sa

from harness.spaces import METADATA, ORGS, USERS, child, count, ended, fill, members
from tidyrows import advisory_lock
from tidyrows.dialects import dialect_for
from tidyrows.isolation import pool
from tidyrows.isolation.isolate import isolate
from tidyrows.worker import WorkerContext

GW3 = WorkerContext("a run", "gw3", 3, worker_count=8)


def die(*_args, **_options):
    os.kill(os.getpid(), signal.SIGKILL)


def use(engine):
    """Leave committed and uncommitted rows."""
    db = isolate(engine, "schema", metadata=METADATA, context=GW3)
    fill(db.open())
    connection = db.engine.connect()
    connection.execute(sa.update(ORGS).values(kind="small"))
    return db


def killed_in_use(engine):
    use(engine)
    die()


def killed_while_it_empties(engine):
    db = use(engine)
    space = db._level._lease.space
    if space.is_copied:
        space.reset = die
    else:
        replace = space._replace
        space._replace = lambda *args: (replace(*args), die())
    db.close()


def killed_while_it_builds(engine):
    kind = dialect_for(engine).space_kinds["schema"]
    kind.foreign_keys_out = die  # when all but the mark is there
    use(engine)


@pytest.mark.parametrize("how", [killed_in_use, killed_while_it_empties, killed_while_it_builds])
def test_what_a_killed_worker_had_comes_back(database, space_engine, how):
    assert ended(child(database.url, how)) == -signal.SIGKILL
    left = set(members(space_engine))
    assert left or how is killed_while_it_builds
    wait = ExitStack()
    for name in left:  # the server has to notice it
        with advisory_lock(space_engine, f"tidyrows {name}", session=True):
            pass
    with wait, isolate(space_engine, "schema", metadata=METADATA, context=GW3) as db:
        assert db.schema.endswith("_3")
        with db.engine.connect() as connection:
            assert count(connection, ORGS) == count(connection, USERS) == 0
        assert {name for name in members(space_engine) if not name.endswith("_t")} == {db.schema}


def killed_after_it_changed_the_seed(engine):
    db = isolate(engine, "schema", metadata=METADATA, seed=SEED, context=GW3)
    with db.open().begin() as connection:
        connection.execute(sa.update(ORGS).values(kind="small"))
        connection.execute(sa.insert(ORGS).values(id=2))
    die()


SEED = "INSERT INTO orgs (id, kind) VALUES (1, 'big')"


def test_rows_of_the_seed_that_a_killed_worker_changed_are_as_before(database, space_engine):
    assert ended(child(database.url, killed_after_it_changed_the_seed)) == -signal.SIGKILL
    for name in members(space_engine):
        with advisory_lock(space_engine, f"tidyrows {name}", session=True):
            pass
    with isolate(space_engine, "schema", metadata=METADATA, seed=SEED, context=GW3) as db:
        assert db.schema.endswith("_3")
        with db.engine.connect() as connection:
            assert connection.execute(sa.select(ORGS.c.id, ORGS.c.kind)).all() == [(1, "big")]


@pytest.mark.parametrize("level", ["database"])
def test_workers_that_begin_at_once_build_one_after_the_other(
    database, space_engine, tmp_path, level
):
    log, files = tmp_path / "log", tmp_path / "migrations"
    files.mkdir()
    told, tell = os.pipe()
    over, end = os.pipe()

    def migrate(engine):
        with log.open("a") as lines:
            lines.write("begin\n")
        METADATA.create_all(engine)
        with log.open("a") as lines:
            lines.write("end\n")

    def work(engine):
        with isolate(engine, level, migrate=migrate, pool=files, context=GW3) as db:
            fill(db.engine)
            os.close(end)
            os.write(tell, f"{db.schema}\n".encode())
            os.read(over, 1)  # until all have one

    pids = [child(database.url, work) for _ in range(WORKERS)]
    os.close(tell)
    said = b""
    while said.count(b"\n") < WORKERS and select.select([told], [], [], 30)[0]:
        said += os.read(told, 1000)
    os.close(end)  # also where one has failed
    assert [ended(pid) for pid in pids] == [0] * WORKERS
    for each in (told, over):
        os.close(each)
    names = said.decode().split()
    assert len(set(names)) == WORKERS
    copied = dialect_for(space_engine).space_kinds[level].is_copied
    assert log.read_text() == "begin\nend\n" * (1 if copied else WORKERS)


WORKERS = 8


def test_a_forked_child_has_nothing_of_its_parents(database, space_engine):
    with isolate(space_engine, "schema", metadata=METADATA) as db:
        mine = db.schema

    def work(engine):
        with isolate(engine, "schema", metadata=METADATA) as other:
            assert other.schema != mine

    assert ended(child(database.url, work)) == 0
    with isolate(space_engine, "schema", metadata=METADATA) as db:
        assert db.schema == mine


def test_who_locks_the_rows_of_a_test_is_named(database, space_engine, monkeypatch):
    module = import_module(f"tidyrows.dialects.{database.backend}.spaces")
    if database.backend == "sqlite":
        monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    else:
        old = module._SETTINGS
        new = old.replace("'5s'", "'100ms'").replace("timeout = 5", "timeout = 1")
        monkeypatch.setattr(module, "_SETTINGS", new)
    db = isolate(space_engine, "schema", metadata=METADATA)
    fill(db.open())
    application = sa.create_engine(db.url)
    with application.connect() as connection:
        connection.execute(sa.update(ORGS).values(kind="small"))
        with pytest.raises(pool.IsolationError, match="could not be emptied") as caught:
            db.close()
        blockers = caught.value.blockers
        server_id = dialect_for(application).server_id(connection.connection.dbapi_connection)
        assert server_id in {each.pid for each in blockers}
        assert str(server_id) in str(caught.value)
    application.dispose()
