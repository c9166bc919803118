"""On SQLite a key that is free is given again: a stranger's row that has ours by now stays.

The application is another engine on the same file, which no tracker hears: another process.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from harness import forks
from harness.bystanders import snapshot
from tidyrows import CleanupError, CleanupManager, ResourceTracker


class Base(DeclarativeBase):
    pass


class Note(Base):
    """Nothing in it is only ours."""

    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str | None] = mapped_column(sa.String(60))
    stars: Mapped[int | None]
    seen: Mapped[str] = mapped_column(sa.String(20), server_default="new")


class Member(Base):
    __tablename__ = "members"
    id: Mapped[int] = mapped_column(primary_key=True)
    login: Mapped[str | None] = mapped_column(sa.String(60), unique=True)
    token: Mapped[uuid.UUID | None]
    name: Mapped[str | None] = mapped_column(sa.String(60))


class Numbered(Base):
    __tablename__ = "numbered"
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012 -- SQLAlchemy's way
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(sa.String(60))


class Bare(Base):
    """It has no column to compare."""

    __tablename__ = "bare"
    id: Mapped[int] = mapped_column(primary_key=True)


class BareNumbered(Base):
    __tablename__ = "bare_numbered"
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012 -- SQLAlchemy's way
    id: Mapped[int] = mapped_column(primary_key=True)


class Leaf(Base):
    __tablename__ = "leaves"
    id: Mapped[int] = mapped_column(primary_key=True)
    note_id: Mapped[int | None] = mapped_column(sa.ForeignKey("notes.id", ondelete="SET NULL"))
    word: Mapped[str | None] = mapped_column(sa.String(20))


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


shape_notes = sa.Table(
    "shape_notes",
    Base.metadata,
    sa.Column("shape_id", sa.ForeignKey("shapes.id"), primary_key=True),
    sa.Column("note_id", sa.ForeignKey("notes.id"), primary_key=True),
)


class Place:
    """A database with our engine and the application's."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self.app = sa.create_engine(engine.url)
        Base.metadata.create_all(engine)
        self.tracker = ResourceTracker(engine)
        self.manager = CleanupManager(self.tracker)

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Track, and clean up later."""
        self.tracker.start()
        try:
            yield
        finally:
            self.tracker.stop()

    def made(self, *rows: Any) -> list[Any]:
        """Commit rows under the tracker, their keys loaded."""
        with Session(self.engine, expire_on_commit=False) as session:
            session.add_all(rows)
            session.commit()
        return [row.id for row in rows]

    def run(self, *statements: str) -> None:
        """What the application does."""
        with self.app.begin() as connection:
            for sql in statements:
                connection.exec_driver_sql(sql)

    def leftovers(self, **options: Any) -> dict[str, str]:
        """What a cleanup leaves as uncertain, and why."""
        with pytest.raises(CleanupError) as caught:
            CleanupManager(self.tracker, **options).cleanup()
        return {str(left.row).removeprefix("main."): left.cause for left in caught.value.leftovers}

    def rows(self, model: Any) -> list[Any]:
        with self.app.connect() as connection:
            return list(connection.execute(sa.select(sa.inspect(model).local_table)))


@pytest.fixture
def place(sqlite_engine: sa.Engine) -> Iterator[Place]:
    made = Place(sqlite_engine)
    yield made
    made.tracker.stop()
    made.app.dispose()


# --- a stranger's row


def test_a_strangers_row_under_our_key_stays(place):
    with place.tracked():
        place.made(Note(title="ours", stars=1), Note(title="ours too", stars=2))
    place.run("DELETE FROM notes WHERE id = 2", "INSERT INTO notes (title) VALUES ('theirs')")
    assert [row.id for row in place.rows(Note)] == [1, 2]
    before = snapshot(place.app)

    (left,) = place.leftovers().items()
    assert left[0] == "notes(2)"
    assert left[1].startswith(
        "identity uncertain: one or more of title, stars differs from what was inserted"
    )
    assert "trust_keys=True" in left[1]
    assert "track_rows" in left[1]
    assert [row.title for row in place.rows(Note)] == ["theirs"]
    assert len(place.tracker) == 1  # it stays tracked, and the next cleanup says the same
    assert list(place.leftovers()) == ["notes(2)"]
    assert snapshot(place.app) != before


def test_a_strangers_row_after_our_rollback_stays(place):
    with place.manager:
        with Session(place.engine) as session:
            session.add(Note(title="same"))
            session.flush()
            session.rollback()
        place.run("INSERT INTO notes (title) VALUES ('same')")
    assert [row.title for row in place.rows(Note)] == ["same"]


def test_a_strangers_row_of_another_process_stays_where_rows_travel_as_json(place, tmp_path):
    with place.tracked():
        place.made(Note(title="ours"), Note(title="ours too"))
    script = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]);"
        "c.execute('DELETE FROM notes WHERE id = 2');"
        "c.execute(\"INSERT INTO notes (title) VALUES ('theirs')\"); c.commit()"
    )
    forks.run([sys.executable, "-c", script, place.engine.url.database], check=True)
    script = (
        "import sys, sqlalchemy as sa; from tidyrows import *\n"
        "tracker = ResourceTracker.from_json(sys.stdin.read(), sa.create_engine(sys.argv[1]))\n"
        "try: CleanupManager(tracker).cleanup()\n"
        "except CleanupError as error: print(error)\n"
        "print(tracker.to_json() == ResourceTracker.from_json("
        "tracker.to_json(), sa.create_engine(sys.argv[1])).to_json())"
    )
    told = forks.run(
        [sys.executable, "-c", script, str(place.engine.url)],
        place.tracker.to_json(),
        check=True,
    ).stdout
    assert "main.notes(2): identity uncertain: one or more of title, stars differs" in told
    assert told.endswith("True\n")
    assert [row.title for row in place.rows(Note)] == ["theirs"]


def test_the_other_tables_of_a_strangers_object_stay_too(place):
    """Its row in circles looks just like ours did."""
    with place.tracked():
        place.made(Circle(name="ours"))
    place.run(
        "DELETE FROM circles",
        "DELETE FROM shapes",
        "INSERT INTO shapes (kind, name) VALUES ('circle', 'theirs')",
        "INSERT INTO circles (id, radius) VALUES (1, 1)",
    )
    before = snapshot(place.app)
    left = place.leftovers()
    assert list(left) == ["circles(1)", "shapes(1)"]
    assert left["circles(1)"] == "identity uncertain: it belongs to main.shapes(1), which see"
    assert snapshot(place.app) == before


def test_an_association_with_a_strangers_row_stays(place):
    with place.tracked():
        place.made(Shape(name="ours"), Note(title="ours"))
        with place.engine.begin() as connection:
            connection.execute(shape_notes.insert().values(shape_id=1, note_id=1))
    place.run(
        "DELETE FROM shape_notes",
        "DELETE FROM shapes",
        "DELETE FROM notes",
        "INSERT INTO shapes (kind, name) VALUES ('shape', 'theirs')",
        "INSERT INTO notes (title) VALUES ('theirs')",
        "INSERT INTO shape_notes VALUES (1, 1)",
    )
    before = snapshot(place.app)
    assert set(place.leftovers()) == {"shape_notes(1, 1)", "shapes(1)", "notes(1)"}
    assert snapshot(place.app) == before


def test_an_association_that_the_user_named_goes_all_the_same(place):
    with place.tracked():
        place.made(Shape(name="ours"))
    place.run(
        "INSERT INTO notes (title) VALUES ('theirs')",
        "INSERT INTO shape_notes VALUES (1, 1)",
        "UPDATE shapes SET name = 'changed'",
    )
    place.tracker.track_rows(shape_notes, [(1, 1)])
    assert list(place.leftovers()) == ["shapes(1)"]
    with place.app.connect() as connection:
        assert connection.execute(sa.select(shape_notes)).all() == []


def test_a_row_that_is_gone_is_nothing_to_say(place):
    with place.manager:
        place.made(Note(title="ours"))
        place.run("DELETE FROM notes")
    assert place.manager.report.total_deleted == 0


# --- our own row, changed by the application


@pytest.mark.parametrize(
    "proof",
    [
        lambda _tag: {"login": "somebody"},
        lambda _tag: {"token": uuid.uuid4()},
        lambda tag: {"name": f"user-{tag}01"},
    ],
    ids=["unique", "uuid", "tag"],
)
def test_what_only_our_row_can_have_proves_it(place, proof):
    values = {"login": None, "name": "n"} | proof(place.tracker.context.tag)
    changed = "login" if "name" in proof("") else "name"
    with place.manager:
        place.made(Member(**values))
        place.run(f"UPDATE members SET {changed} = 'changed'")
    assert place.manager.report.total_deleted == 1


def test_a_row_that_the_application_changed_stays_and_is_said(place):
    with place.tracked():
        place.made(Note(title="ours", stars=1))
    place.run("UPDATE notes SET stars = 2")
    assert place.leftovers()["notes(1)"].startswith("identity uncertain: one or more of title, st")
    assert len(place.rows(Note)) == 1


@pytest.mark.parametrize("way", ["track", "track_rows", "track_query", "trust_keys"])
def test_the_user_can_own_it(place, way):
    with place.tracked():
        place.made(Note(title="ours"))
    place.run("UPDATE notes SET title = 'changed'")
    assert list(place.leftovers()) == ["notes(1)"]
    if way == "track":
        with Session(place.engine) as session:
            place.tracker.track(session.get(Note, 1))
    elif way == "track_rows":
        place.tracker.track_rows(Note, [1])
    elif way == "track_query":
        place.tracker.track_query(sa.select(Note))
    CleanupManager(place.tracker, trust_keys=way == "trust_keys").cleanup()
    assert place.rows(Note) == []


def test_columns_that_were_not_inserted_are_not_compared(place):
    with place.manager:
        place.made(Note(title="ours"))
        place.run("UPDATE notes SET seen = 'yes'")
    assert place.manager.report.total_deleted == 1


def test_a_reference_that_went_with_its_row_is_no_change(place):
    with place.manager:
        place.run("INSERT INTO notes (title) VALUES ('theirs')")
        place.made(Leaf(note_id=1, word="w"))
        place.run("PRAGMA foreign_keys = ON", "DELETE FROM notes", "UPDATE leaves SET note_id=NULL")
    assert place.manager.report.total_deleted == 1


def test_a_reference_to_another_row_is_a_change(place):
    with place.tracked():
        place.run("INSERT INTO notes (title) VALUES ('theirs'), ('also theirs')")
        place.made(Leaf(note_id=1, word="w"))
    place.run("UPDATE leaves SET note_id = 2")
    assert list(place.leftovers()) == ["leaves(1)"]
    place.run("UPDATE leaves SET note_id = NULL, word = 'v'")
    assert list(place.leftovers()) == ["leaves(1)"]


def test_a_row_of_a_reference_alone_that_is_gone_stays(place):
    with place.tracked():
        place.run("INSERT INTO notes (title) VALUES ('theirs')")
        with place.engine.begin() as connection:
            connection.execute(sa.insert(Leaf.__table__).values(note_id=1))
    place.run("UPDATE leaves SET note_id = NULL")
    assert place.leftovers()["leaves(1)"].startswith("identity uncertain: what it referenced is g")


OF_NO_VALUES: dict[str, Any] = {
    "object": Note(),
    "computed": sa.insert(Note).values(seen=sa.func.lower("NEW")),
    "select": sa.insert(Note).from_select(["title"], sa.select(sa.null())),
}


@pytest.mark.parametrize("way", OF_NO_VALUES)
def test_a_row_of_defaults_is_read_back_and_compared(place, way):
    made = OF_NO_VALUES[way]
    with place.tracked(), Session(place.engine) as session:
        session.execute(made) if way != "object" else session.add(Note())
        session.commit()
    place.run("DELETE FROM notes", "INSERT INTO notes (title) VALUES ('theirs')")
    assert list(place.leftovers()) == ["notes(1)"]
    assert [row.title for row in place.rows(Note)] == ["theirs"]
    place.run("UPDATE notes SET title = NULL")  # as ours was
    assert CleanupManager(place.tracker).cleanup().total_deleted == 1


def test_a_row_that_has_nothing_to_compare_is_uncertain(place):
    with place.tracked():
        place.made(Bare())
    place.run("DELETE FROM bare", "INSERT INTO bare DEFAULT VALUES")
    (cause,) = place.leftovers().values()
    assert "main.bare has no column to compare but id" in cause
    assert len(place.rows(Bare)) == 1
    CleanupManager(place.tracker, trust_keys=True).cleanup()


# --- AUTOINCREMENT


def test_a_table_with_autoincrement_gives_no_key_again(place):
    """Where there is nothing to compare, its counter tells; other rows are compared."""
    with place.manager:
        place.made(BareNumbered(), BareNumbered())
        place.run("DELETE FROM bare_numbered WHERE id = 2", "INSERT INTO bare_numbered VALUES (3)")
    assert place.manager.report.total_deleted == 1
    assert [row.id for row in place.rows(BareNumbered)] == [3]


@pytest.mark.parametrize(
    "reset",
    [
        "DELETE FROM sqlite_sequence",
        "UPDATE sqlite_sequence SET seq=0",
        (
            "DROP TABLE numbered; CREATE TABLE numbered "
            "(id INTEGER PRIMARY KEY AUTOINCREMENT, title TEXT); DROP TABLE bare_numbered; "
            "CREATE TABLE bare_numbered (id INTEGER PRIMARY KEY AUTOINCREMENT)"
        ),
    ],
)
def test_unless_its_counter_was_set_back(place, reset):
    """Strangers may have counted on since, so the counter alone is no proof of a row's values."""
    with place.tracked():
        place.made(Numbered(title="ours"), BareNumbered(), BareNumbered())
    emptied = ("DELETE FROM numbered", "DELETE FROM bare_numbered", *reset.split(";"))
    place.run(*emptied, *["INSERT INTO numbered (title) VALUES ('theirs')"] * 2)
    place.run("INSERT INTO bare_numbered DEFAULT VALUES")
    assert list(place.leftovers()) == ["bare_numbered(1)", "numbered(1)"]


def test_keys_that_the_caller_gave_are_compared_even_there(place):
    with place.tracked():
        place.made(Numbered(id=5, title="ours"))
    place.run("DELETE FROM numbered", "INSERT INTO numbered (id, title) VALUES (5, 'theirs')")
    assert list(place.leftovers()) == ["numbered(5)"]


# --- updates that are heard

UPDATES: dict[str, Any] = {
    "object": lambda s: setattr(s.get(Note, 1), "title", "new"),
    "by key": lambda s: s.execute(sa.update(Note).where(Note.id == 1).values(title="new")),
    "by keys": lambda s: s.execute(sa.update(Note).where(Note.id.in_([1])).values(title="new")),
    "by key and more": lambda s: s.execute(
        sa.update(Note).where(Note.id == 1, Note.title == "ours").values(title="new")
    ),
    "by another column": lambda s: s.execute(
        sa.update(Note).where(Note.title == "ours").values(title="new")
    ),
    "computed": lambda s: s.execute(
        sa.update(Note).where(Note.id == 1).values(title=Note.title + "!")
    ),
    "computed everywhere": lambda s: s.execute(
        sa.update(Note).values({Note.title: Note.title + "!"})
    ),
    "ordered": lambda s: s.execute(
        sa.update(Note).where(Note.id == 1).ordered_values((Note.title, sa.func.upper("x")))
    ),
    "query": lambda s: s.query(Note).filter_by(title="ours").update({"title": Note.title + "x"}),
    "many": lambda s: s.execute(sa.update(Note), [{"id": 1, "title": "new"}]),
    "core, many": lambda s: s.connection().execute(
        sa.update(Note.__table__).where(Note.__table__.c.id == sa.bindparam("key")),
        [{"key": 1, "title": "new"}, {"key": 7, "title": "other"}],
    ),
}


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_an_update_in_this_process_is_no_change_by_a_stranger(place, update):
    with place.manager:
        place.made(Note(title="ours", stars=1))
        with Session(place.engine) as session:
            update(session)
            session.commit()
        assert place.rows(Note)[0].title != "ours"
    assert place.manager.report.total_deleted == 1


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_a_row_is_compared_as_its_update_left_it(place, update):
    with place.tracked():
        place.made(Note(title="ours"), Note(title="ours"))
        with Session(place.engine) as session:
            update(session)
            session.commit()
    place.run(
        "DELETE FROM notes WHERE id = 1", "INSERT INTO notes (id, title) VALUES (1, 'theirs')"
    )
    assert list(place.leftovers()) == ["notes(1)"]
    assert [row.title for row in place.rows(Note)] == ["theirs"]


def test_a_row_that_is_updated_in_its_own_transaction_is_compared_in_all_that_was_given(place):
    """What was inserted is hashed at COMMIT, and what was updated before."""
    with place.tracked():
        place.made(Note(title=f"user-{place.tracker.context.tag}01", stars=1))  # by that alone
        with Session(place.engine) as session:
            session.add(note := Note(title="ours", stars=1))
            session.flush()
            session.execute(sa.update(Note).where(Note.id == note.id).values(stars=2))
            session.commit()
    place.run(
        "DELETE FROM notes WHERE title = 'ours'",
        "INSERT INTO notes (title, stars) VALUES ('theirs', 2)",
    )
    assert list(place.leftovers()) == ["notes(2)"]


@pytest.mark.parametrize("everywhere", [True, False])
def test_an_update_of_columns_that_are_not_compared_changes_nothing(place, everywhere):
    """A value that only our row can have is compared alone."""
    with place.tracked():
        place.made(Note(title=f"user-{place.tracker.context.tag}01", stars=1))
        with Session(place.engine) as session:
            update = sa.update(Note).values(stars=2)
            session.execute(update if everywhere else update.where(Note.id == 1))
            session.commit()
    place.run("DELETE FROM notes", "INSERT INTO notes (title, stars) VALUES ('theirs', 2)")
    assert list(place.leftovers()) == ["notes(1)"]


def test_an_update_that_was_rolled_back_changes_nothing(place):
    with place.tracked():
        place.made(Note(title="ours"), Note(title="ours"))
        with Session(place.engine) as session:
            UPDATES["by key"](session)
            session.rollback()
            with session.begin_nested() as savepoint:
                session.execute(sa.update(Note).values(title="new"))
                savepoint.rollback()
            session.commit()
    place.run("UPDATE notes SET title = 'new'")
    assert list(place.leftovers()) == ["notes(1)", "notes(2)"]


def test_a_row_inserted_again_under_its_key_looks_as_it_does_now(place):
    with place.manager:
        place.made(Note(id=1, title="first"))
        place.run("DELETE FROM notes")
        place.made(Note(id=1, title="second"))
    assert place.manager.report.total_deleted == 1


def test_a_row_whose_key_is_changed_takes_its_looks_along(place):
    with place.tracked():
        place.made(Note(title="one"), Note(title="two"))
        with Session(place.engine) as session:
            session.get(Note, 1).id = 9
            session.commit()
            both = session.get(Note, 2)
            both.id, both.title = 8, "three"
            session.commit()
    place.run("UPDATE notes SET title = 'theirs' WHERE id = 9")
    assert list(place.leftovers()) == ["notes(9)"]
    assert [row.id for row in place.rows(Note)] == [9]


# --- elsewhere


def test_a_database_that_gives_no_key_again_keeps_and_asks_nothing(database):
    engine = database.engine()
    Base.metadata.create_all(engine)
    tracker = ResourceTracker(engine)
    tracker.start()
    with Session(engine) as session:
        session.add_all([Note(title="ours"), Member(login="l")])
        session.commit()
        session.execute(sa.update(Note).values(title="new"))
        session.commit()
    tracker.stop()
    reused = database.backend == "sqlite"
    assert all((held.hashes is not None) is reused for held in tracker.store.snapshot())
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE members SET login = 'changed'")
    asked: list[str] = []
    sa.event.listen(
        engine, "before_cursor_execute", lambda _c, _u, sql, *_: asked.append(sql.lower())
    )
    CleanupManager(tracker, verify=False, trust_keys=reused).cleanup()
    assert not [sql for sql in asked if "login" in sql]


def test_many_rows_are_asked_about_in_few_statements(place):
    with place.manager:
        with place.engine.begin() as connection:
            connection.execute(
                sa.insert(Note), [{"title": f"t{n}", "stars": n} for n in range(5000)]
            )
        asked: list[str] = []
        sa.event.listen(
            place.engine, "before_cursor_execute", lambda _c, _u, sql, *_: asked.append(sql)
        )
    assert place.manager.report.total_deleted == 5000
    assert len([sql for sql in asked if "title" in sql]) == 1
