"""A key names another row once its table has been emptied or made anew."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from harness.blocks import INTEGER
from harness.ledgers import Worker, dead_worker, entries, numbered, orphans, sweep
from tidyrows import CleanupError, CleanupManager

pytestmark = pytest.mark.slow

plans = sa.Table(
    "plans",
    sa.MetaData(),
    sa.Column("id", sa.Integer, **INTEGER),
    sa.Column("name", sa.String(30)),
)
lines = sa.Table("plan_lines", plans.metadata, sa.Column("text", sa.String(30)))


def recreate(engine):
    plans.metadata.drop_all(engine)
    plans.metadata.create_all(engine)


def truncate(engine):
    with engine.begin() as connection:
        for table in (plans, lines):
            verb = "DELETE FROM" if engine.dialect.name == "sqlite" else "TRUNCATE TABLE"
            connection.exec_driver_sql(f"{verb} {table.name}")


@pytest.fixture(params=[recreate, truncate])
def begin_anew(request):
    return request.param


@pytest.fixture(autouse=True)
def tables(outside):
    plans.metadata.create_all(outside)


def seed(engine, table, *rows):
    with engine.begin() as connection:
        connection.execute(sa.insert(table), list(rows))


def rows_of(engine, table):
    with engine.connect() as connection:
        return sorted(map(tuple, connection.execute(sa.select(table))))


def has_incarnations(database):
    return database.backend != "sqlite"


def test_a_sweep_takes_no_row_under_the_keys_of_a_former_table(
    database, outside, ledgers, begin_anew
):
    """Not even of a live worker whose rows look as the dead one's did."""
    dead_worker(database, ledgers, (plans, numbered(range(1, 5), name="of a test")))
    begin_anew(outside)
    live = Worker(database, ledgers, name="gw1").writes((plans, numbered([1], name="of a test")))
    seed(outside, plans, {"id": 2, "name": "free"})
    before = rows_of(outside, plans)
    try:
        report = sweep(outside)
    except CleanupError as error:
        assert not has_incarnations(database)  # its rows are compared
        report = error.report
    else:
        assert len(entries(outside)) == 1  # the live worker's
        assert sum(report.already_gone.values()) + sum(report.untouched.values()) == 4
        assert not report.held
    assert report.total_deleted == 0
    assert rows_of(outside, plans) == before
    assert CleanupManager(live.tracker).cleanup().total_deleted == 1
    assert rows_of(outside, plans) == [(2, "free")]


def test_rows_that_may_have_been_kept_by_a_rebuild_are_counted(database, outside, ledgers):
    if not has_incarnations(database):
        return
    dead_worker(database, ledgers, (plans, numbered(range(1, 5), name="of a test")))
    truncate(outside)
    seed(outside, plans, {"id": 2, "name": "free"})
    assert not [each.rows for each in orphans(outside) if each.rows]
    report = sweep(outside)
    assert list(report.untouched.values()) == [1]
    assert list(report.already_gone.values()) == [3]
    assert "plans 1 untouched, since the table was emptied or rebuilt" in str(report)
    assert str(sweep(outside)).startswith("nothing")


def test_equal_rows_without_a_key_are_not_those_of_a_former_table(
    database, outside, ledgers, begin_anew
):
    if not has_incarnations(database):
        return
    dead_worker(database, ledgers, (lines, [{"text": "equal"}, {"text": "equal"}]))
    begin_anew(outside)
    seed(outside, lines, {"text": "equal"})
    assert sweep(outside).total_deleted == 0
    assert rows_of(outside, lines) == [("equal",)]


def test_rows_of_the_present_table_go_with_the_sweep(database, outside, ledgers, begin_anew):
    """One worker has rows of both; its engine keeps what it knows of the table."""
    worker = Worker(database, ledgers).writes((plans, numbered([1, 2, 3], name="former")))
    begin_anew(outside)
    worker.writes((plans, numbered([2, 4], name="present")), (lines, [{"text": "present"}])).dies()
    seed(outside, plans, {"id": 1, "name": "free"})
    try:
        report = sweep(outside)
    except CleanupError as error:
        assert not has_incarnations(database)
        report = error.report
    assert report.total_deleted == 3
    assert rows_of(outside, plans) == [(1, "free")]
    assert rows_of(outside, lines) == []


def test_a_sweep_leaves_a_row_that_a_live_worker_has_entered(database, outside, ledgers):
    """Where nobody knows that the table is another, the entry of the live worker tells."""
    dead_worker(database, ledgers, (plans, numbered([1, 2], name="of a test")))
    with outside.begin() as connection:
        connection.execute(sa.delete(plans).where(plans.c.id == 1))
    live = Worker(database, ledgers, name="gw1").writes((plans, numbered([1], name="of a test")))
    report = sweep(outside)
    assert [str(each.row) for each in report.held] == [f"{next(iter(report.deleted))}(1)"]
    assert "gw1" in report.held[0].by
    assert report.total_deleted == 1
    assert rows_of(outside, plans) == [(1, "of a test")]
    assert CleanupManager(live.tracker).cleanup().total_deleted == 1
    assert list(sweep(outside).already_gone.values()) == [1]
    assert not entries(outside)
