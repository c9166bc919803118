"""Ledgers of a test, and workers that die: closed at its end, so that no connection is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import sqlalchemy as sa

from harness.blocks import INTEGER, insert
from harness.databases import Database
from tidyrows import CleanupReport, Ledger, Orphans, ResourceTracker, WorkerContext
from tidyrows import find_orphans as orphans_of
from tidyrows import sweep as swept

NAME = "tidyrows_ledger"


class Ledgers:
    """Every ledger of a test."""

    def __init__(self) -> None:
        self._made: list[Ledger] = []

    def installed(self, engine: sa.Engine, **options: Any) -> Ledger:
        """A ledger, and its table."""
        ledger = Ledger(engine, **options)
        self._made.append(ledger)
        ledger.install()
        return ledger

    def close(self) -> None:
        """Let go of all locks."""
        while self._made:
            self._made.pop().close()


@contextmanager
def closing_all() -> Iterator[Ledgers]:
    """The ledgers of a test."""
    made = Ledgers()
    try:
        yield made
    finally:
        made.close()


class Worker:
    """One worker with an engine, a lock and a tracker of its own, as another process has them.

    Args:
        database: where.
        ledgers: what closes its ledger, should the test not.
        run: its run.
        name: its own id.
        options: the tracker's.

    Attributes:
        engine: what it writes through.
        ledger: its ledger.
        tracker: its tracker; it listens in ``with worker:``.
    """

    def __init__(
        self,
        database: Database,
        ledgers: Ledgers,
        *,
        run: str = "run-1",
        name: str = "gw0",
        test: str | None = None,
        **options: Any,
    ) -> None:
        self.engine = database.engine()
        self.ledger = ledgers.installed(self.engine)
        self.tracker = ResourceTracker(
            self.engine,
            context=WorkerContext(run, name, 0, test),
            ledger=self.ledger,
            **options,
        )

    def __enter__(self) -> Self:
        self.tracker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.tracker.stop()

    def writes(self, *batches: tuple[sa.Table, list[Mapping[str, Any]]]) -> Worker:
        """Insert and commit rows while its tracker listens."""
        with self:
            insert(self.engine, *batches)
        return self

    def dies(self) -> Worker:
        """Its lock is free and its heart stands still, and its rows are where they were."""
        self.ledger.close()
        self.tracker.dismiss_leak_warning()
        return self


def dead_worker(
    database: Database,
    ledgers: Ledgers,
    *batches: tuple[sa.Table, list[Mapping[str, Any]]],
    **options: Any,
) -> Worker:
    """A worker that has written rows and died."""
    return Worker(database, ledgers, **options).writes(*batches).dies()


def sweep(place: Any, **options: Any) -> CleanupReport:
    """A sweep for which a worker without a lock is dead, though this process lives."""
    return swept(place, **{"patience": 0.0, **options})


def orphans(place: Any, **options: Any) -> list[Orphans]:
    """What such a sweep would take."""
    return orphans_of(place, **{"patience": 0.0, **options})


def entries(
    engine: sa.Engine, name: str = NAME, schema: str | None = None
) -> list[Mapping[str, Any]]:
    """The ledger's entries of all workers, in their order; not what it says of workers."""
    where = f"{schema}.{name}" if schema else name
    with engine.connect() as connection:
        rows = connection.exec_driver_sql(
            f"SELECT * FROM {where} WHERE seq > 0 AND owner <> 'tidyrows' ORDER BY maker, seq"
        )
        return [dict(row) for row in rows.mappings()]


def kinds(engine: sa.Engine, **options: Any) -> list[str]:
    """What the entries are."""
    return sorted(each["kind"] for each in entries(engine, **options))


@contextmanager
def counted(engine: sa.Engine, words: str) -> Iterator[Callable[[], int]]:
    """How many statements with these words an engine has sent since."""
    seen: list[str] = []

    def look(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if words in statement:
            seen.append(statement)

    sa.event.listen(engine, "before_cursor_execute", look)
    try:
        yield lambda: len(seen)
    finally:
        sa.event.remove(engine, "before_cursor_execute", look)


def family(engine: sa.Engine, **references: Any) -> tuple[sa.Table, sa.Table]:
    """``parents``, and ``children`` that reference them.

    Args:
        engine: where to make them.
        references: of the child's column; ``ondelete``, ``nullable``.
    """
    metadata = sa.MetaData()
    parents = sa.Table(
        "parents",
        metadata,
        sa.Column("id", sa.Integer, **INTEGER),
        sa.Column("name", sa.String(30)),
    )
    nullable = references.pop("nullable", True)
    children = sa.Table(
        "children",
        metadata,
        sa.Column("id", sa.Integer, **INTEGER),
        sa.Column(
            "parent_id",
            sa.ForeignKey("parents.id", name="fk_children_parents", **references),
            nullable=nullable,
        ),
    )
    metadata.create_all(engine)
    return parents, children


def ids(engine: sa.Engine, table: sa.Table) -> list[Any]:
    """The keys that are in a table."""
    (column,) = table.primary_key
    with engine.connect() as connection:
        return sorted(connection.execute(sa.select(column)).scalars(), key=repr)


def numbered(count: Iterable[int], **values: Any) -> list[Mapping[str, Any]]:
    """Rows with these numbers as their ``id``."""
    return [{"id": number, **values} for number in count]


def cut(
    engine: sa.Engine,
    monkeypatch: Any,
    *,
    carried_out: bool,
    after: int = 0,
    verb: str | None = None,
) -> None:
    """Lose the line at an engine's next COMMIT, before the server has carried it out or after.

    Args:
        engine: whose.
        monkeypatch: pytest's.
        carried_out: whether the server does what it was told.
        after: so many COMMITs get their answer first.
        verb: so do all before a statement that begins so.
    """
    dialect, commit = engine.dialect, engine.dialect.do_commit
    left, seen = after, verb is None

    def look(_connection: Any, _cursor: Any, sql: str, *_more: Any) -> None:
        nonlocal seen
        seen = seen or sql.startswith(str(verb))

    sa.event.listen(engine, "before_cursor_execute", look)

    def answer(connection: Any) -> None:
        nonlocal left
        if left or not seen:
            left -= bool(left)
            commit(connection)
            return
        monkeypatch.setattr(dialect, "do_commit", commit)
        if carried_out:
            commit(connection)
        else:
            connection.rollback()
        if dialect.name != "sqlite":
            connection.driver_connection.close()
        raise dialect.loaded_dbapi.OperationalError(2013, "the connection was lost")

    monkeypatch.setattr(dialect, "do_commit", answer)
