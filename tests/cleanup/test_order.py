"""Children go before their parents, by what the database has, whatever the models know."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from harness.blocks import insert, reference, table, tracked
from harness.bystanders import Bystanders, snapshot
from harness.targets import WITHOUT_FOREIGN_KEYS, on
from tidyrows import CleanupManager, ResourceTracker

everywhere = on("sqlite", WITHOUT_FOREIGN_KEYS, "postgresql+psycopg", "mysql+pymysql")


def numbers(*ids, **values):
    return [{"id": number, **values} for number in ids]


@everywhere
def test_a_foreign_key_that_the_models_do_not_know_orders_the_deletes(engine):
    real = sa.MetaData()
    a = table(real, "a_parent")
    b = table(real, "b_child", reference("a_id", "a_parent.id"))
    c = table(real, "c_grandchild", reference("b_id", "b_child.id"))
    real.create_all(engine)
    models = sa.MetaData()
    plain = [
        table(models, each.name, *(sa.Column(n, sa.Integer) for n in columns))
        for each, columns in ((a, ()), (b, ("a_id",)), (c, ("b_id",)))
    ]
    insert(engine, (a, numbers(1)), (b, numbers(1, a_id=1)), (c, numbers(1, b_id=1)))
    bystanders = Bystanders(engine)
    tracker = tracked(
        engine,
        (plain[0], numbers(2, 3)),
        (plain[1], numbers(2, 3, a_id=2)),
        (plain[2], numbers(2, 3, b_id=3)),
    )
    manager = CleanupManager(tracker)
    assert [step.batches[0].table.name.name for step in manager.plan().steps] == [
        "c_grandchild",
        "b_child",
        "a_parent",
    ]
    assert manager.cleanup().total_deleted == 6
    bystanders.assert_untouched()


@everywhere
def test_a_foreign_key_column_that_the_model_does_not_have_orders_the_deletes(engine):
    real = sa.MetaData()
    a = table(real, "a_parent")
    b = table(real, "b_child", reference("a_id", "a_parent.id", server_default=sa.text("7")))
    real.create_all(engine)
    models = sa.MetaData()
    parent, child = table(models, "a_parent"), table(models, "b_child")
    insert(engine, (a, numbers(1)), (b, numbers(1, a_id=1)))
    bystanders = Bystanders(engine)
    tracker = tracked(engine, (parent, numbers(7)), (child, numbers(7)))
    CleanupManager(tracker).cleanup()
    bystanders.assert_untouched()


@everywhere
def test_an_order_that_runs_through_an_untracked_table_is_kept(engine):
    """From child to link to parent: the parent's delete cascades to the link the child needs."""
    metadata = sa.MetaData()
    parent = table(metadata, "a_parent")
    link = table(metadata, "m_link", reference("a_id", "a_parent.id", ondelete="CASCADE"))
    child = table(metadata, "z_child", reference("link_id", "m_link.id"))
    metadata.create_all(engine)
    insert(engine, (parent, numbers(1)), (link, numbers(1, a_id=1)), (child, numbers(1, link_id=1)))
    bystanders = Bystanders(engine)
    outside = sa.create_engine(engine.url)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        insert(engine, (parent, numbers(2)))
        insert(outside, (link, numbers(2, a_id=2)))
        insert(engine, (child, numbers(2, link_id=2)))
    outside.dispose()
    assert cleanup.report.total_deleted == 2
    if engine.dialect.name != "sqlite" or foreign_keys_are_on(engine):
        bystanders.assert_untouched()  # CASCADE took the link


def foreign_keys_are_on(engine):
    with engine.connect() as connection:
        return bool(connection.exec_driver_sql("PRAGMA foreign_keys").scalar())


def test_children_in_another_schema_go_first(database):
    if database.backend == "sqlite":
        pytest.skip("a foreign key of SQLite stays within its file")
    other = database.extra_schema()
    engine = database.engine()
    metadata = sa.MetaData()
    a = table(metadata, "a_parent")
    b = table(metadata, "b_child", sa.Column("a_id", sa.Integer, nullable=False), schema=other)
    metadata.create_all(engine)
    default = engine.dialect.default_schema_name
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"ALTER TABLE {other}.b_child ADD CONSTRAINT across FOREIGN KEY (a_id)"
            f" REFERENCES {default}.a_parent (id)"
        )
    insert(engine, (a, numbers(1)), (b, numbers(1, a_id=1)))
    bystanders = Bystanders(engine)
    tracker = tracked(engine, (a, numbers(2)), (b, numbers(2, a_id=2)))
    manager = CleanupManager(tracker)
    assert [str(step.batches[0].table.name) for step in manager.plan().steps] == [
        f"{other}.b_child",
        f"{default}.a_parent",
    ]
    manager.cleanup()
    bystanders.assert_untouched()


def test_an_order_that_leaves_the_tracked_schemas_and_comes_back_is_kept(database):
    if database.backend == "sqlite":
        pytest.skip("a foreign key of SQLite stays within its file")
    other = database.extra_schema()
    engine = database.engine()
    metadata = sa.MetaData()
    with engine.begin() as connection:
        # A key of its own gives the parent a place in the graph, before z_child by its name.
        connection.exec_driver_sql("CREATE TABLE a_root (id INTEGER PRIMARY KEY)")
        connection.exec_driver_sql(
            "CREATE TABLE a_parent (id INTEGER PRIMARY KEY, root_id INTEGER,"
            " FOREIGN KEY (root_id) REFERENCES a_root (id))"
        )
        default = sa.inspect(connection).default_schema_name
        connection.exec_driver_sql(
            f"CREATE TABLE {other}.link (id INTEGER PRIMARY KEY, a_id INTEGER NOT NULL,"
            f" FOREIGN KEY (a_id) REFERENCES {default}.a_parent (id) ON DELETE CASCADE)"
        )
        connection.exec_driver_sql(
            "CREATE TABLE z_child (id INTEGER PRIMARY KEY, link_id INTEGER NOT NULL,"
            f" FOREIGN KEY (link_id) REFERENCES {other}.link (id))"
        )
    a, z = table(metadata, "a_parent"), table(metadata, "z_child", sa.Column("link_id", sa.Integer))
    bystanders = Bystanders(engine)
    outside = sa.create_engine(engine.url)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker):
        insert(engine, (a, numbers(2)))
        with outside.begin() as connection:
            connection.exec_driver_sql(f"INSERT INTO {other}.link VALUES (2, 2)")
        insert(engine, (z, numbers(2, link_id=2)))
    outside.dispose()
    bystanders.assert_untouched()


def test_tables_of_one_name_in_two_schemas_are_two_tables(database):
    other = database.extra_schema()
    engine = database.engine()
    metadata = sa.MetaData()
    here, there = table(metadata, "things"), table(metadata, "things", schema=other)
    metadata.create_all(engine)
    insert(engine, (here, numbers(1)), (there, numbers(2)))
    bystanders = Bystanders(engine, outside=database.engine())
    tracker = tracked(engine, (here, numbers(2, 3)), (there, numbers(1)))
    report = CleanupManager(tracker).cleanup()
    assert sorted(report.deleted.values()) == [1, 2]
    bystanders.assert_untouched()


def test_tables_that_another_process_has_made_since_the_last_cleanup_are_in_order(database):
    """The graph is cached; nobody here saw the DDL, and the models know no foreign key."""
    engine = database.engine()
    metadata = sa.MetaData()
    early = table(metadata, "early")
    early.create(engine)
    CleanupManager(tracked(engine, (early, numbers(1)))).cleanup()
    real = sa.MetaData()
    table(real, "a_parent")
    table(real, "b_child", reference("a_id", "a_parent.id"))
    real.create_all(database.engine())
    parent = table(metadata, "a_parent")
    child = table(metadata, "b_child", sa.Column("a_id", sa.Integer))
    bystanders = Bystanders(engine)
    report = CleanupManager(
        tracked(engine, (parent, numbers(1)), (child, numbers(1, a_id=1)))
    ).cleanup()
    assert report.total_deleted == 2
    bystanders.assert_untouched()


def test_a_foreign_key_that_another_process_has_added_meanwhile_is_discovered(database):
    if database.backend == "sqlite":
        pytest.skip("SQLite cannot add a foreign key to a table")
    engine = database.engine()
    metadata = sa.MetaData()
    parent = table(metadata, "a_parent")
    child = table(metadata, "b_child", sa.Column("a_id", sa.Integer))
    metadata.create_all(engine)
    batches = (parent, numbers(1)), (child, numbers(1, a_id=1))
    bystanders = Bystanders(engine)
    assert CleanupManager(tracked(engine, *batches)).cleanup().total_deleted == 2
    with database.engine().begin() as connection:
        connection.exec_driver_sql(
            "ALTER TABLE b_child ADD CONSTRAINT late FOREIGN KEY (a_id) REFERENCES a_parent (id)"
        )
    assert CleanupManager(tracked(engine, *batches)).cleanup().total_deleted == 2
    bystanders.assert_untouched()


@everywhere
def test_a_table_that_was_dropped_meanwhile_has_no_rows_left(database):
    engine = database.engine()
    metadata = sa.MetaData()
    kept = table(metadata, "kept")
    dropped = table(metadata, "dropped", reference("kept_id", "kept.id"))
    metadata.create_all(engine)
    insert(engine, (kept, numbers(1)))
    tracker = tracked(engine, (kept, numbers(2)), (dropped, numbers(2, kept_id=2)))
    with database.engine().begin() as connection:
        connection.exec_driver_sql("DROP TABLE dropped")
    bystanders = snapshot(engine)
    report = CleanupManager(tracker).cleanup()
    assert {name.name: count for name, count in report.deleted.items()} == {"kept": 1}
    assert {name.name: count for name, count in report.already_gone.items()} == {"dropped": 1}
    assert len(tracker) == 0
    assert sum(map(len, snapshot(engine).values())) == sum(map(len, bystanders.values())) - 1


def test_an_index_of_an_expression_gives_no_warning_of_sqlalchemys(sqlite_engine):
    """As an error it would keep the rows: SQLAlchemy warns of what it cannot reflect."""
    metadata = sa.MetaData()
    kept = table(metadata, "kept")
    metadata.create_all(sqlite_engine)
    with sqlite_engine.begin() as connection:
        connection.exec_driver_sql("CREATE UNIQUE INDEX negative ON kept (-id)")
    tracker = tracked(sqlite_engine, (kept, numbers(2)))
    assert CleanupManager(tracker).cleanup().total_deleted == 1


def test_names_that_need_quoting_are_quoted(database):
    engine = database.engine()
    metadata = sa.MetaData()
    odd = [
        sa.Table(
            name,
            metadata,
            sa.Column('the "key" %', sa.Integer, primary_key=True, autoincrement=False),
            sa.Column("select", sa.ForeignKey(f'{parent}.the "key" %')) if parent else None,
        )
        if parent
        else sa.Table(
            name,
            metadata,
            sa.Column('the "key" %', sa.Integer, primary_key=True, autoincrement=False),
        )
        for name, parent in (("Order By", None), ("100% of 'it'", "Order By"))
    ]
    metadata.create_all(engine)
    key = 'the "key" %'
    insert(engine, (odd[0], [{key: 1}]), (odd[1], [{key: 1, "select": 1}]))
    bystanders = Bystanders(engine)
    tracker = tracked(engine, (odd[0], [{key: 2}, {key: 3}]), (odd[1], [{key: 2, "select": 2}]))
    manager = CleanupManager(tracker)
    assert "100% of 'it'" in str(manager.plan())
    manager.cleanup()
    bystanders.assert_untouched()
