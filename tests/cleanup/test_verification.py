"""A DELETE that does nothing, or is not allowed, is found out, named, and harms nothing else."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from harness.blocks import insert, left_over, reference, table, tracked
from harness.bystanders import Bystanders, snapshot
from harness.targets import on
from tidyrows import CleanupManager, ResourceTracker

postgresql = on("postgresql+psycopg", "postgresql+psycopg2")
sqlite = on("sqlite", "sqlite-nofk")
mysql = on("mysql+pymysql", "mysql+mysqldb")
KEPT = 3


@pytest.fixture
def house(engine):
    """A parent and its children; number 3 is the one that will not go."""
    metadata = sa.MetaData()
    parent = table(metadata, "parents")
    child = table(metadata, "children", reference("parent_id", "parents.id"))
    other = table(metadata, "others")
    metadata.create_all(engine)
    insert(engine, (parent, [{"id": 1}]), (child, [{"id": 1, "parent_id": 1}]))
    return parent, child, other


def rows(parent, child, other):
    numbers = range(2, 7)
    return (
        (parent, [{"id": n} for n in numbers]),
        (child, [{"id": n, "parent_id": n} for n in numbers]),
        (other, [{"id": n} for n in numbers]),
    )


def only_one_is_left(engine, tracker, left, bystanders, *, parent_stays=True):
    """The row, and the parent that it holds; each with a cause; all others are gone."""
    expected = {("children", KEPT), *([("parents", KEPT)] if parent_stays else [])}
    assert set(left) == expected
    assert all(left.values())
    assert len(tracker) == len(expected)
    now = snapshot(engine)
    gained = Bystanders(engine).expected.added_since(bystanders.expected)
    assert sum(map(len, gained.values())) == len(expected), now


def trigger_body(action):
    return f"BEGIN IF OLD.id = {KEPT} THEN {action}; END IF; RETURN OLD; END"


@postgresql
@pytest.mark.parametrize(
    ("action", "cause"),
    [
        ("RETURN NULL", "removed nothing and raised nothing"),
        ("RAISE EXCEPTION 'the audit forbids it'", "the audit forbids it"),
    ],
    ids=["swallows", "raises"],
)
def test_a_before_delete_trigger_on_postgresql(engine, house, action, cause):
    bystanders = Bystanders(engine)
    tracker = tracked(engine, *rows(*house))
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION guard() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ {trigger_body(action)} $$"
        )
        connection.exec_driver_sql(
            "CREATE TRIGGER guard BEFORE DELETE ON children FOR EACH ROW EXECUTE FUNCTION guard()"
        )
    manager = CleanupManager(tracker)
    left = left_over(manager)
    only_one_is_left(engine, tracker, left, bystanders)
    assert cause in left["children", KEPT]
    assert "children" in left["parents", KEPT]
    assert manager.report.total_deleted == 13
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER guard ON children")
    assert manager.cleanup().total_deleted == 2
    bystanders.assert_untouched()


@postgresql
def test_a_rule_on_postgresql(engine, house):
    bystanders = Bystanders(engine)
    tracker = tracked(engine, *rows(*house))
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE RULE keep AS ON DELETE TO children WHERE old.id = {KEPT} DO INSTEAD NOTHING"
        )
    left = left_over(CleanupManager(tracker))
    only_one_is_left(engine, tracker, left, bystanders)
    assert "removed nothing and raised nothing" in left["children", KEPT]


@pytest.fixture
def restricted(homes):
    """A role without special rights, and what undoes it."""
    name = f"tidyrows_{id(object()):x}"
    admin = sa.create_engine(homes.server("postgresql").url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {name} LOGIN")
    yield name
    with admin.connect() as connection:
        connection.exec_driver_sql(f"DROP ROLE {name}")
    admin.dispose()


@pytest.fixture
def as_role(database, restricted):
    """An engine that logs in as that role, with rights on everything in the schema."""
    owner = database.engine()
    engine = sa.create_engine(database.url.set(username=restricted))

    def grant():
        with owner.begin() as connection:
            connection.exec_driver_sql(f"GRANT ALL ON SCHEMA public TO {restricted}")
            connection.exec_driver_sql(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {restricted}")
        return engine

    yield grant
    engine.dispose()
    with owner.begin() as connection:
        connection.exec_driver_sql(f"DROP OWNED BY {restricted}")


@on("postgresql+psycopg")
@pytest.mark.parametrize("by", ["role", "session variable"])
def test_row_level_security_hides_no_leftover(database, engine, house, as_role, by):
    """DELETE takes nothing and SELECT sees nothing, yet the row is there."""
    parent, child, other = house
    bystanders = Bystanders(engine)
    theirs = as_role()
    tracker = ResourceTracker(theirs)
    tracker.start()
    with theirs.begin() as connection:
        if by == "session variable":
            connection.exec_driver_sql("SELECT set_config('app.tenant', '7', true)")
        for each, values in rows(parent, child, other):
            connection.execute(sa.insert(each), values)
    tracker.stop()
    condition = {
        "role": "current_user = 'somebody'",
        "session variable": "current_setting('app.tenant', true) = '7'",
    }[by]
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE others ENABLE ROW LEVEL SECURITY")
        connection.exec_driver_sql(f"CREATE POLICY p ON others USING ({condition})")
    left = left_over(CleanupManager(tracker))
    assert set(left) == {("others", n) for n in range(2, 7)}
    assert all("row-level security" in cause for cause in left.values()), left
    assert len(snapshot(engine)["public.others"]) == 5
    assert len(snapshot(engine)["public.children"]) == 1
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE others DISABLE ROW LEVEL SECURITY")
    assert CleanupManager(tracker).cleanup().total_deleted == 5
    bystanders.assert_untouched()


@on("postgresql+psycopg")
@pytest.mark.parametrize("right", ["DELETE", "DELETE, SELECT"])
def test_permission_denied_on_postgresql(engine, house, as_role, restricted, right):
    parent, child, other = house
    bystanders = Bystanders(engine)
    theirs = as_role()
    tracker = tracked(theirs, *rows(parent, child, other))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"REVOKE {right} ON others FROM {restricted}")
    left = left_over(CleanupManager(tracker))
    assert set(left) == {("others", n) for n in range(2, 7)}
    assert all("permission denied" in cause for cause in left.values())
    grant = f"GRANT SELECT, UPDATE, DELETE ON public.others TO {restricted}"
    assert all(grant in cause for cause in left.values()), left
    assert len(tracker) == 5
    with engine.begin() as connection:
        connection.exec_driver_sql(grant)
    assert CleanupManager(tracker).cleanup().total_deleted == 5
    bystanders.assert_untouched()


@on("mysql+pymysql")
def test_permission_denied_on_mariadb(database, engine, house):
    bystanders = Bystanders(engine)
    user = f"tidyrows_{id(object()):x}"
    here = database.url.database
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE USER '{user}'@'%%'")
        connection.exec_driver_sql(f"GRANT SELECT, INSERT ON {here}.* TO '{user}'@'%%'")
        for name in ("parents", "children"):
            connection.exec_driver_sql(f"GRANT DELETE ON {here}.{name} TO '{user}'@'%%'")
    theirs = sa.create_engine(database.url.set(username=user, password=""))
    try:
        tracker = tracked(theirs, *rows(*house))
        left = left_over(CleanupManager(tracker))
        assert set(left) == {("others", n) for n in range(2, 7)}
        assert all("command denied" in cause for cause in left.values())
        grant = f"GRANT SELECT, UPDATE, DELETE ON {here}.others TO '{user}'@'%'"
        assert all(grant in cause.replace("`", "") for cause in left.values()), left
        with engine.begin() as connection:
            connection.exec_driver_sql(grant.replace("%", "%%"))
        theirs.dispose()
        assert CleanupManager(tracker).cleanup().total_deleted == 5
    finally:
        theirs.dispose()
        with engine.begin() as connection:
            connection.exec_driver_sql(f"DROP USER '{user}'@'%%'")
    bystanders.assert_untouched()


@sqlite
@pytest.mark.parametrize(
    ("action", "cause"),
    [
        ("RAISE(IGNORE)", "removed nothing and raised nothing"),
        ("RAISE(ABORT, 'the audit forbids it')", "the audit forbids it"),
        ("RAISE(FAIL, 'the audit forbids it')", "the audit forbids it"),
        ("RAISE(ROLLBACK, 'the audit forbids it')", "the audit forbids it"),
    ],
    ids=["ignore", "abort", "fail", "rollback"],
)
def test_a_trigger_on_sqlite(engine, house, action, cause):
    bystanders = Bystanders(engine)
    tracker = tracked(engine, *rows(*house))
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE TRIGGER guard BEFORE DELETE ON children WHEN OLD.id = {KEPT}"
            f" BEGIN SELECT {action}; END"
        )
    left = left_over(CleanupManager(tracker))
    only_one_is_left(engine, tracker, left, bystanders)
    assert cause in left["children", KEPT]
    assert "main.children(3)" in left["parents", KEPT]


@mysql
def test_a_trigger_on_mariadb(engine, house):
    bystanders = Bystanders(engine)
    tracker = tracked(engine, *rows(*house))
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER guard BEFORE DELETE ON children FOR EACH ROW"
            f" IF OLD.id = {KEPT} THEN SIGNAL SQLSTATE '45000'"
            " SET MESSAGE_TEXT = 'the audit forbids it'; END IF"
        )
    left = left_over(CleanupManager(tracker))
    only_one_is_left(engine, tracker, left, bystanders)
    assert "the audit forbids it" in left["children", KEPT]


@postgresql
def test_a_trigger_that_softly_deletes_instead_is_a_leftover(engine):
    """Many applications do this; the row is still there, and changed by their own trigger."""
    metadata = sa.MetaData()
    soft = table(metadata, "soft", sa.Column("gone", sa.Boolean, server_default=sa.false()))
    metadata.create_all(engine)
    tracker = tracked(engine, (soft, [{"id": 1}, {"id": 2}]))
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION softly() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN UPDATE soft SET gone = true WHERE id = OLD.id; RETURN NULL; END $$"
        )
        connection.exec_driver_sql(
            "CREATE TRIGGER softly BEFORE DELETE ON soft FOR EACH ROW EXECUTE FUNCTION softly()"
        )
    assert set(left_over(CleanupManager(tracker))) == {("soft", 1), ("soft", 2)}


def test_a_key_that_is_taken_again_after_the_delete_is_let_go(database, engine, house):
    """Somebody inserts the same natural key between our COMMIT and our second look."""
    parent, _child, _other = house
    outside = database.engine()
    tracker = tracked(engine, (parent, [{"id": 2}, {"id": 3}]))
    manager = CleanupManager(tracker)
    manager.plan()  # reads the schema, so that the cleanup's first SELECT is the second look
    taken = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def meanwhile(connection, cursor, statement, *_):
        if statement.startswith("SELECT") and "parents" in statement and not taken:
            taken.append(statement)
            insert(outside, (parent, [{"id": 3}]))

    report = manager.cleanup()
    assert taken
    assert list(report.reappeared.values()) == [1]
    assert "parents 1 there again" in str(report)
    assert len(tracker) == 0
    assert manager.cleanup().total_deleted == 0
    (parents,) = (v for k, v in snapshot(engine).items() if k.endswith(".parents"))
    assert parents == [(1,), (3,)]


def test_without_verification_a_cleanup_that_counted_every_row_does_not_look(engine, house):
    bystanders = Bystanders(engine)
    tracker = tracked(engine, *rows(*house))
    manager = CleanupManager(tracker, verify=False)
    manager.plan()
    seen = statements(engine)
    assert manager.cleanup().total_deleted == 15
    assert not [each for each in seen if each.startswith("SELECT") and "parents" in each]
    bystanders.assert_untouched()


@sqlite
def test_without_verification_a_row_that_was_not_counted_is_still_found(engine, house):
    tracker = tracked(engine, *rows(*house))
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE TRIGGER guard BEFORE DELETE ON others WHEN OLD.id = {KEPT}"
            " BEGIN SELECT RAISE(IGNORE); END"
        )
    assert set(left_over(CleanupManager(tracker, verify=False))) == {("others", KEPT)}


def statements(engine):
    seen = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(connection, cursor, statement, *_):
        seen.append(statement)

    return seen


def test_rows_that_somebody_deleted_before_are_counted_as_gone(database, engine, house):
    _parent, _child, other = house
    bystanders = Bystanders(engine)
    tracker = tracked(engine, *rows(*house))
    with database.engine().begin() as outside:
        outside.execute(sa.delete(other).where(other.c.id.in_([2, 3])))
    report = CleanupManager(tracker).cleanup()
    assert report.total_deleted == 13
    assert list(report.already_gone.values()) == [2]
    assert "others 2 already gone" in str(report)
    bystanders.assert_untouched()
