"""What a cleanup costs against bare SQL that knows the very same keys.

Run: python -m pytest tests/benchmarks/test_cleanup.py -m benchmark -s
"""

from __future__ import annotations

import json

import pytest
import sqlalchemy as sa

from benchmarks.measure import paired, say, seconds
from tidyrows import CleanupManager, ResourceTracker

TABLE = sa.Table(
    "things",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(40)),
    sa.Column("number", sa.Integer),
)
STATEMENTS = {
    "sqlite": "DELETE FROM things WHERE id IN (SELECT value FROM json_each(?))",
    "postgresql": "DELETE FROM things WHERE id = ANY(%s)",
    "mysql": (
        "DELETE t FROM things t JOIN JSON_TABLE(%s, '$[*]' COLUMNS(id INT PATH '$')) k "
        "ON k.id = t.id"
    ),
}


def fill(engine, first, count, step=1):
    with engine.begin() as connection:
        for start in range(0, count, 10_000):
            connection.execute(
                sa.insert(TABLE),
                [
                    {"id": first + n * step, "name": f"name {n}", "number": n}
                    for n in range(start, min(start + 10_000, count))
                ],
            )


@pytest.mark.benchmark
@pytest.mark.parametrize("verify", [False, True], ids=["unverified", "verified"])
@pytest.mark.parametrize("count", [10_000, 100_000])
def test_integer_keys_interleaved_with_strangers(database, count, verify):
    engine = database.engine()
    TABLE.create(engine)
    fill(engine, 1, count, step=2)  # strangers have the odd keys
    keys = list(range(0, 2 * count, 2))
    goal = "at most 2x" if verify else "at most 1.3x"

    def bare():
        fill(engine, 0, count, step=2)
        sent = keys if database.backend == "postgresql" else json.dumps(keys)

        def work():
            with engine.begin() as connection:
                connection.exec_driver_sql(STATEMENTS[database.backend], (sent,))

        return seconds(work)

    def tidy():
        fill(engine, 0, count, step=2)
        tracker = ResourceTracker(engine)
        tracker.track_rows(TABLE, keys)
        cleanup = CleanupManager(tracker, verify=verify)
        taken = seconds(cleanup.cleanup)
        assert cleanup.report.total_deleted == count
        return taken

    medians = paired(tidy, bare, 9 if count <= 10_000 else 5)
    word = "with" if verify else "without"
    say(f"{database.target}, {count} keys, {word} verification", *medians, goal)


@pytest.mark.benchmark
def test_ten_rows_among_a_million_others_against_ten_rows_alone(database):
    engine = database.engine()
    crowded = TABLE.to_metadata(sa.MetaData(), name="crowded")
    TABLE.create(engine)
    crowded.create(engine)
    with engine.begin() as connection:
        for start in range(0, 1_000_000, 50_000):
            connection.execute(
                sa.insert(crowded),
                [
                    {"id": 100 + n, "name": "theirs", "number": n}
                    for n in range(start, start + 50_000)
                ],
            )
    if database.backend != "sqlite":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            word = "ANALYZE" if database.backend == "postgresql" else "ANALYZE TABLE"
            connection.exec_driver_sql(f"{word} crowded")

    def cleaned(table):
        with engine.begin() as connection:
            connection.execute(sa.insert(table), [{"id": n, "name": "ours"} for n in range(10)])
        tracker = ResourceTracker(engine)
        tracker.track_rows(table, list(range(10)))
        return seconds(CleanupManager(tracker).cleanup)

    medians = paired(lambda: cleaned(crowded), lambda: cleaned(TABLE), 40)
    say(f"{database.target}, 10 rows among a million", *medians, "at most 1.2x")
