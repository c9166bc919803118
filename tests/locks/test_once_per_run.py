"""Once per run: one worker makes it, and the others get its result or its failure."""

import asyncio
import json
import multiprocessing
import os
import re
import signal
import tempfile
import threading
from contextlib import suppress

import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import create_async_engine

from tidyrows import (
    ArgumentError,
    Ledger,
    LockTimeoutError,
    NotBoundError,
    OncePerRunError,
    SessionStateError,
    WorkerContext,
    once_per_run,
    once_per_run_async,
    sweep,
)
from tidyrows.ledger.once_per_run import KIND
from tidyrows.locks.once import Asked, FilePlace, made_once

RUN = "nightly-17"
GW0, GW1 = (WorkerContext(RUN, f"gw{index}", index, worker_count=2) for index in (0, 1))
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"tidyrows-{os.getuid()}"


def never():
    raise AssertionError("it is made twice")


@pytest.fixture(params=["file", "sqlite", "postgresql+psycopg", "mysql+pymysql"])
def bind(request):
    """No bind, or an engine of each database."""
    if request.param == "file":
        return None
    names = {"sqlite": "sqlite", "postgresql+psycopg": "postgresql", "mysql+pymysql": "mysql"}
    engine = request.getfixturevalue(f"{names[request.param]}_engine")
    Ledger(engine).install()
    return engine


def test_one_worker_makes_it_and_the_others_get_its_result(bind):
    """Eight at once, each with connections of its own."""
    calls, results = [], []

    def make():
        calls.append(1)
        waiting.wait(10)
        return {"euro": [1, "é", None]}

    def work():
        mine = None if bind is None else sa.create_engine(bind.url)
        results.append(once_per_run("seed", make, bind=mine, context=GW1, timeout=60))
        if mine is not None:
            mine.dispose()

    waiting = threading.Event()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    waiting.set()
    for thread in threads:
        thread.join()
    assert calls == [1]
    assert results == [{"euro": [1, "é", None]}] * 8
    assert once_per_run("another", lambda: 2, bind=bind, context=GW0) == 2
    other = WorkerContext("nightly-18", "gw0", 0)
    assert once_per_run("seed", lambda: 3, bind=bind, context=other) == 3


def test_a_failure_is_every_workers_and_names_where_it_happened(bind):
    def make():
        raise LookupError("no rates")

    with pytest.raises(LookupError, match="no rates"):
        once_per_run("seed", make, bind=bind, context=GW0)
    with pytest.raises(
        OncePerRunError, match=r"has failed in worker gw0 of this run: LookupError: no rates\. "
    ) as caught:
        once_per_run("seed", never, bind=bind, context=GW1)
    assert (caught.value.name, caught.value.worker) == ("seed", "gw0")


def test_after_a_kill_in_the_middle_the_next_worker_makes_it(bind):
    readable, writable = os.pipe()

    def killed():
        os.write(writable, b"!")
        signal.pause()

    def work():
        mine = None if bind is None else sa.create_engine(bind.url)
        once_per_run("seed", killed, bind=mine, context=GW0)

    if bind is not None:
        bind.dispose()  # no connection is inherited
    process = FORK.Process(target=work, daemon=True)
    process.start()
    os.read(readable, 1)
    with pytest.raises(LockTimeoutError, match=f"by pid .*{'gw0' if bind is None else ''}") as late:
        once_per_run("seed", never, bind=bind, context=GW1, timeout=0.05)
    assert late.value.holders
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert once_per_run("seed", lambda: "again", bind=bind, context=GW1, timeout=20) == "again"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((1, 2), "another worker would read as [1, 2]. Return lists, not tuples"),
        ([{"a": (1,)}], "another worker would read as [{'a': [1]}]"),
        ({1: "a"}, "another worker would read as {'1': 'a'}"),
        (object(), "a object, which has no form in JSON for another worker. Return keys or names"),
    ],
)
def test_what_json_changes_is_refused_in_every_worker(value, message):
    for context in (GW0, GW1):
        with pytest.raises(OncePerRunError, match=re.escape(message)):
            once_per_run("seed", lambda: value, context=context)


def test_an_interrupt_is_no_failure_of_the_run():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        once_per_run("seed", interrupted, context=GW0)
    assert once_per_run("seed", lambda: 1, context=GW1) == 1


def test_a_make_that_asks_for_its_own_result_is_told_so():
    def make():
        return once_per_run("seed", never, context=GW0, timeout=0)

    with pytest.raises(LockTimeoutError, match=r"very process: make\(\) must not ask for its own"):
        once_per_run("seed", make, context=GW0)


def test_without_ids_of_a_run_the_run_is_this_process(monkeypatch, folder):
    for name in ("TIDYROWS_RUN", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)
    assert once_per_run("seed", lambda: [1]) == once_per_run("seed", never) == [1]
    (made,) = folder.iterdir()
    assert [each.suffix for each in made.iterdir()] == [".json"]  # no lock file is left


def test_nobody_else_can_put_results_there(folder):
    once_per_run("seed", lambda: 1, context=GW0)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o707)
    with pytest.raises(OncePerRunError, match=r"is not a folder of this user alone"):
        once_per_run("seed", never, context=GW1)
    folder.rename(folder.with_name("elsewhere"))
    folder.with_name("elsewhere").chmod(0o700)
    folder.symlink_to(folder.with_name("elsewhere"))
    with pytest.raises(OncePerRunError, match=r"is not a folder of this user alone"):
        once_per_run("seed", never, context=GW1)


def test_results_of_long_ago_are_deleted(folder):
    once_per_run("seed", lambda: 1, context=WorkerContext("of long ago", "main", 0))
    (old,) = folder.iterdir()
    once_per_run("seed", lambda: 1, context=GW0)
    os.utime(old, (0, 0))
    once_per_run("seed", lambda: 1, context=WorkerContext("another", "main", 0))
    assert old not in set(folder.iterdir())
    assert once_per_run("seed", never, context=GW1) == 1


@pytest.mark.parametrize("by", ["the next result", "a sweep"])
def test_entries_of_long_ago_are_deleted(engine, by):
    ledger = Ledger(engine)
    once_per_run("seed", lambda: 1, bind=engine, context=WorkerContext("of long ago", "main", 0))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE tidyrows_ledger SET written = 1 WHERE kind = '{KIND}'")
    once_per_run("seed", lambda: 1, bind=ledger, context=GW0)
    if by == "a sweep":
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE tidyrows_ledger SET written = 1")
        sweep(engine)
    with engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT run, kind FROM tidyrows_ledger WHERE seq = 0")
        left = {row for row in found.fetchall() if row[1] == KIND}
    assert left == ({(RUN, KIND)} if by == "the next result" else set())


def test_a_sweep_takes_no_result_of_a_run_that_goes_on(engine):
    once_per_run("seed", lambda: 1, bind=engine, context=GW0)
    assert sweep(engine, older_than=0).total_deleted == 0
    assert once_per_run("seed", never, bind=engine, context=GW1) == 1


def test_a_result_that_was_not_written_is_made_again(tmp_path):
    """A disk that is full fails the call, and does not pass for a result."""

    class Full(FilePlace):
        def write(self, text):
            json.loads(text)
            raise OSError("no space left")

    asked = Asked("once_per_run", "seed", 1.0, GW0)
    with pytest.raises(OSError, match="no space left"):
        made_once(asked, lambda: 1, Full(tmp_path, "seed"))
    with pytest.raises(LookupError) as caught:
        made_once(asked, lambda: {}["rates"], Full(tmp_path, "seed"))
    assert caught.value.__notes__ == ["tidyrows: other workers were not told: no space left"]
    assert made_once(asked, lambda: 2, FilePlace(tmp_path, "seed")) == 2


def test_wrong_calls_are_told_what_to_write():
    async def seed():
        return 1

    with pytest.raises(ArgumentError, match=re.escape("Write await once_per_run_async('seed', ")):
        once_per_run("seed", seed)
    with pytest.raises(SessionStateError, match=re.escape("await once_per_run_async('seed'")):
        once_per_run("seed", never, bind=create_async_engine("sqlite+aiosqlite://"))
    with pytest.raises(NotBoundError, match=re.escape("once_per_run('seed', ...) needs one data")):
        once_per_run("seed", never, bind=orm.Session())
    with pytest.raises(NotBoundError, match="is in memory, and no other worker sees it"):
        once_per_run("seed", never, bind=sa.create_engine("sqlite://"))


def test_tasks_wait_for_each_other_and_a_coroutine_function_is_awaited(sqlite_engine):
    url = sqlite_engine.url.set(drivername="sqlite+aiosqlite")
    calls = []

    async def make():
        calls.append(1)
        await asyncio.sleep(0.02)  # the other task runs, and must wait
        return [1]

    async def main():
        engine = create_async_engine(url)
        for bind in (None, engine, sqlite_engine):
            tasks = [
                once_per_run_async(f"{bind}", make, bind=bind, context=each) for each in (GW0, GW1)
            ]
            assert await asyncio.gather(*tasks) == [[1], [1]]
        await engine.dispose()
        assert await once_per_run_async("plain", lambda: 3, context=GW0) == 3

    asyncio.run(main())
    assert len(calls) == 3


def test_a_task_that_is_cancelled_leaves_it_to_the_next(folder):
    async def main():
        begun = asyncio.Event()

        async def make():
            begun.set()
            await asyncio.sleep(60)

        task = asyncio.ensure_future(once_per_run_async("seed", make, context=GW0))
        await begun.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert await once_per_run_async("seed", lambda: 1, context=GW1, timeout=5) == 1

    asyncio.run(main())
    assert not list(folder.rglob("*.lock"))
