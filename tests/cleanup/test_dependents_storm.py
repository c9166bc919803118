"""An application that goes on writing rows for ours while they are cleaned up."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from harness.targets import on
from tidyrows import CleanupManager, ResourceTracker

WAIT = 60
PARENTS, WRITERS = 40, 3
ACTIONS = {"takes": "CASCADE", "frees": "SET NULL", "needs": None, "may": None}


def family(engine: sa.Engine) -> dict[str, sa.Table]:
    metadata = sa.MetaData()
    tables = {
        "parents": sa.Table(
            "parents", metadata, sa.Column("id", sa.Integer, primary_key=True, autoincrement=False)
        )
    }
    for name, action in ACTIONS.items():
        tables[name] = sa.Table(
            name,
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column(
                "parent_id",
                sa.ForeignKey("parents.id", ondelete=action),
                nullable=name in {"frees", "may"},
                index=True,
            ),
        )
    metadata.create_all(engine)
    return tables


# SQLite has one writer: nobody can write while a cleanup does
@on("postgresql+psycopg", "mysql+pymysql")
@pytest.mark.parametrize("mode", ["one", "transaction"])
def test_every_row_that_was_committed_is_accounted_for(database, mode):
    """Each child is deleted and in the report, or there without a parent, and no parent is left."""
    engine = database.engine(pool_size=WRITERS + 3)
    app = database.engine(pool_size=WRITERS)
    tables = family(engine)
    tracker = ResourceTracker(engine)
    manager = CleanupManager(tracker)
    with engine.begin() as connection:
        connection.execute(
            sa.insert(tables["parents"]), [{"id": n} for n in range(PARENTS + WRITERS)]
        )
    tracker.track_rows(tables["parents"], list(range(PARENTS)))
    started, done = threading.Barrier(WRITERS + 1), threading.Event()
    committed: dict[str, set[int]] = {name: set() for name in ACTIONS}

    def write(number: int) -> None:
        turn = 0
        started.wait(WAIT)
        while not done.is_set():
            turn += 1
            names = list(ACTIONS)[turn % 4 :][: 1 if mode == "one" else 3]
            made = []
            try:
                with app.begin() as connection:
                    for name in names:
                        parent = (turn * 7 + number) % PARENTS
                        result = connection.execute(sa.insert(tables[name]), {"parent_id": parent})
                        made.append((name, result.inserted_primary_key[0]))
            except sa.exc.DBAPIError:
                continue  # the parent is gone, or a deadlock took the application's turn
            for name, key in made:
                committed[name].add(key)

    with ThreadPoolExecutor(WRITERS) as pool:
        writers = [pool.submit(write, number) for number in range(WRITERS)]
        try:
            started.wait(WAIT)
            while sum(map(len, committed.values())) < 20:
                assert not any(writer.done() for writer in writers)
            report = manager.cleanup()
        finally:
            done.set()
        for writer in writers:
            writer.result(WAIT)
    assert report.total_deleted == PARENTS
    told = {table.name: {row.key[0] for row in rows} for table, rows in report.dependents.items()}
    loose = {table.name: {row.key[0] for row in rows} for table, rows in report.detached.items()}
    with engine.connect() as connection:
        parents = connection.scalars(sa.select(tables["parents"].c.id)).all()
        assert sorted(parents) == list(range(PARENTS, PARENTS + WRITERS))
        for name in ACTIONS:
            table = tables[name]
            rows = dict(connection.execute(sa.select(table.c.id, table.c.parent_id)).all())
            assert set(rows.values()) <= {None}
            deletes = name in {"takes", "needs"}
            assert told.get(name, set()) == (committed[name] if deletes else set())
            assert rows.keys() == (set() if deletes else committed[name])
            assert loose.get(name, set()) == (set() if deletes else committed[name])
