"""The plan: readable, a diagram, harmless, and what really runs."""

from __future__ import annotations

import sqlalchemy as sa

from harness.blocks import insert, reference, table, tracked
from harness.bystanders import snapshot
from harness.targets import on
from tidyrows import CleanupManager, Plan, ResourceTracker

enforced = on("sqlite", "postgresql+psycopg", "mysql+pymysql")


def office(engine):
    """Four tables: a diamond, and employees who have managers."""
    metadata = sa.MetaData()
    org = table(metadata, "orgs")
    site = table(metadata, "sites", reference("org_id", "orgs.id"))
    employee = table(
        metadata,
        "employees",
        reference("org_id", "orgs.id"),
        sa.Column("site_id", sa.ForeignKey("sites.id")),
        sa.Column("manager_id", sa.ForeignKey("employees.id")),
    )
    metadata.create_all(engine)
    return tracked(
        engine,
        (org, [{"id": 1}, {"id": 2}]),
        (site, [{"id": 1, "org_id": 1}]),
        (employee, [{"id": 1, "org_id": 1}, {"id": 2, "org_id": 1, "manager_id": 1}]),
    )


def test_it_reads_as_text(sqlite_engine):
    assert str(CleanupManager(office(sqlite_engine)).plan()) == (
        "1. main.employees: 2 row(s), before main.orgs (org_id), main.sites (site_id)"
        "; references itself\n"
        "2. main.sites: 1 row(s), before main.orgs (org_id)\n"
        "3. main.orgs: 2 row(s)"
    )


DRAWN = """\
flowchart TD
    t0["1. main.employees: 2 row(s)"]
    t1["2. main.sites: 1 row(s)"]
    t2["3. main.orgs: 2 row(s)"]
    t0 -->|"manager_id"| t0
    t0 -->|"org_id"| t2
    t0 -->|"site_id"| t1
    t1 -->|"org_id"| t2"""


def test_it_draws_as_mermaid(sqlite_engine):
    assert CleanupManager(office(sqlite_engine)).plan().to_mermaid() == DRAWN


def test_a_diagram_survives_names_with_quotes(sqlite_engine):
    metadata = sa.MetaData()
    odd = table(metadata, 'the "odd" #1')
    metadata.create_all(sqlite_engine)
    drawn = CleanupManager(tracked(sqlite_engine, (odd, [{"id": 1}]))).plan().to_mermaid()
    assert drawn.splitlines()[1] == '    t0["1. main.the #quot;odd#quot; #35;1: 1 row(s)"]'


def test_a_cycle_of_tables_is_named(sqlite_engine):
    metadata = sa.MetaData()
    a = table(metadata, "a", reference("b_id", "b.id", nullable=True))
    b = table(metadata, "b", reference("a_id", "a.id"))
    with sqlite_engine.begin() as connection:
        a.create(connection)
        b.create(connection)
    plan = CleanupManager(
        tracked(sqlite_engine, (a, [{"id": 1}]), (b, [{"id": 1, "a_id": 1}]))
    ).plan()
    assert str(plan) == (
        "1. main.a: 1 row(s), before main.b (b_id); cycle of main.a, main.b\n"
        "1. main.b: 1 row(s), before main.a (a_id); cycle of main.a, main.b"
    )


def test_nothing_is_said_where_there_is_nothing(sqlite_engine):
    plan = CleanupManager(ResourceTracker(sqlite_engine)).plan()
    assert str(plan) == "Nothing to delete."
    assert plan.to_mermaid() == "flowchart TD"
    assert (plan.total_rows, plan.foreign_keys, plan) == (0, (), Plan())


@enforced
def test_planning_changes_nothing(engine):
    tracker = office(engine)
    before = snapshot(engine)
    manager = CleanupManager(tracker)
    assert manager.plan() == manager.plan()
    assert manager.plan().total_rows == len(tracker) == 5
    assert manager.last_report is None
    assert snapshot(engine) == before


@enforced
def test_it_is_what_runs(engine):
    """The statements that are really sent, table by table, in the plan's order."""
    tracker = office(engine)
    manager = CleanupManager(tracker)
    plan = manager.plan()
    seen = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(connection, cursor, statement, *_):
        if "DELETE" in statement:
            seen.extend(name for name in ("employees", "sites", "orgs") if name in statement)

    report = manager.cleanup()
    planned = [batch.table for step in plan.steps for batch in step.batches]
    assert list(dict.fromkeys(seen)) == [each.name.name for each in planned]
    assert list(report.deleted) == [each.name for each in planned]
    assert report.total_deleted == plan.total_rows
    assert not any(snapshot(engine).values())


@enforced
def test_keys_are_in_order_however_they_came(engine):
    metadata = sa.MetaData()
    parent = table(metadata, "parents")
    metadata.create_all(engine)
    tracker = tracked(engine, (parent, [{"id": n} for n in (5, 3, 9, 1)]))
    (step,) = CleanupManager(tracker).plan().steps
    assert list(step.batches[0].keys) == [1, 3, 5, 9]


def test_the_schema_is_read_once(sqlite_engine):
    tracker = office(sqlite_engine)
    manager = CleanupManager(tracker)
    manager.plan()
    seen = []

    @sa.event.listens_for(sqlite_engine, "before_cursor_execute")
    def note(connection, cursor, statement, *_):
        seen.append(statement)

    manager.plan()
    assert not seen
    other = ResourceTracker(sqlite_engine)
    with CleanupManager(other):
        metadata = sa.MetaData()
        new = table(metadata, "new", reference("org_id", "orgs.id"))
        table(metadata, "orgs")
        new.create(sqlite_engine)
        insert(sqlite_engine, (new, [{"id": 1, "org_id": 2}]))
        other.track_rows(metadata.tables["orgs"], [2])
        plan = CleanupManager(other).plan()
        assert [step.batches[0].table.name.name for step in plan.steps] == ["new", "orgs"]
