"""What ``--tidy-audit`` costs per test, on a database with a table of 1,000,000 rows.

Run: python -m pytest tests/benchmarks/test_audit.py -m benchmark -s
"""

from __future__ import annotations

import statistics

import pytest
import sqlalchemy as sa

from benchmarks.measure import seconds
from harness.audits import unobserved
from tidyrows.audit.databases import WatchedDatabases
from tidyrows.audit.observer import AuditObserver
from tidyrows.audit.row_history import Maker, RowHistory

ROWS = 1_000_000
SMALL = 50
TESTS = 60

NUMBERS = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {0}) "
    "SELECT 'x' FROM n",
    "postgresql": "SELECT 'x' FROM generate_series(1, {0})",
    "mysql": "SELECT 'x' FROM seq_1_to_{0}",
}

metadata = sa.MetaData()


def table(name):
    number = sa.Column("id", sa.Integer, primary_key=True)
    return sa.Table(name, metadata, number, sa.Column("x", sa.String(20)))


big = table("big")
small = [table(f"small{n}") for n in range(SMALL)]


@pytest.mark.benchmark
def test_a_look_after_each_test(database):
    engine = database.engine()
    metadata.create_all(engine)
    with engine.begin() as connection:
        rows = NUMBERS[database.backend].format(ROWS)
        connection.exec_driver_sql(f"INSERT INTO big (x) {rows}")
        for each in small:
            connection.execute(each.insert(), [{"x": "x"}] * 20)
    observer = AuditObserver()
    watches = WatchedDatabases()
    history = RowHistory(watches.sees)
    observer.open(watches.meet, watches.release)

    def look():
        heard = observer.pop_observed()
        who = Maker("a test")
        history.add(who, watches.look(who, heard), heard)

    def looks(work):
        taken = []
        for number in range(TESTS):
            with engine.connect() as connection:
                work(connection, number)
                connection.commit()
            taken.append(seconds(look) * 1e3)
        return f"{statistics.median(taken):.2f} ms"

    def first():
        engine.connect().close()

    print(f"\n{database.backend}, {SMALL + 1} tables, one of {ROWS} rows; a look, median:")
    print(f"  the first, of all tables: {seconds(first) * 1e3:.0f} ms")
    reads = looks(lambda connection, _n: connection.execute(sa.select(small[0])).all())
    print(f"  after a test that reads: {reads} (at most a few)")
    inserts = looks(lambda connection, _n: connection.execute(small[0].insert(), {"x": "y"}))
    print(f"  after one that commits a row to a small table: {inserts}")
    inserts = looks(lambda connection, _n: connection.execute(big.insert(), {"x": "y"}))
    print(f"  after one that commits a row to the large table: {inserts}")

    def elsewhere(_connection, _number):
        with unobserved(engine).begin() as connection:
            connection.execute(small[1].insert(), {"x": "y"})

    print(f"  after one whose row another process commits: {looks(elsewhere)}")
    observer.close()
    watches.close()
