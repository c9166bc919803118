"""The storm: many workers on one database, and everything that can go wrong with locks.

    python tests/storm/run.py --backend postgresql --workers 32 --rounds 10000

Without ``--url`` it starts a server of its own, which alone can be restarted in the middle.
Faults: deadlocks, locks, kills, restart; ``--faults none`` for none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import sqlalchemy as sa

from harness.forks import Process
from harness.own_servers import Server, own_server
from storm import shop

HERE = Path(__file__).parent
BYSTANDERS = 12
ALL = ("deadlocks", "locks", "kills", "restart")
KINDS = ("deadlocks", "timeouts", "lost connections")
WHERE = ("cleanup", "creation", "the application")


@dataclass
class Result:
    """What a storm has come to.

    Attributes:
        wrong: what must not be, in words; empty after a good storm.
        lines: what it met, for people.
        met: the same, for programs.
    """

    wrong: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    met: Counter[str] = field(default_factory=Counter)
    rounds: int = 0


def storm(
    url: sa.URL,
    *,
    workers: int,
    rounds: int,
    faults: tuple[str, ...],
    seconds: float,
    server: Server | None = None,
) -> Result:
    """Run it.

    Args:
        url: an empty database, whose user may do everything.
        workers: processes.
        rounds: create-and-clean rounds of all of them.
        faults: of :data:`ALL`.
        seconds: the longest that a worker may begin rounds.
        server: for a restart.
    """
    engine = sa.create_engine(url, pool_pre_ping=True)  # it outlives a restart
    shop.Base.metadata.create_all(engine)
    with engine.begin() as connection:
        for table, columns in (("orgs", "name, v"), ("tags", "name")):
            for number in range(BYSTANDERS):
                values = f"'bystander {number}'" + (", 0" if table == "orgs" else "")
                connection.exec_driver_sql(f"INSERT INTO {table} ({columns}) VALUES ({values})")
        orgs = list(connection.exec_driver_sql("SELECT id FROM orgs ORDER BY id").scalars())
        for number, org in enumerate(orgs):
            connection.execute(
                sa.insert(shop.User.__table__).values(email=f"bystander {number}", org_id=org)
            )
        users = list(connection.exec_driver_sql("SELECT id FROM users ORDER BY id").scalars())
        connection.execute(
            sa.insert(shop.Order.__table__), [{"user_id": user} for user in users for _ in range(3)]
        )
        connection.execute(
            sa.insert(shop.Line.__table__),
            [
                {"order_id": order}
                for order in connection.exec_driver_sql("SELECT id FROM orders").scalars()
            ],
        )
    before = _rows(engine)
    engine.dispose()
    theirs = _workers_url(engine, url)
    given = {"url": theirs, "rounds": -(-rounds // workers), "bystanders": orgs, "seconds": seconds}
    processes = [_start("worker.py", {**given, "number": number}) for number in range(workers)]
    against = None
    if set(faults) - {"restart"}:
        plain = url.render_as_string(hide_password=False)
        against = _start("faults.py", {"url": plain, "faults": list(faults)})
    result = Result()
    outputs: list[Any] = [None] * workers
    readers = [
        threading.Thread(target=_read, args=(process, outputs, number, seconds + 180))
        for number, process in enumerate(processes)
    ]
    for reader in readers:
        reader.start()
    if server is not None and "restart" in faults:
        _restart(result, engine, server, readers, rounds)
    for reader in readers:
        reader.join()
    if against is not None:
        _end_faults(result, against, faults)
    _account(result, outputs)
    _compare(result, engine, before, outputs)
    engine.dispose()
    return result


def possible(backend: str, *, own: bool) -> tuple[str, ...]:
    """The faults that can be had."""
    if backend == "sqlite":
        return ("locks",)
    return ALL if own else ALL[:-1]


def _restart(
    result: Result,
    engine: sa.Engine,
    server: Server,
    workers: list[threading.Thread],
    rounds: int,
) -> None:
    """Crash the server and start it again, when a quarter of the rounds is done."""
    asked = threading.Event()
    while all(worker.is_alive() for worker in workers):
        with engine.connect() as connection:
            audits = connection.exec_driver_sql("SELECT count(*) FROM audit").scalar_one()
        if audits >= rounds / 2:  # two a round
            server.stop()
            server.start()
            result.lines.append("the server was restarted")
            return
        asked.wait(0.05)
    result.wrong.append("a worker had ended before the server was restarted")


def _end_faults(result: Result, against: subprocess.Popen[str], faults: tuple[str, ...]) -> None:
    said, errors = against.communicate("", timeout=60)
    if against.returncode or errors:
        result.wrong.append(f"the faults ended with {against.returncode}:\n{errors[-3000:]}")
        return
    done = json.loads(said)
    result.lines.append(f"faults: {said.strip()}")
    counted = {"deadlocks": "crossings", "locks": "locks held", "kills": "connections killed"}
    wanted = {kind: name for kind, name in counted.items() if kind in faults}
    result.wrong += [
        f"nobody did any {kind}" for kind, name in wanted.items() if not done.get(name)
    ]


def _workers_url(engine: sa.Engine, url: sa.URL) -> str:
    """One by which the workers' connections can be told."""
    if url.get_backend_name() == "postgresql":
        url = url.update_query_dict({"application_name": "storm"})
    elif url.get_backend_name() == "mysql":
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE USER IF NOT EXISTS storm@'%%'")
            connection.exec_driver_sql("CREATE USER IF NOT EXISTS storm@localhost")
            for host in ("'%%'", "localhost"):
                connection.exec_driver_sql(f"GRANT ALL ON `{url.database}`.* TO storm@{host}")
        engine.dispose()
        url = url.set(username="storm")
    return url.render_as_string(hide_password=False)


def _start(script: str, given: dict[str, Any]) -> subprocess.Popen[str]:
    # Each is a worker of its own, whatever worker this process is.
    mine = ("PYTEST_XDIST_", "TIDYROWS_", "_TIDYROWS_")
    return Process(
        [sys.executable, str(HERE / script), json.dumps(given)],
        env={name: value for name, value in os.environ.items() if not name.startswith(mine)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _read(process: subprocess.Popen[str], outputs: list[Any], number: int, seconds: float) -> None:
    try:
        said, errors = process.communicate("", timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        said, errors = process.communicate()
        errors = f"it did not end within {seconds:.0f} s\n{errors}"
    try:
        outputs[number] = json.loads(said.strip().splitlines()[-1])
    except (ValueError, IndexError):
        outputs[number] = f"worker {number} said {said[-500:]!r}\n{errors[-3000:]}"


def _account(result: Result, outputs: list[Any]) -> None:
    result.wrong += [each for each in outputs if isinstance(each, str)]
    told = [each for each in outputs if isinstance(each, dict)]
    for each in told:
        result.wrong += each["failures"]
        result.met.update(each["met"])
        result.rounds += each["rounds"]
    cleaning = sorted(second for each in told for second in each["cleaning"])
    if len(cleaning) > 1:
        parts = quantiles(cleaning, n=100)
        rate = sum(each["rounds"] / each["seconds"] for each in told)
        result.lines.append(
            f"{result.rounds} rounds, {rate:.1f} a second; cleanup p50 {parts[49] * 1000:.1f} ms, "
            f"p99 {parts[98] * 1000:.1f} ms, longest {cleaning[-1] * 1000:.0f} ms"
        )
    kinds = [f"{kind} in {where}" for where in WHERE for kind in KINDS]
    result.lines += [f"{result.met[kind]} {kind}" for kind in (*kinds, "retries of cleanup")]


def _rows(engine: sa.Engine) -> dict[str, list[tuple[Any, ...]]]:
    with engine.connect() as connection:
        return {
            table.name: sorted(tuple(row) for row in connection.execute(sa.select(table)))
            for table in shop.Base.metadata.tables.values()
        }


def _compare(
    result: Result,
    engine: sa.Engine,
    before: dict[str, list[tuple[Any, ...]]],
    outputs: list[Any],
) -> None:
    """Every table is as before, but for what the application has told that it wrote."""
    after = _rows(engine)
    told = [each for each in outputs if isinstance(each, dict)]
    sure, perhaps = Counter[int](), Counter[int]()
    for each in told:
        sure.update({int(org): count for org, count in each["counted"].items()})
        perhaps.update({int(org): count for org, count in each["unsure"].items()})
    counts = {row[0]: row[2] for row in after["orgs"]}
    for org, count in counts.items():
        if not sure[org] <= count <= sure[org] + perhaps[org]:
            result.wrong.append(
                f"org {org} was counted up {sure[org]} times (and perhaps {perhaps[org]}), and "
                f"stands at {count}"
            )
    after["orgs"] = [(number, name, 0) for number, name, _count in after["orgs"]]
    audits = after.pop("audit")
    kept = sum(each["audits"][0] for each in told)
    doubtful = sum(each["audits"][1] for each in told)
    if not kept <= len(audits) <= kept + doubtful:
        result.wrong.append(f"{kept} audits were written, and {len(audits)} are there")
    if any(row[2] is not None for row in audits):
        result.wrong.append("an audit references a user yet")
    for table, rows in after.items():
        lost, gained = set(before[table]) - set(rows), set(rows) - set(before[table])
        if lost or gained:
            result.wrong.append(f"{table}: lost {sorted(lost)[:9]}, gained {sorted(gained)[:9]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("postgresql", "mysql", "sqlite"))
    parser.add_argument("--url", help="an empty database, instead of a server of its own")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--faults", default=",".join(ALL))
    given = parser.parse_args()
    asked = () if given.faults == "none" else tuple(given.faults.split(","))
    backend = sa.make_url(given.url).get_backend_name() if given.url else given.backend
    there = possible(backend, own=not given.url)
    if given.faults == ",".join(ALL):
        asked = there
    if set(asked) - set(there):
        parser.error(f"of these faults, {backend} has {', '.join(there)} here")
    with ExitStack() as stack:
        server = None
        if given.url:
            url = sa.make_url(given.url)
        elif given.backend == "sqlite":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            url = sa.URL.create("sqlite", database=f"{folder}/storm.db")
        else:
            server = stack.enter_context(own_server(given.backend))
            url = with_database(server.start())
        result = storm(
            url,
            workers=given.workers,
            rounds=given.rounds,
            faults=asked,
            seconds=given.seconds,
            server=server,
        )
    print("\n".join(result.lines))
    print(f"{len(result.wrong)} wrong")
    print("\n".join(result.wrong[:10]))
    sys.exit(bool(result.wrong))


def with_database(url: sa.URL) -> sa.URL:
    """A database of the server's, made here."""
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE storm")
    engine.dispose()
    return url.set(database="storm")


if __name__ == "__main__":
    main()
