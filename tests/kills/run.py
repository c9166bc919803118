"""The kills: workers and sweeps that die at any instant, and strangers beside them.

    python tests/kills/run.py --backend postgresql --kills 200
    python tests/kills/run.py --backend postgresql --kills 200 --emptied

Each wave is some workers on one database, each killed at an instant of its own: by chance, or at,
or soon after, the n-th statement, COMMIT or answer to one. Strangers then take every key that is
free, a sweep follows (or two at once, or one that is killed too), and the whole database is
compared row by row. With ``--emptied`` all tables are truncated or made anew after the kills, and
two more workers live while the sweeps run: their rows have the keys of the dead ones.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from harness import servers
from harness.bystanders import Bystanders, snapshot
from harness.databases import Homes
from kills import files  # noqa: F401 -- it registers what removes them
from kills.children import Child, strike
from kills.tables import (
    ALL,
    LEDGER,
    OTHER,
    Currency,
    Note,
    Seat,
    Token,
    free,
    log_lines,
    other_notes,
)
from storm import shop
from tidyrows import CleanupError, Ledger, Leftover, LeftoverKind, find_orphans, sweep

WORKERS = 4
PATIENT = 30.0
"""Seconds within which a sweep finds that all are dead."""
LIMITS = (3, 10_000)
SWEEPS = ("plain", "plain", "two at once", "killed", "killed beside another")


@dataclass
class Result:
    """What the kills have come to.

    Attributes:
        wrong: what must not be, in words; empty where all is well.
        kills: processes killed.
        struck: where, and how often.
        rows: how many rows the sweeps deleted.
        again: the most sweeps that one wave took.
        seconds: how long it took.
    """

    wrong: list[str] = field(default_factory=list)
    kills: int = 0
    struck: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    again: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        where = [f"  {count:4} {place}" for place, count in sorted(self.struck.items())]
        head = (
            f"{self.kills} kills, {self.rows} rows swept, at most {self.again} sweeps a wave, "
            f"{self.seconds:.0f} s"
        )
        return "\n".join([head, *where])


class Scene:
    """One database with strangers in it.

    Args:
        url: an empty database.
        folder: for files.
        result: what becomes of it.
        rng: what is drawn from.
        schema: another one, as the database names it; None where there is none.
    """

    def __init__(
        self,
        url: sa.URL,
        folder: Path,
        result: Result,
        rng: random.Random,
        schema: str | None = None,
    ) -> None:
        self.url = url.render_as_string(hide_password=False)
        self.result, self.rng = result, rng
        self.engine = sa.create_engine(url, poolclass=NullPool)
        self.folder = folder / "files"
        self.folder.mkdir()
        self.schema = schema
        self._number = 0
        self._lock = threading.Lock()
        self.metadatas = list(ALL)
        if schema is not None:
            self.metadatas.append(sa.MetaData())
            other_notes.to_metadata(self.metadatas[-1], schema=schema)
        for metadata in self.metadatas:
            metadata.create_all(self.engine)
        Ledger(self.engine).install()
        self.seed()

    def seed(self, line: str = "line") -> None:
        """The strangers that are there at the beginning."""
        self.bystanders = Bystanders(self.engine)
        self.bystanders.insert(shop.Org, *({"name": f"bystander {n}", "v": n} for n in range(5)))
        with self.engine.connect() as connection:
            self.orgs = connection.scalars(sa.select(shop.Org.id)).all()
        users = [{"email": f"bystander {n}", "org_id": org} for n, org in enumerate(self.orgs)]
        self.bystanders.insert(shop.User, *users)
        with self.engine.connect() as connection:
            self.users = connection.scalars(sa.select(shop.User.id)).all()
        self.bystanders.insert(shop.Tag, {"name": "bystander"})
        self.bystanders.insert(Token, {"text": "bystander"})
        self.bystanders.insert(Currency, {"code": "bystander", "text": "bystander"})
        self.bystanders.insert(log_lines, *({"text": line, "n": n % 3} for n in range(6)))
        self.strangers([])
        (self.folder / "bystander").touch()

    def begin_anew(self) -> None:
        """Another suite truncates all tables, or makes them anew, and seeds them."""
        if self.rng.random() < 0.5:
            for metadata in self.metadatas:
                metadata.drop_all(self.engine)
                metadata.create_all(self.engine)
        else:
            tables = [each for metadata in self.metadatas for each in metadata.sorted_tables]
            with self.engine.begin() as connection:
                truncate(connection, tables)
        # on SQLite nothing tells equal rows of a table that was emptied from those before
        self.seed("another line" if self.engine.dialect.name == "sqlite" else "line")

    def worker(self, blow: dict[str, Any] | None = None) -> Child:
        """One that waits for its line."""
        self._number += 1
        return Child({
            "url": self.url,
            "seed": self.rng.randrange(10**9),
            "prefix": f"w{self._number}",
            "folder": str(self.folder),
            "org": self.rng.choice(self.orgs),
            "schema": self.schema,
            "blow": blow,
        })  # fmt: skip  # a line each

    def strangers(self, workers: list[Child]) -> None:
        """They come at once, and take every natural key that is free."""
        prefixes = [worker.given["prefix"] for worker in workers]
        with self.engine.connect() as connection:
            codes, places = free(connection, prefixes)
        insert = self.bystanders.insert
        insert(Currency, *({"code": code, "text": "stranger"} for code in codes))
        insert(Seat, *({"hall": h, "number": n, "text": "stranger"} for h, n in places))
        insert(Note, *({"text": "stranger"} for _ in range(3)))
        if self.schema is not None:
            insert(other_notes.to_metadata(sa.MetaData(), schema=self.schema), {"text": "stranger"})
        self._number += 1
        insert(shop.Org, {"name": f"stranger {self._number}", "v": 0})
        insert(shop.Order, {"user_id": self.users[0]})

    # -- sweeping ------------------------------------------------------------------------------

    def sweep(self, *, kept: bool | str = False) -> None:
        """Once; what it deleted counts."""
        try:
            report = sweep(self.url, kept=kept, rows_per_transaction=self.rng.choice(LIMITS))
        except Exception as error:  # noqa: BLE001 -- whatever it is, it must not be
            self.result.wrong.append(f"a sweep raised {error!r}")
            return
        with self._lock:
            self.result.rows += report.total_deleted
            if report.already_gone:
                self.result.wrong.append(f"a sweep found rows gone already: {report}")

    def sweep_beside(self, *, kept: bool = False) -> None:
        """Once, while others live; on SQLite the values may not tell whose a row is."""
        self.left: Sequence[Leftover] = ()
        try:
            self.result.rows += sweep(self.url, kept=kept, patience=0.0).total_deleted
        except CleanupError as error:
            self.left = error.leftovers
            kinds = {each.kind for each in error.leftovers}
            known = {LeftoverKind.UNCERTAIN, LeftoverKind.NEEDED}
            if self.engine.dialect.name != "sqlite" or not kinds <= known:
                self.result.wrong.append(f"a sweep raised {error!r}")

    def forget_uncertain(self) -> None:
        """No sweep takes these: rows that are uncertain, and files that go after them."""
        uncertain = [each.row for each in self.left if each.kind is LeftoverKind.UNCERTAIN]
        for each in self.left:
            if each.resource is not None and each.reason.item in uncertain:
                Path(each.resource.payload["path"]).unlink()
        with self.engine.begin() as connection:
            connection.exec_driver_sql(f"DELETE FROM {LEDGER} WHERE maker <> 'tidyrows'")

    def sweep_in_child(self, blow: dict[str, Any]) -> Child:
        """One that waits for its line."""
        limit = self.rng.choice(LIMITS)
        return Child({"url": self.url, "blow": _to_child(blow), "rows_per_transaction": limit})

    def killed(self, children: list[Child], blows: list[dict[str, Any]]) -> None:
        """Let them go, and kill each at its instant."""
        threads = [
            threading.Thread(target=self._strike, args=each)
            for each in zip(children, blows, strict=True)
        ]
        for child in children:
            child.wait_for(b"i")
            child.line()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _strike(self, child: Child, blow: dict[str, Any]) -> None:
        wrong = strike(child, blow)
        with self._lock:
            if wrong:
                self.result.wrong.append(f"{child.given}: {wrong}")
            if child.killed:
                self.result.kills += 1
                self.result.struck[child.where()] += 1

    def swept(self, kind: str, workers: list[Child]) -> None:
        """Sweep in one of these ways, then until nobody's rows are entered any more."""
        if kind == "two at once":
            both = [threading.Thread(target=self.sweep) for _ in range(2)]
            for each in both:
                each.start()
            for each in both:
                each.join()
        elif kind == "plain":
            self.sweep()
        else:
            blow = blow_of(self.rng, sweeping=True)
            child = self.sweep_in_child(blow)
            child.wait_for(b"i")
            beside = threading.Thread(target=self.sweep)
            if kind == "killed beside another":
                beside.start()
            self.killed([child], [blow])
            if beside.ident is not None:
                beside.join()
        self.kept(workers)
        until = time.monotonic() + PATIENT
        times, pause = 0, threading.Event()
        while True:
            times += 1
            self.sweep(kept=True)  # kept, and killed before it could tell
            if not self.entries() or time.monotonic() > until or self.result.wrong:
                break
            pause.wait(0.1)
        self.result.again = max(self.result.again, times)

    def kept(self, workers: list[Child]) -> None:
        """What a worker has kept is there yet, all of it, until it is asked for by its name."""
        for name, count in [pair for worker in workers for pair in worker.kept.items()]:
            found = find_orphans(self.url, kept=name)
            things = sum(sum({**each.rows, **each.external}.values()) for each in found)
            if things != count:
                self.result.wrong.append(f"{name}: {count} were kept, and {things} are: {found}")
            self.sweep(kept=name)

    def entries(self) -> list[str]:
        """All but the ledger's own rows."""
        asked = sa.text(f"SELECT * FROM {LEDGER} WHERE maker <> 'tidyrows'")
        with self.engine.connect() as connection:
            return [str(row) for row in connection.execute(asked)]

    # -- comparing -----------------------------------------------------------------------------

    def compared(self, workers: list[Child]) -> None:
        """Row by row, file by file."""
        sure = {name for worker in workers for name in worker.told}
        with self.engine.begin() as connection:
            for key, text in connection.execute(sa.select(Note.id, Note.text)).all():
                # committed before a kill kept it from being told: it is nobody's
                if text.startswith("told ") and int(text[5:]) not in sure:
                    connection.execute(sa.delete(Note.__table__).where(Note.__table__.c.id == key))
        wrong = self.result.wrong
        now = snapshot(self.engine)
        for each in (now, self.bystanders.expected):
            for name in [name for name in each if name.endswith(LEDGER)]:
                del each[name]
        wrong += self.bystanders.expected.difference(now)
        wrong += [f"entry {entry}" for entry in self.entries()]
        left = {path.name for path in self.folder.iterdir()} ^ {"bystander"}
        wrong += [f"file {name}" for name in sorted(left)]
        if self.engine.dialect.name == "sqlite":
            database = Path(str(self.engine.url.database))
            locks = database.parent.glob(f"{database.name}-tidyrows-*")
            wrong += [f"lock file {path.name}" for path in locks]


def truncate(connection: sa.Connection, tables: list[sa.Table]) -> None:
    """All of them at once, whatever references what; their numbers begin anew."""
    quote = connection.dialect.identifier_preparer.format_table
    names = [quote(table) for table in tables]
    match connection.dialect.name:
        case "postgresql":
            connection.exec_driver_sql(f"TRUNCATE {', '.join(names)} RESTART IDENTITY")
        case "sqlite":
            for name in names:
                connection.exec_driver_sql(f"DELETE FROM {name}")
        case _:
            connection.exec_driver_sql("SET foreign_key_checks = 0")
            for name in names:
                connection.exec_driver_sql(f"TRUNCATE TABLE {name}")
            connection.exec_driver_sql("SET foreign_key_checks = 1")


def emptied(
    url: sa.URL, folder: Path, *, count: int, seed: int | None = None, schema: str | None = None
) -> Result:
    """As :func:`kills`; after each wave all tables begin anew, and two workers live meanwhile."""
    began = time.monotonic()
    seed = random.randrange(10**6) if seed is None else seed
    rng = random.Random(seed)
    result = Result()
    scene = Scene(url, folder, result, rng, schema)
    while result.kills < count and not result.wrong:
        blows = [blow_of(rng, longest=1.0) for _ in range(WORKERS)]
        dead = [scene.worker(_to_child(blow)) for blow in blows]
        scene.killed(dead, blows)
        scene.begin_anew()
        scene.strangers(dead)
        live = [scene.worker(), scene.worker()]
        for each in live:
            each.wait_for(b"i")
            each.line()
        for number in range(3):
            for each in live:
                each.wait_for(b"c", number + 1)
            scene.sweep_beside()
        result.wrong += [wrong for each in live if (wrong := each.leave())]
        until, pause = time.monotonic() + PATIENT, threading.Event()
        sweeps = 0
        while scene.entries() and time.monotonic() < until and not result.wrong:
            sweeps += 1
            scene.sweep_beside(kept=True)
            if scene.engine.dialect.name == "sqlite" and sweeps > 1:
                scene.forget_uncertain()
            pause.wait(0.05)
        scene.compared(live)
    scene.engine.dispose()
    result.seconds = time.monotonic() - began
    if result.wrong:
        result.wrong.insert(0, f"seed {seed}, after {result.kills} kills")
    return result


def blow_of(rng: random.Random, *, longest: float = 0.3, sweeping: bool = False) -> dict[str, Any]:
    """When and where to strike."""
    if rng.random() < 0.4:
        return {"seconds": rng.uniform(0, longest)}
    if not sweeping and rng.random() < 0.1:  # while another thread takes the lock
        return _blow("o", "o", 1, rng.uniform(0, 0.05))
    mark = rng.choice("bae" if sweeping else "bbaae")
    phase = "s" if sweeping else rng.choice("cckkf")
    most = {"s": (4, 60), "f": (1, 6)}.get(phase, (8, 60))[mark == "e"]
    number = rng.randint(1, most)
    return _blow(phase, mark, number, rng.choice((None, 0, rng.uniform(0, 0.01))))


def _blow(phase: str, mark: str, number: int, linger: float | None) -> dict[str, Any]:
    """At the n-th of these marks in this phase, or so many seconds later."""
    halt = linger is None
    return {"phase": phase, "mark": mark, "number": number, "halt": halt, "linger": linger or 0}


def kills(
    url: sa.URL,
    folder: Path,
    *,
    count: int,
    workers: int = WORKERS,
    seed: int | None = None,
    schema: str | None = None,
) -> Result:
    """Run it.

    Args:
        url: an empty database, whose user may do everything.
        folder: an empty folder.
        count: how many processes to kill, at least.
        workers: how many work at once.
        seed: of what is drawn; the instants of the kills are the machine's all the same.
        schema: another one of the database, where it has one.
    """
    began = time.monotonic()
    seed = random.randrange(10**6) if seed is None else seed
    rng = random.Random(seed)
    result = Result()
    scene = Scene(url, folder, result, rng, schema)
    longest = _round_of(scene) * 3
    kinds = list(SWEEPS)
    rng.shuffle(kinds)
    blows = [blow_of(rng, longest=longest) for _ in range(workers)]
    wave = [scene.worker(_to_child(blow)) for blow in blows]
    while wave and not result.wrong:
        scene.killed(wave, blows)
        dead = wave
        blows = [blow_of(rng, longest=longest) for _ in range(min(workers, count - result.kills))]
        wave = [scene.worker(_to_child(blow)) for blow in blows]  # they import meanwhile
        scene.strangers(dead)
        scene.swept(kinds[0], dead)
        kinds.append(kinds.pop(0))
        scene.compared(dead)
    for each in wave:
        each.end()
    scene.engine.dispose()
    result.seconds = time.monotonic() - began
    if result.wrong:
        result.wrong.insert(0, f"seed {seed}, after {result.kills} kills")
    return result


def _to_child(blow: dict[str, Any]) -> dict[str, Any] | None:
    return None if "seconds" in blow else blow


def _round_of(scene: Scene) -> float:
    """How long a round takes here: from a worker that is killed after some."""
    worker = scene.worker()
    worker.wait_for(b"i")
    began = time.monotonic()
    worker.line()
    rounds = 3
    worker.wait_for(b"r", rounds)
    took = (time.monotonic() - began) / rounds
    wrong = worker.end()
    if wrong:
        scene.result.wrong.append(wrong)
    scene.result.kills += 1
    scene.result.struck[worker.where()] += 1
    scene.strangers([worker])
    scene.swept("plain", [worker])
    scene.compared([worker])
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("postgresql", "mysql", "sqlite"), required=True)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--emptied", action="store_true", help="empty the tables after each wave")
    given = parser.parse_args()
    homes = Homes({"postgresql": servers.find_postgresql, "mysql": servers.find_mysql})
    with ExitStack() as stack:
        stack.callback(homes.drop_all)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if given.backend == "sqlite":
            url, schema = sa.URL.create("sqlite", database=str(folder / "kills.db")), None
        else:
            home = homes.home(given.backend)
            url, schema = home.url, home.extra_schema(OTHER)
        options: dict[str, Any] = {"seed": given.seed, "schema": schema}
        if given.emptied:
            result = emptied(url, folder, count=given.kills, **options)
        else:
            result = kills(url, folder, count=given.kills, workers=given.workers, **options)
    print(result)
    print(f"{len(result.wrong)} wrong")
    print("\n".join(result.wrong[:40]))
    sys.exit(bool(result.wrong))


if __name__ == "__main__":
    main()
