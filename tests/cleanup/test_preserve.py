"""Shared rows that a test changes are put back, unless somebody else has changed them too.

The application and other workers are another engine, which no tracker hears: another process.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from harness.blocks import left_over
from harness.bystanders import snapshot
from harness.databases import Database
from harness.models import PublicIdType
from harness.races import Doing, at_statement
from harness.targets import on
from tidyrows import (
    CleanupError,
    CleanupManager,
    CleanupReport,
    NoPrimaryKeyError,
    ResourceTracker,
    TableName,
    UnknownTableError,
    WorkerContext,
)


class Base(DeclarativeBase):
    pass


class Owner(Base):
    __tablename__ = "owners"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(20), unique=True)


class Setting(Base):
    __tablename__ = "settings"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(40), unique=True)
    value: Mapped[str | None] = mapped_column(sa.String(200))
    size: Mapped[Decimal | None] = mapped_column(sa.Numeric(8, 2))
    since: Mapped[dt.datetime | None]
    extra: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON)
    raw: Mapped[bytes | None] = mapped_column(sa.LargeBinary)
    code: Mapped[str | None] = mapped_column(PublicIdType)
    owner_id: Mapped[int | None] = mapped_column(sa.ForeignKey("owners.id"))
    parent_id: Mapped[int | None] = mapped_column(sa.ForeignKey("settings.id"))
    letters: Mapped[int] = mapped_column(sa.Computed("length(name)", persisted=True))


class Shape(Base):
    __tablename__ = "shapes"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(sa.String(20))
    name: Mapped[str] = mapped_column(sa.String(20))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "shape"}  # noqa: RUF012 -- SQLAlchemy's way


class Circle(Shape):
    __tablename__ = "circles"
    id: Mapped[int] = mapped_column(sa.ForeignKey("shapes.id"), primary_key=True)
    radius: Mapped[int] = mapped_column(default=1)
    __mapper_args__ = {"polymorphic_identity": "circle"}  # noqa: RUF012 -- SQLAlchemy's way


pairs = sa.Table(
    "pairs",
    Base.metadata,
    sa.Column("one", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("two", sa.String(10), primary_key=True),
    sa.Column("note", sa.String(20)),
)
keyless = sa.Table("keyless", Base.metadata, sa.Column("word", sa.String(20)))


class Place:
    """Settings that everybody shares, our engine and everybody else's."""

    def __init__(self, database: Database) -> None:
        self.engine = database.engine()
        self.outside = database.engine()
        Base.metadata.create_all(self.outside)
        with Session(self.outside) as session:
            session.add(Owner(id=1, name="everybody"))
            session.flush()
            session.add_all([
                Setting(
                    id=1,
                    name="signup",
                    value="open",
                    size=Decimal("1.50"),
                    since=dt.datetime(2020, 1, 2, 3, 4, 5),
                    extra={"a": [1, None]},
                    raw=b"\x00\xff",
                    code="pub_7",
                    owner_id=1,
                ),
                Setting(id=2, name="theme", value="dark"),
                Setting(id=3, name="child", parent_id=2),
                Circle(id=1, name="round", radius=3),
            ])  # fmt: skip  # one object per line
            session.commit()
        with self.outside.begin() as connection:
            connection.execute(sa.insert(pairs).values(one=0, two="x", note="old"))
        self.before = snapshot(self.outside)
        self.tracker = ResourceTracker(self.engine)
        self.manager = CleanupManager(self.tracker)

    def ours(self, *statements: Any) -> None:
        """What the test itself commits."""
        with self.engine.begin() as connection:
            for statement in statements:
                connection.execute(statement)

    def others(self, *statements: Any) -> None:
        """What nobody here hears."""
        with self.outside.begin() as connection:
            for statement in statements:
                connection.execute(statement)

    def value(self, key: int = 1) -> Any:
        """A setting's value now."""
        with self.outside.connect() as connection:
            return connection.scalar(sa.select(Setting.value).where(Setting.id == key))

    def restored(self) -> dict[str, int]:
        """What the last cleanup has put back, by table."""
        return {name.name: count for name, count in self.manager.report.restored.items()}

    def assert_as_before(self) -> None:
        """The whole database, and nothing is remembered any more."""
        assert snapshot(self.outside) == self.before
        assert not self.tracker.preserved


@pytest.fixture
def place(database: Database) -> Place:
    return Place(database)


def set_value(value: Any, key: int = 1) -> Any:
    return sa.update(Setting).where(Setting.id == key).values(value=value)


def by_session(place: Place) -> None:
    with Session(place.engine) as session:
        setting = session.get_one(Setting, 1)
        setting.value, setting.size, setting.extra = "closed", None, {"b": 2}
        setting.since, setting.raw, setting.code, setting.owner_id = None, b"", "pub_8", None
        session.commit()


def by_raw_sql(place: Place) -> None:
    place.ours(sa.text("UPDATE settings SET value = 'closed' WHERE name = 'signup'"))


def by_bulk_update(place: Place) -> None:
    place.ours(sa.update(Setting).values(value=Setting.name))


def by_the_application(place: Place) -> None:
    place.others(set_value("closed"))


WAYS = [by_session, by_raw_sql, by_bulk_update, by_the_application]


@pytest.mark.parametrize("change", WAYS)
def test_an_updated_row_gets_every_value_back(
    place: Place, change: Callable[[Place], None]
) -> None:
    with place.manager:
        assert place.tracker.preserve(sa.select(Setting)) == 3
        change(place)
        assert snapshot(place.outside) != place.before
    place.assert_as_before()
    assert place.restored()["settings"] >= 1
    assert "settings" in str(place.manager.report)
    assert "restored" in str(place.manager.report)


def test_deleted_rows_are_inserted_again_parents_first(place: Place) -> None:
    """A setting needs its owner, and a child its parent."""
    with place.manager:
        place.tracker.preserve(sa.select(Setting).order_by(Setting.id.desc()))
        place.tracker.preserve(sa.select(Owner))
        place.ours(
            sa.delete(Setting).where(Setting.id == 3), sa.delete(Setting), sa.delete(Owner)
        )  # fmt: skip
    place.assert_as_before()
    assert place.restored() == {"settings": 3, "owners": 1}


def test_rows_that_the_application_deleted_are_inserted_again(place: Place) -> None:
    with place.manager:
        place.tracker.preserve(sa.select(Setting))
        place.others(sa.delete(Setting).where(Setting.id == 3), sa.delete(Setting))
    place.assert_as_before()


def test_every_table_of_an_inheritance_hierarchy_is_put_back(place: Place) -> None:
    with place.manager:
        assert place.tracker.preserve(sa.select(Shape)) == 1
        with Session(place.engine) as session:
            session.delete(session.get_one(Circle, 1))
            session.commit()
    place.assert_as_before()
    assert place.restored() == {"shapes": 1, "circles": 1}


def test_a_composite_key_with_a_zero_is_put_back(place: Place) -> None:
    with place.manager:
        assert place.tracker.preserve(sa.select(pairs)) == 1
        place.ours(sa.delete(pairs))
    place.assert_as_before()


def test_what_was_not_changed_is_not_written(place: Place) -> None:
    written: list[str] = []
    with place.manager:
        place.tracker.preserve(sa.select(Setting))
        place.ours(set_value("closed"), set_value("open"))
        sa.event.listen(
            place.engine, "before_cursor_execute", lambda *args: written.append(args[2])
        )
    place.assert_as_before()
    assert place.restored() == {}
    assert not [sql for sql in written if sql.startswith(("UPDATE", "INSERT"))]


def test_the_first_memory_counts_and_later_rows_are_not_touched(place: Place) -> None:
    with place.manager:
        place.tracker.preserve(sa.select(Setting))
        place.ours(set_value("closed"))
        assert place.tracker.preserve(sa.select(Setting)) == 3
        place.others(sa.insert(Setting).values(id=9, name="later", value="new"))
    place.others(sa.delete(Setting).where(Setting.id == 9))
    place.assert_as_before()


def test_a_rolled_back_change_does_not_count_as_ours(place: Place) -> None:
    with place.manager:
        place.tracker.preserve(sa.select(Setting))
        with place.engine.connect() as connection:
            connection.execute(set_value("never"))
            connection.rollback()
            connection.execute(set_value("ours", 2))
            connection.commit()
        place.others(set_value("by the application"))
    place.assert_as_before()


def test_a_row_of_the_tracker_is_deleted_not_preserved(place: Place) -> None:
    with place.manager:
        place.ours(sa.insert(Setting).values(id=50, name="mine"))
        assert place.tracker.preserve(sa.select(Setting).where(Setting.id == 50)) == 1
        assert not place.tracker.preserved
    place.assert_as_before()


def test_a_row_that_the_test_deleted_and_made_again_is_put_back(place: Place) -> None:
    with place.manager:
        place.tracker.preserve(sa.select(Setting).where(Setting.id == 1))
        place.ours(sa.delete(Setting).where(Setting.id == 1))
        place.ours(sa.insert(Setting).values(id=1, name="signup", value="made anew"))
    place.assert_as_before()


def test_a_reference_to_our_row_and_a_unique_value_that_our_row_took(place: Place) -> None:
    """The first is put back before our row is deleted, the second only after it."""
    with place.manager:
        place.tracker.preserve(sa.select(Setting))
        place.ours(
            sa.insert(Owner).values(id=40, name="ours"),
            sa.update(Setting).where(Setting.id == 1).values(owner_id=40),
            sa.update(Setting).where(Setting.id == 2).values(name="moved"),
            sa.insert(Setting).values(id=41, name="theme"),
        )
    place.assert_as_before()
    assert place.manager.report.total_deleted == 2
    assert not place.manager.report.detached
    assert not place.manager.report.dependents


# --- conflicts


def conflicting(place: Place, change: Callable[[Place], None]) -> dict[tuple[str, Any], str]:
    """Ours first, then somebody else's; the leftovers."""
    place.tracker.start()
    place.tracker.preserve(sa.select(Setting))
    place.ours(set_value("closed"))
    change(place)
    place.tracker.stop()
    return left_over(place.manager)


def test_somebody_elses_later_value_stays_and_is_named(place: Place) -> None:
    left = conflicting(place, lambda place: place.others(set_value("x" * 100)))
    assert list(left) == [("settings", 1)]
    cause = left["settings", 1]
    assert "value was 'open' and is 'xxx" in cause
    assert "x" * 40 not in cause
    assert "somebody else changed this row too; it was left as it is" in cause
    assert "call cleanup() again" in cause
    assert place.value() == "x" * 100
    place.others(set_value("open"))
    place.manager.cleanup()
    place.assert_as_before()


def test_somebody_elses_other_column_is_a_conflict_too(place: Place) -> None:
    other = sa.update(Setting).where(Setting.id == 1).values(code="pub_8")
    left = conflicting(place, lambda place: place.others(other))
    assert "code was 'pub_7' and is 'pub_8' now" in left["settings", 1]
    assert place.value() == "closed"


def test_a_row_that_somebody_else_deleted_after_us_is_a_conflict(place: Place) -> None:
    left = conflicting(place, lambda place: place.others(sa.delete(Setting).where(Setting.id == 1)))
    assert "not there now" in left["settings", 1]


def test_a_change_between_two_of_ours_is_seen(place: Place) -> None:
    """Otherwise our second UPDATE would make the whole row look like ours."""

    def change(place: Place) -> None:
        place.others(sa.update(Setting).where(Setting.id == 1).values(raw=b"theirs"))
        place.ours(set_value("closed again"))

    left = conflicting(place, change)
    assert "raw was" in left["settings", 1]


def test_a_row_that_another_tracker_of_this_process_changed_stays(place: Place) -> None:
    context = WorkerContext.for_test(WorkerContext.current(), "other")
    other = ResourceTracker(place.engine, context=context)
    place.tracker.start()
    place.tracker.preserve(sa.select(Setting))
    other.start()
    place.ours(set_value("inner"))
    other.stop()
    place.tracker.stop()
    left = left_over(place.manager)
    assert f"the tracker {other.context.tag} changed" in left["settings", 1]
    assert place.value() == "inner"


def test_a_thread_of_the_only_tracker_is_ours(place: Place) -> None:
    """The application under test may well run in a thread of the test's process."""

    def change(place: Place) -> None:
        Doing(lambda: place.ours(set_value("by a thread"))).outcome()
        place.others(set_value("theirs"))

    place.tracker.start()
    place.tracker.preserve(sa.select(Setting))
    change(place)
    place.tracker.stop()
    assert "is 'theirs' now" in left_over(place.manager)["settings", 1]


def test_a_thread_of_nobody_knows_which_tracker_is_a_conflict(place: Place) -> None:
    other = ResourceTracker(place.engine)
    place.tracker.start()
    place.tracker.preserve(sa.select(Setting))
    other.start()
    Doing(lambda: place.ours(set_value("by a thread"))).outcome()
    other.stop()
    place.tracker.stop()
    assert "a thread that belongs to no tracker changed" in left_over(place.manager)["settings", 1]
    assert place.value() == "by a thread"


def test_a_nested_tracker_that_preserves_too_restores_what_the_outer_made(place: Place) -> None:
    with place.manager:
        place.tracker.preserve(sa.select(Setting))
        place.ours(set_value("outer"))
        inner = ResourceTracker(place.engine)
        with CleanupManager(inner):
            inner.preserve(sa.select(Setting))
            place.ours(set_value("inner"))
        assert place.value() == "outer"
    place.assert_as_before()


def test_one_conflict_does_not_keep_other_rows_from_being_restored(place: Place) -> None:
    def change(place: Place) -> None:
        place.ours(set_value("light", 2))
        place.others(set_value("theirs"))

    assert list(conflicting(place, change)) == [("settings", 1)]
    assert place.value(2) == "dark"
    assert place.restored() == {"settings": 1}


def test_what_is_committed_between_the_look_and_the_write_is_not_overwritten(
    place: Place,
) -> None:
    with pytest.raises(CleanupError, match="somebody else changed") as caught, place.manager:
        place.tracker.preserve(sa.select(Setting))
        place.ours(set_value("closed"))
        begin = r"^(BEGIN IMMEDIATE|SELECT.*settings.*FOR UPDATE)"
        done = at_statement(place.engine, begin, lambda: place.others(set_value("theirs")))
    assert done()
    assert caught.value.leftovers
    assert place.value() == "theirs"


def test_a_changed_key_is_said_and_no_second_row_is_made(place: Place) -> None:
    place.tracker.start()
    place.tracker.preserve(sa.select(pairs))
    place.ours(sa.update(pairs).values(two="y"))
    place.tracker.stop()
    left = left_over(place.manager)
    assert "an UPDATE of its key changed this row too" in left["pairs", (0, "x")]
    place.ours(sa.update(pairs).values(two="x"))
    place.manager.cleanup()
    place.assert_as_before()


# --- refusals


def test_what_cannot_be_preserved_is_refused(place: Place) -> None:
    with pytest.raises(
        NoPrimaryKeyError, match="keyless has no primary key, so no row of it can be preserved"
    ):
        place.tracker.preserve(sa.select(keyless))
    with pytest.raises(UnknownTableError, match="preserve takes a select"):
        place.tracker.preserve(Setting)  # type: ignore[arg-type]
    with pytest.raises(UnknownTableError):
        place.tracker.preserve(sa.select(Setting, Owner))
    assert not place.tracker.preserved


def test_nobody_listens_once_nothing_is_preserved(place: Place) -> None:
    with place.manager:
        place.tracker.preserve(sa.select(Setting))
        assert len(list(place.engine.dispatch.after_cursor_execute)) == 1
    assert not list(place.engine.dispatch.after_cursor_execute)


def test_a_report_names_the_table() -> None:
    report = CleanupReport(restored={TableName("d", "main", "settings"): 2})
    assert str(report).startswith("main.settings 2 restored")


# --- what only some databases have


def test_while_somebody_elses_change_is_under_way_the_cleanup_waits(database: Database) -> None:
    """Compared before the lock, the row would look like ours and theirs would be lost."""
    if database.target.startswith("sqlite"):
        pytest.skip("SQLite has one writer: BEGIN IMMEDIATE is the lock")
    place = Place(database)
    place.tracker.start()
    place.tracker.preserve(sa.select(Setting))
    place.ours(set_value("closed"))
    place.tracker.stop()
    with place.outside.connect() as theirs:
        theirs.execute(set_value("theirs"))
        cleaning = Doing(place.manager.cleanup)
        cleaning.settle(place.outside)
        assert not cleaning.over
        theirs.commit()
    with pytest.raises(CleanupError, match="somebody else changed"):
        cleaning.outcome()
    assert place.value() == "theirs"


def kept_by(engine: sa.Engine, *definition: str) -> tuple[CleanupManager, sa.Table]:
    """A table ``odd`` as defined, with all its rows preserved; the tracker listens."""
    with engine.begin() as connection:
        for sql in definition:
            connection.exec_driver_sql(sql)
    table = sa.Table("odd", sa.MetaData(), autoload_with=engine)
    tracker = ResourceTracker(engine).start()
    tracker.preserve(sa.select(table))
    return CleanupManager(tracker), table


def test_a_generated_always_identity_is_inserted_again(postgresql_engine: sa.Engine) -> None:
    manager, odd = kept_by(
        postgresql_engine,
        """CREATE TABLE odd (id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
           "a:b%%c" text, j jsonb, nothing integer)""",
        """INSERT INTO odd ("a:b%%c", j) VALUES ('x:y', '{"a": 1}'), ('z', NULL)""",
    )
    before = snapshot(postgresql_engine)
    with manager.tracker.session as session:
        session.execute(sa.delete(odd))
        session.commit()
    manager.tracker.stop()
    manager.cleanup()
    assert snapshot(postgresql_engine) == before


_STAMP = """
    CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN NEW.changed := clock_timestamp(); RETURN NEW; END $$
"""
_VETO = """
    CREATE FUNCTION veto() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN IF NEW.word = 'old' THEN NEW.word := OLD.word; END IF; RETURN NEW; END $$
"""


def test_a_time_stamp_that_a_trigger_sets_is_the_triggers(postgresql_engine: sa.Engine) -> None:
    """It cannot be put back, and is no reason to leave the rest changed."""
    manager, odd = kept_by(
        postgresql_engine,
        "CREATE TABLE odd (id integer PRIMARY KEY, word text, changed timestamptz)",
        "INSERT INTO odd VALUES (1, 'old', '2020-01-01'), (2, 'old', '2020-01-01')",
        _STAMP,
        "CREATE TRIGGER stamp BEFORE UPDATE ON odd FOR EACH ROW EXECUTE FUNCTION stamp()",
    )
    with postgresql_engine.begin() as connection:
        connection.execute(sa.update(odd).where(odd.c.id == 1).values(word="new"))
    manager.tracker.stop()
    report = manager.cleanup()
    assert sum(report.restored.values()) == 1
    with postgresql_engine.connect() as connection:
        assert connection.scalars(sa.select(odd.c.word)).all() == ["old", "old"]


def test_a_trigger_that_keeps_the_new_value_is_said(postgresql_engine: sa.Engine) -> None:
    manager, odd = kept_by(
        postgresql_engine,
        "CREATE TABLE odd (id integer PRIMARY KEY, word text)",
        "INSERT INTO odd VALUES (1, 'old')",
        _VETO,
        "CREATE TRIGGER veto BEFORE UPDATE ON odd FOR EACH ROW EXECUTE FUNCTION veto()",
    )
    with postgresql_engine.begin() as connection:
        connection.execute(sa.update(odd).values(word="new"))
    manager.tracker.stop()
    ((_row, cause),) = left_over(manager).items()
    assert "word was 'old' and is 'new' now" in cause
    assert "a trigger" in cause


def test_key_zero_and_a_time_of_the_last_change(mysql_engine: sa.Engine) -> None:
    manager, odd = kept_by(
        mysql_engine,
        "SET sql_mode = CONCAT(@@sql_mode, ',NO_AUTO_VALUE_ON_ZERO')",
        """CREATE TABLE odd (id integer AUTO_INCREMENT PRIMARY KEY, word varchar(20),
           changed timestamp DEFAULT '2020-01-01' ON UPDATE CURRENT_TIMESTAMP)""",
        "INSERT INTO odd (id, word) VALUES (0, 'old'), (1, 'old'), (2, 'old')",
        "UPDATE odd SET changed = '2020-02-02'",
        "SET sql_mode = DEFAULT",
    )
    before = snapshot(mysql_engine)
    with mysql_engine.begin() as connection:
        connection.execute(sa.delete(odd).where(odd.c.id == 0))
        connection.execute(sa.update(odd).where(odd.c.id == 1).values(word="new"))
        # the time as it was: putting the word back would set it
        connection.execute(
            sa.update(odd).where(odd.c.id == 2).values(word="new", changed=odd.c.changed)
        )
    manager.tracker.stop()
    manager.cleanup()
    assert snapshot(mysql_engine) == before


def test_a_snapshot_does_not_hide_what_somebody_else_committed(mysql_engine: sa.Engine) -> None:
    """InnoDB shows a transaction the row as it was, and updates it as it is."""
    manager, odd = kept_by(
        mysql_engine,
        "CREATE TABLE odd (id integer PRIMARY KEY, word varchar(20), other varchar(20))",
        "INSERT INTO odd VALUES (1, 'old', 'old')",
    )
    outside = sa.create_engine(mysql_engine.url)
    with mysql_engine.begin() as connection:
        connection.execute(sa.update(odd).where(odd.c.id == 1).values(word="ours"))
    with mysql_engine.connect() as connection:
        connection.execution_options(isolation_level="REPEATABLE READ")
        connection.execute(sa.select(odd)).all()
        with outside.begin() as theirs:
            theirs.execute(sa.update(odd).values(other="theirs"))
        connection.execute(sa.update(odd).where(odd.c.id == 1).values(word="ours again"))
        connection.commit()
    manager.tracker.stop()
    ((_row, cause),) = left_over(manager).items()
    assert "other was 'old' and is 'theirs' now" in cause
    outside.dispose()


def test_columns_that_the_model_does_not_know_are_put_back(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE odd (id integer PRIMARY KEY, word varchar(20), hidden varchar(20))"
        )
        connection.exec_driver_sql("INSERT INTO odd VALUES (1, 'a', 'b'), (2, 'c', NULL)")
    known = sa.Table(
        "odd",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("word", sa.String(20)),
    )
    before = snapshot(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker), engine.begin() as connection:
        tracker.preserve(sa.select(known))
        connection.execute(sa.delete(known))
    assert snapshot(engine) == before


def test_awkward_names_are_heard(engine: sa.Engine) -> None:
    """A name that is not found in a statement would hide our own change, and then theirs."""
    metadata = sa.MetaData()
    odd = sa.Table(
        'Odd "T%e:s',
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("a b", sa.Integer),
    )
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(odd).values({"id": 1, "a b": 1}))
    outside = sa.create_engine(engine.url)
    tracker = ResourceTracker(engine)
    with pytest.raises(CleanupError, match="a b was 1 and is 3"), CleanupManager(tracker):
        tracker.preserve(sa.select(odd))
        for each, value in ((engine, 2), (outside, 3)):
            with each.begin() as connection:
                connection.execute(sa.update(odd).values({"a b": value}))
    outside.dispose()


def test_every_driver_restores(any_driver_engine: sa.Engine) -> None:
    Base.metadata.create_all(any_driver_engine)
    with Session(any_driver_engine) as session:
        session.add_all(
            [
                Setting(id=1, name="a", extra={"x": 1}, raw=b"\xff", size=Decimal("2.50")),
                Setting(id=2, name="b", since=dt.datetime(2020, 1, 2), code="pub_3"),
            ]
        )
        session.commit()
    before = snapshot(any_driver_engine)
    tracker = ResourceTracker(any_driver_engine)
    with CleanupManager(tracker) as cleanup, Session(any_driver_engine) as session:
        tracker.preserve(sa.select(Setting))
        one, two = session.scalars(sa.select(Setting).order_by(Setting.id))
        one.extra, one.raw, one.size = None, None, None
        session.delete(two)
        session.commit()
    assert snapshot(any_driver_engine) == before
    assert sum(cleanup.report.restored.values()) == 2


@on("sqlite")
def test_a_row_that_a_trigger_changes_as_it_is_put_back_is_not_called_restored(engine):
    table = sa.Table(
        "switches",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("value", sa.String(20)),
    )
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(table), {"id": 1, "value": "open"})
        for when in ("INSERT ON switches", "UPDATE ON switches WHEN NEW.value <> 'forced'"):
            connection.exec_driver_sql(
                f'CREATE TRIGGER "{when}" AFTER {when} BEGIN UPDATE switches '
                "SET value = 'forced' WHERE id = NEW.id; END"
            )
    tracker = ResourceTracker(engine)
    manager = CleanupManager(tracker)
    with pytest.raises(CleanupError, match="a trigger"), manager:
        tracker.preserve(sa.select(table))
        with engine.begin() as connection:
            connection.execute(sa.delete(table))
    assert not manager.report.restored
