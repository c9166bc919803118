"""What it costs to look for rows that the application made.

Run: python -m pytest tests/benchmarks/test_dependents.py -m benchmark -s
"""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from benchmarks.measure import paired, say, seconds
from tidyrows import CleanupManager, ResourceTracker

FOREIGN_KEYS = 60
PARENTS, CHILDREN = 1_000, 5


def star(action: str | None) -> tuple[sa.MetaData, sa.Table]:
    """A table that sixty others reference, by a key each, with an index."""
    metadata = sa.MetaData()
    users = sa.Table(
        "users",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("name", sa.String(40)),
    )
    for number in range(FOREIGN_KEYS):
        sa.Table(
            f"child_{number:02}",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("user_id", sa.ForeignKey("users.id", ondelete=action), index=True),
        )
    return metadata, users


@pytest.mark.benchmark
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize("action", [None, "CASCADE"], ids=["no action", "cascade"])
def test_one_user_whom_sixty_keys_could_reference(database, action, verify):
    engine = database.engine()
    metadata, users = star(action)
    metadata.create_all(engine)

    def insert():
        with engine.begin() as connection:
            connection.execute(sa.insert(users), [{"id": 1, "name": "ours"}])

    def bare():
        insert()

        def work():
            with engine.begin() as connection:
                connection.exec_driver_sql("DELETE FROM users WHERE id = 1")

        return seconds(work)

    def tidy():
        insert()
        tracker = ResourceTracker(engine)
        tracker.track_rows(users, [1])
        cleanup = CleanupManager(tracker, verify=verify)
        taken = seconds(cleanup.cleanup)
        assert cleanup.report.total_deleted == 1
        return taken

    ours, theirs, ratio = paired(tidy, bare, 60)
    goal = f"at most 3x and 1 ms more: {theirs * 3e3 + 1:.3f} ms"
    word = "with" if verify else "without"
    say(f"{database.target}, 60 keys {action}, {word} verification", ours, theirs, ratio, goal)


@pytest.mark.benchmark
@pytest.mark.parametrize("count", [1, 20, 1_000])
def test_a_select_for_each_key_against_one_for_all(database, count):
    """By which a dialect's ``probed_together`` is chosen."""
    engine = database.engine()
    metadata, users = star("CASCADE")
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(users), [{"id": n, "name": "u"} for n in range(count)])
    from tidyrows.cleanup.connection import Database  # noqa: PLC0415
    from tidyrows.cleanup.schema_view import schema_of  # noqa: PLC0415

    where = Database(engine, lock_timeout=5, statement_timeout=60)
    tracker = ResourceTracker(engine)
    tracker.track_rows(users, list(range(count)))
    view = schema_of(where, [held.table for held in tracker.store.snapshot()])
    keys = list(range(count))

    def asked(together):
        with where.writing() as connection:
            tables = [
                (view.reference(connection, key), keys)
                for key in view.incoming((engine.dialect.default_schema_name, "users"))
            ]
            where.dialect.probed_together = together
            try:
                return seconds(lambda: where.dialect.tables_with_rows(connection, tables))
            finally:
                del where.dialect.probed_together

    medians = paired(lambda: asked(count), lambda: asked(0), 30)
    say(f"{database.target}, {count} keys, one SELECT for all against one for each", *medians, "-")


@pytest.mark.benchmark
def test_children_and_grandchildren_that_nobody_tracked(database):
    """Against somebody who knows the schema and writes three statements."""
    engine = database.engine()
    metadata = sa.MetaData()
    levels = []
    for name, parent in (("parents", None), ("children", "parents"), ("grandchildren", "children")):
        columns = [sa.Column("id", sa.Integer, primary_key=True, autoincrement=False)]
        if parent is not None:
            columns.append(
                sa.Column("parent_id", sa.ForeignKey(f"{parent}.id"), nullable=False, index=True)
            )
        levels.append(sa.Table(name, metadata, *columns))
    metadata.create_all(engine)
    parents, children, grandchildren = levels
    count = PARENTS * CHILDREN

    def insert():
        with engine.begin() as connection:
            connection.execute(sa.insert(parents), [{"id": n} for n in range(PARENTS)])
            for table, width in ((children, CHILDREN), (grandchildren, 1)):
                connection.execute(
                    sa.insert(table), [{"id": n, "parent_id": n // width} for n in range(count)]
                )

    def bare():
        insert()
        mine = f"BETWEEN 0 AND {PARENTS - 1}"
        below = f"(SELECT id FROM children WHERE parent_id {mine})"

        def work():
            with engine.begin() as connection:
                connection.exec_driver_sql(f"DELETE FROM grandchildren WHERE parent_id IN {below}")
                connection.exec_driver_sql(f"DELETE FROM children WHERE parent_id {mine}")
                connection.exec_driver_sql(f"DELETE FROM parents WHERE id {mine}")

        return seconds(work)

    def tidy():
        insert()
        tracker = ResourceTracker(engine)
        tracker.track_rows(parents, list(range(PARENTS)))
        cleanup = CleanupManager(tracker)
        taken = seconds(cleanup.cleanup)
        assert sum(map(len, cleanup.report.dependents.values())) == 2 * count
        return taken

    medians = paired(tidy, bare, 9)
    what = f"{PARENTS} parents, {2 * count} untracked below them"
    say(f"{database.target}, {what}", *medians, "at most 2x")
