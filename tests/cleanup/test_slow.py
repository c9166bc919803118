"""A missing index is named, with the statement that creates it."""

from __future__ import annotations

import itertools

import pytest
import sqlalchemy as sa

from harness.blocks import insert, reference, table, tracked
from harness.bystanders import snapshot
from harness.targets import on
from tidyrows import CleanupManager, RetryPolicy
from tidyrows.cleanup.connection import Database
from tidyrows.cleanup.diagnosis import is_slow, missing_indexes
from tidyrows.cleanup.schema_view import schema_of

without_own_indexes = on("sqlite", "postgresql+psycopg")
"""The MySQL family makes an index for every foreign key."""


class Slowly:
    """A clock by which every look takes a second."""

    def __init__(self, step=1.0):
        self._ticks = itertools.count(0.0, step)

    def __call__(self):
        return next(self._ticks)


def policy(step=1.0):
    return RetryPolicy(deadline=100_000.0, clock=Slowly(step))


def family(engine, *extra, **options):
    """Users, and orders that reference them by ``user_id``."""
    metadata = sa.MetaData()
    users = table(metadata, "users")
    orders = table(metadata, "orders", reference("user_id", "users.id", **options), *extra)
    metadata.create_all(engine)
    return users, orders


def missing(engine, parent):
    """The statements for the keys to a table."""
    tracker = tracked(engine, (parent, [{"id": 71}]))
    (held,) = tracker.store.snapshot()
    with engine.begin() as connection:
        connection.execute(sa.delete(parent).where(parent.c.id == 71))
    database = Database(engine, lock_timeout=5.0, statement_timeout=30.0)
    view = schema_of(database, [held.table])
    place = held.table.name.schema, held.table.name.name
    with database.reading() as connection:
        return [made for _key, made in missing_indexes(connection, database.dialect, view, place)]


# --- in the report


@without_own_indexes
@pytest.mark.parametrize("ondelete", [None, "CASCADE", "SET NULL"])
def test_a_slow_delete_names_the_index_that_is_missing(database, ondelete):
    engine = database.engine()
    users, _orders = family(engine, nullable=True, ondelete=ondelete)
    before = snapshot(engine)
    tracker = tracked(engine, (users, [{"id": 1}, {"id": 2}]))
    report = CleanupManager(tracker, retry=policy()).cleanup()
    (advice,) = report.advice
    assert advice.startswith("orders (user_id) has no index, so deleting 2 row(s) of users took ")
    assert "s: CREATE INDEX " in advice
    assert str(report).splitlines()[1] == f"slow: {advice}"
    assert snapshot(engine) == before


@without_own_indexes
def test_the_index_that_was_advised_ends_the_advice(database):
    engine = database.engine()
    users, _orders = family(engine)
    for expected in (1, 0):
        tracker = tracked(engine, (users, [{"id": 1}]))
        report = CleanupManager(tracker, retry=policy()).cleanup()
        assert len(report.advice) == expected
        for advice in report.advice:
            with engine.begin() as connection:
                connection.exec_driver_sql(advice.partition(" s: ")[2])
    assert "slow" not in str(report)


@on("mysql+pymysql")
def test_where_every_foreign_key_has_its_index_there_is_no_advice(database):
    engine = database.engine()
    users, _orders = family(engine)
    report = CleanupManager(tracked(engine, (users, [{"id": 1}])), retry=policy()).cleanup()
    assert report.advice == ()


@without_own_indexes
def test_a_fast_delete_asks_nothing(database):
    engine = database.engine()
    users, _orders = family(engine)
    tracker = tracked(engine, (users, [{"id": 1}]))
    CleanupManager(tracked(engine, (users, [{"id": 2}]))).cleanup()  # the schema is read
    asked = []
    sa.event.listen(engine, "before_cursor_execute", lambda *seen: asked.append(seen[2]))
    report = CleanupManager(tracker, retry=policy(0.0001)).cleanup()
    fast = len(asked)
    assert report.advice == ()
    asked.clear()
    tracker = tracked(engine, (users, [{"id": 1}]))
    CleanupManager(tracker, retry=policy()).cleanup()
    assert len(asked) > fast


@without_own_indexes
def test_the_dependents_that_go_too_are_counted_and_advised_on(database):
    engine = database.engine()
    metadata = sa.MetaData()
    users = table(metadata, "users")
    orders = table(metadata, "orders", reference("user_id", "users.id", index=True))
    table(metadata, "lines", reference("order_id", "orders.id"))
    metadata.create_all(engine)
    tracker = tracked(engine, (users, [{"id": 1}]))
    insert(database.engine(), (orders, [{"id": n, "user_id": 1} for n in (1, 2, 3)]))
    report = CleanupManager(tracker, retry=policy()).cleanup()
    (advice,) = report.advice
    assert advice.startswith("lines (order_id) has no index, so deleting 3 row(s) of orders took ")


@without_own_indexes
def test_a_look_that_fails_is_no_failure_of_the_cleanup(database, monkeypatch):
    engine = database.engine()
    users, _orders = family(engine)
    tracker = tracked(engine, (users, [{"id": 1}]))

    def refuse(*_given):
        raise sa.exc.OperationalError("SELECT", {}, Exception("no right to look"))

    monkeypatch.setattr("tidyrows.cleanup.diagnosis.missing_indexes", refuse)
    report = CleanupManager(tracker, retry=policy()).cleanup()
    assert report.advice == ()
    assert report.total_deleted == 1


@pytest.mark.parametrize(
    ("seconds", "rows", "slow"),
    [(0.4, 1, False), (0.6, 1, True), (0.6, 100_000, False), (22.0, 1000, True), (0.0, 0, False)],
)
def test_slow_is_slow_in_all_and_for_each_row(seconds, rows, slow):
    assert is_slow(seconds, rows) is slow


# --- which indexes count


@without_own_indexes
def test_an_index_whose_first_columns_are_the_keys_own_counts(database):
    engine = database.engine()
    users, orders = family(engine, sa.Column("day", sa.Integer))
    assert len(missing(engine, users)) == 1
    sa.Index("ix_behind", orders.c.day, orders.c.user_id).create(engine)
    assert len(missing(engine, users)) == 1
    sa.Index("ix_leading", orders.c.user_id, orders.c.day).create(engine)
    assert missing(engine, users) == []


@without_own_indexes
@pytest.mark.parametrize("constraint", ["primary key", "unique", "unique index"])
def test_a_primary_key_and_a_unique_constraint_count(database, constraint):
    engine = database.engine()
    metadata = sa.MetaData()
    users = table(metadata, "users")
    key = constraint == "primary key"
    user_id = reference("user_id", "users.id", primary_key=key, unique=constraint == "unique")
    things = sa.Table(
        "profiles", metadata, user_id, sa.Column("n", sa.Integer, primary_key=not key)
    )
    if constraint == "unique index":
        sa.Index("ux", things.c.user_id, unique=True)
    metadata.create_all(engine)
    assert missing(engine, users) == []


@without_own_indexes
def test_an_index_in_part_or_on_an_expression_does_not_count(database):
    engine = database.engine()
    users, orders = family(engine)
    some = orders.c.user_id > 5
    sa.Index("ix_part", orders.c.user_id, postgresql_where=some, sqlite_where=some).create(engine)
    sa.Index("ix_made", sa.text("(user_id + 0)"), _table=orders).create(engine)
    assert len(missing(engine, users)) == 1


@on("postgresql+psycopg")
def test_an_index_that_was_never_finished_does_not_count(database):
    """What a failed CREATE INDEX CONCURRENTLY leaves; the statement does not take its name."""
    engine = database.engine()
    users, orders = family(engine)
    insert(engine, (users, [{"id": 1}]), (orders, [{"id": n, "user_id": 1} for n in (1, 2)]))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        sql = "CREATE UNIQUE INDEX CONCURRENTLY ix_orders_user_id ON orders (user_id)"
        with pytest.raises(sa.exc.IntegrityError):
            connection.exec_driver_sql(sql)
    assert missing(engine, users) == ["CREATE INDEX ix_orders_user_id_2 ON public.orders (user_id)"]


@on("postgresql+psycopg")
def test_an_index_that_does_not_find_equal_values_does_not_count(database):
    engine = database.engine()
    users, _orders = family(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE INDEX ix_b ON orders USING brin (user_id)")
    assert len(missing(engine, users)) == 1
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE INDEX ix_h ON orders USING hash (user_id)")
    assert missing(engine, users) == []


@without_own_indexes
def test_the_columns_of_a_composite_key_count_in_any_order(database):
    engine = database.engine()
    metadata = sa.MetaData()
    a, b = (sa.Column(n, sa.Integer, unique=False) for n in "ab")
    parents = table(metadata, "parents", a, b, sa.UniqueConstraint("a", "b"))
    children = table(
        metadata,
        "children",
        sa.Column("x", sa.Integer),
        sa.Column("y", sa.Integer),
        sa.ForeignKeyConstraint(["x", "y"], ["parents.a", "parents.b"]),
        sa.Index("ix_x", "x"),
    )
    metadata.create_all(engine)
    (statement,) = missing(engine, parents)
    assert statement.endswith("(x, y)")
    sa.Index("ix_yx", children.c.y, children.c.x).create(engine)
    assert missing(engine, parents) == []


@without_own_indexes
def test_awkward_names_are_quoted_and_long_ones_cut(database):
    engine = database.engine()
    metadata = sa.MetaData()
    users = table(metadata, "users")
    table(metadata, "Or der", reference("select", "users.id"))
    table(metadata, "o" * 40, reference("c" * 40, "users.id"))
    metadata.create_all(engine)
    statements = missing(engine, users)
    assert len(statements) == 2
    assert any('"Or der" ("select")' in each for each in statements)
    for statement in statements:
        with engine.begin() as connection:
            connection.exec_driver_sql(statement)
    assert missing(engine, users) == []


@without_own_indexes
def test_two_keys_of_the_same_columns_need_one_index(database):
    engine = database.engine()
    metadata = sa.MetaData()
    users = table(metadata, "users")
    twice = [sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=n) for n in ("fk1", "fk2")]
    table(metadata, "orders", sa.Column("user_id", sa.Integer), *twice)
    metadata.create_all(engine)
    assert len(missing(engine, users)) == 1
