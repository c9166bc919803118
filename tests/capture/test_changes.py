"""Tracked rows that are deleted or get other keys through SQLAlchemy: their old keys are free."""

from __future__ import annotations

import enum
import uuid
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from harness.bystanders import Bystanders
from harness.models import Currency, Order, OrderLine, Org, User
from harness.pairs import drivers_in_turn
from tidyrows import CleanupError, CleanupManager, ResourceTracker, UntrackedRowsWarning

CODES = ["AAA", "BBB", "CCC"]


def tracked(tracker: ResourceTracker) -> list[Any]:
    return sorted(row.key[0] for row in tracker.rows())


@pytest.fixture
def ours(any_driver_zoo_engine: sa.Engine) -> Any:
    """Three tracked rows with natural keys, and a way to let strangers have keys."""
    engine = any_driver_zoo_engine

    class Ours:
        def __init__(self) -> None:
            self.engine = engine
            self.bystanders = Bystanders(engine)
            self.tracker = ResourceTracker(engine)
            self.cleanup = CleanupManager(self.tracker)

        def free(self, *codes: str) -> None:
            self.bystanders.insert(Currency, *({"code": c, "name": "theirs"} for c in codes))

    made = Ours()
    with made.cleanup:
        with Session(engine) as session:
            session.add_all([Currency(code=code, name="ours") for code in CODES])
            session.commit()
        yield made
    made.bystanders.assert_untouched()


DELETES: dict[str, Any] = {
    "objects": lambda s: [s.delete(each) for each in s.scalars(sa.select(Currency)).all()],
    "by key": lambda s: [
        s.execute(sa.delete(Currency).where(Currency.code == code)) for code in CODES
    ],
    "by keys": lambda s: s.execute(sa.delete(Currency).where(Currency.code.in_(CODES))),
    "by key and more": lambda s: [
        s.execute(
            sa.delete(Currency).where(sa.and_(Currency.code == code, Currency.name == "ours"))
        )
        for code in CODES
    ],
    "by many parameters": lambda s: s.connection().execute(
        sa.delete(Currency.__table__).where(Currency.__table__.c.code == sa.bindparam("b_code")),
        [{"b_code": code} for code in CODES],
    ),
    "by query": lambda s: s.query(Currency).filter(Currency.code.in_(CODES)).delete(),
    "by another column": lambda s: s.execute(sa.delete(Currency).where(Currency.name == "ours")),
    "all": lambda s: s.execute(sa.delete(Currency)),
    "by a range": lambda s: s.query(Currency).filter(Currency.code.between("A", "CZ")).delete(),
    "fetching": lambda s: s.execute(
        sa.delete(Currency).where(Currency.name == "ours"),
        execution_options={"synchronize_session": "fetch"},
    ),
    "without the session": lambda s: s.execute(
        sa.delete(Currency).where(Currency.name == "ours"),
        execution_options={"synchronize_session": False},
    ),
    "by Core": lambda s: s.connection().execute(
        sa.delete(Currency.__table__).where(Currency.__table__.c.name == "ours")
    ),
    "returning": lambda s: _check(
        s.execute(sa.delete(Currency).where(Currency.name == "ours").returning(Currency.name)),
        [("ours",)] * 3,
    ),
    "returning entities": lambda s: (
        len(s.scalars(sa.delete(Currency).returning(Currency)).all()) == 3 or pytest.fail("rows")
    ),
    "Core returning": lambda s: _check(
        s.connection().execute(sa.delete(Currency.__table__).returning(Currency.__table__.c.name)),
        [("ours",)] * 3,
    ),
}


def _check(result: Any, expected: list[Any]) -> None:
    """The caller gets what it asked for, and nothing that was added behind its back."""
    assert list(result.keys()) == ["name"]
    assert [tuple(row) for row in result] == expected


@drivers_in_turn("any_driver_zoo_engine", how=tuple(DELETES))
def test_rows_that_are_deleted_are_forgotten_when_that_commits(ours, how):
    with Session(ours.engine) as session:
        DELETES[how](session)
        session.flush()
        assert tracked(ours.tracker) == CODES
        session.rollback()
        assert tracked(ours.tracker) == CODES
        DELETES[how](session)
        session.commit()
    assert tracked(ours.tracker) == []
    ours.free(*CODES)


def test_a_delete_gives_its_caller_the_rowcount_and_no_rows(ours):
    with ours.engine.begin() as connection:
        result = connection.execute(sa.delete(Currency).where(Currency.name == "ours"))
        assert (result.rowcount, result.returns_rows) == (3, False)
        with pytest.raises(sa.exc.ResourceClosedError):
            result.all()
        assert connection.execute(sa.delete(Currency)).rowcount == 0
    assert tracked(ours.tracker) == []


@pytest.mark.filterwarnings("ignore::tidyrows.UntrackedRowsWarning")
def test_a_delete_that_returns_defaults_of_its_own(ours):
    """Nobody does that, but nobody must find that a tracker forbids it."""
    table = Currency.__table__
    with ours.engine.begin() as connection:
        if not connection.dialect.delete_returning:
            pytest.skip("no DELETE with RETURNING")
        result = connection.execute(
            sa.delete(table).where(table.c.name == "ours").return_defaults(table.c.name)
        )
        assert result.rowcount == 3
    ours.tracker.store.forget(next(iter(ours.tracker.store.snapshot())).table, CODES)


def test_what_is_deleted_in_the_transaction_that_made_it_never_was(ours):
    with Session(ours.engine) as session:
        session.add(Currency(code="XXX", name="new"))
        session.flush()
        session.execute(sa.delete(Currency).where(Currency.name == "new"))
        session.commit()
    assert tracked(ours.tracker) == CODES
    ours.free("XXX")


def test_a_number_that_sqlite_gives_again_is_the_strangers(any_driver_zoo_engine):
    """The row was deleted by its name, in our session; the next one's id is the same."""
    engine = any_driver_zoo_engine
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        with Session(engine) as session:
            session.add(Org(name="ours"))
            session.commit()
            session.query(Org).filter_by(name="ours").delete()
            session.commit()
        bystanders.insert(Org, {"name": "theirs"})
    assert cleanup.report.total_deleted == 0
    bystanders.assert_untouched()


def test_a_delete_by_another_tables_key_is_not_taken_for_ours(any_driver_zoo_engine):
    """``users.id == 5`` says nothing of ``orgs.id``, though both are called id."""
    engine = any_driver_zoo_engine
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite deletes from one table at a time")
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker):
        with Session(engine) as session:
            session.add_all(
                [Org(id=5, name="kept"), Org(id=6, name="deleted"), Org(id=7, name="x")]
            )
            session.commit()
            session.add(User(id=5, email="a@example.test", org_id=7))
            session.commit()
            orgs, users = Org.__table__, User.__table__
            session.execute(sa.delete(orgs).where(users.c.id == 5, orgs.c.id == users.c.org_id - 1))
            session.commit()
        assert ("orgs", (5,)) in [(row.table.name, row.key) for row in tracker.rows()]
    bystanders.assert_untouched()


def test_rows_that_a_part_of_their_key_names_are_forgotten(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker), Session(engine) as session:
        order = Order(user=User(email="a@example.test", org=Org(name="ours")))
        order.lines = [OrderLine(line_no=n, sku="kettle") for n in (1, 2, 3)]
        session.add(order)
        session.commit()
        before = len(tracker)
        session.execute(sa.delete(OrderLine).where(OrderLine.line_no == 2))
        session.commit()
        session.delete(order.lines[0])
        session.commit()
        assert len(tracker) == before - 2
    bystanders.assert_untouched()


RENAMES: dict[str, Any] = {
    "an object": lambda s: setattr(s.get_one(Currency, "AAA"), "code", "XXX"),
    "by key": lambda s: s.execute(
        sa.update(Currency).where(Currency.code == "AAA").values(code="XXX")
    ),
    "by many parameters": lambda s: s.connection().execute(
        sa.update(Currency.__table__)
        .where(Currency.__table__.c.code == sa.bindparam("old"))
        .values(code=sa.bindparam("new")),
        [{"old": "AAA", "new": "XXX"}],
    ),
}


@pytest.mark.parametrize("how", RENAMES)
@pytest.mark.filterwarnings("ignore::tidyrows.UntrackedRowsWarning")
def test_a_key_that_changes_is_followed_or_doubtful(ours, how):
    """Where the new key is a parameter of another name, it is not told; then it is said."""
    with Session(ours.engine) as session:
        RENAMES[how](session)
        session.flush()
        session.rollback()
        assert tracked(ours.tracker) == CODES
        RENAMES[how](session)
        session.commit()
    assert "AAA" not in tracked(ours.tracker)
    ours.free("AAA")
    if "XXX" not in tracked(ours.tracker):
        ours.tracker.track_rows(Currency, ["XXX"])


@pytest.mark.parametrize(
    "statement",
    [
        sa.update(Currency).where(Currency.name == "ours").values(code=Currency.code + "!"),
        sa.update(Currency).where(Currency.code.in_(["AAA", "ZZZ"])).values(code="XXX"),
    ],
    ids=["by another column", "of several"],
)
def test_keys_that_change_unseen_are_said_and_doubtful(any_driver_engine, statement):
    """What is there under an old key now may be anybody's: it is left, and the error says so."""
    engine = any_driver_engine
    metadata = sa.MetaData()
    table = Currency.__table__.to_metadata(metadata)
    table.c.code.type = sa.String(9)
    table.create(engine)
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    tracker.start()
    with engine.begin() as connection:
        connection.execute(sa.insert(Currency), [{"code": c, "name": "ours"} for c in CODES])
    with engine.begin() as connection:
        connection.execute(statement.execution_options(synchronize_session=False))
        there = connection.scalars(sa.select(Currency.code)).all()
    with pytest.warns(UntrackedRowsWarning, match="changed primary keys"):
        assert tracked(tracker) == []
    tracker.stop()
    assert "AAA" not in there
    bystanders.insert(Currency, {"code": "AAA", "name": "theirs"})
    with pytest.raises(CleanupError, match="AAA"):
        CleanupManager(tracker).cleanup()
    with engine.begin() as connection:
        connection.execute(sa.delete(Currency).where(Currency.name == "ours"))
    bystanders.assert_untouched()


def test_an_update_of_other_columns_changes_nothing(ours):
    with Session(ours.engine) as session:
        session.execute(sa.update(Currency).values(name="still ours"))
        session.execute(sa.update(Currency).where(Currency.name == "nobody's").values(code="ZZZ"))
        session.commit()
    assert tracked(ours.tracker) == CODES


class Colour(enum.Enum):
    RED = "r"


class Number(enum.IntEnum):
    SEVEN = 7


class Id(sa.TypeDecorator[uuid.UUID]):
    """Takes a text too, as many projects' types for a UUID do."""

    impl = sa.String(36)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else str(value)

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else uuid.UUID(value)


SOME = uuid.UUID("6f1c36a5-98b1-4c0e-b8a1-1d1f0c2b3a4d")
SENT: dict[str, tuple[Any, list[tuple[Any, Any]]]] = {
    "integer": (
        sa.Integer(),
        [("10", 10), (Decimal(11), 11), (12.0, 12), (True, 1), (Number.SEVEN, 7)],
    ),
    "big": (sa.BigInteger(), [("90000000001", 90000000001)]),
    "text": (sa.String(36), [(5, "5"), (SOME, str(SOME))]),
    "numeric": (sa.Numeric(8, 2), [(5, Decimal(5)), ("6.25", Decimal("6.25"))]),
    "uuid": (sa.Uuid(), [(str(SOME), SOME)]),
    "own type": (Id(), [(str(SOME), SOME)]),
    "enum": (sa.Enum(Colour), [("RED", Colour.RED)]),
    "boolean": (sa.Boolean(), [(1, True)]),
}
"""By the type of the column, keys as a driver may take them, and as a SELECT gives them."""


@drivers_in_turn("any_driver_engine", composite=[False, True])
def test_a_key_of_another_type_is_held_as_the_column_has_it(any_driver_engine, composite):
    """Else later statements, which name the row by its own key, are about somebody else's row."""
    engine = any_driver_engine
    metadata, tables = sa.MetaData(), {}
    for kind, (column_type, _keys) in SENT.items():
        part = [sa.Column("part", sa.Integer, primary_key=True)] if composite else []
        key = sa.Column("id", column_type, primary_key=True, autoincrement=False)
        tables[kind] = sa.Table(kind, metadata, *part, key, sa.Column("name", sa.String(9)))
    metadata.create_all(engine)
    taken = []
    for kind, (_type, keys) in SENT.items():
        table = tables[kind]
        for given, own in keys:
            values = {"id": given} | ({"part": "3"} if composite else {})
            stored = (3, own) if composite else (own,)
            tracker = ResourceTracker(engine)
            with CleanupManager(tracker) as cleanup:
                try:
                    with engine.begin() as connection:
                        connection.execute(sa.insert(table).values(name="a", **values))
                except sa.exc.StatementError:  # a driver that does not take it
                    continue
                taken.append(kind)
                (row,) = tracker.rows()
                assert row.key == stored
                assert [*map(type, row.key)] == [*map(type, stored)]
                with engine.begin() as connection:
                    assert row.key == connection.execute(sa.select(*table.primary_key)).one()
                    its = zip(table.primary_key, stored, strict=True)
                    connection.execute(sa.delete(table).where(*(c == value for c, value in its)))
                assert len(tracker) == 0
                with engine.begin() as connection:
                    connection.execute(sa.insert(table), [values | {"name": "a"}])
                tracker.track_rows(table, [stored if composite else own])
                assert len(tracker) == 1
            assert cleanup.report.total_deleted == 1
    assert {"integer", "big", "numeric", "own type", "enum", "boolean"} <= {*taken}


def test_a_key_that_has_no_sure_form_of_its_column_is_asked_of_the_database(engine):
    table = sa.Table("things", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    table.create(engine)
    bystanders = Bystanders(engine)
    bystanders.insert(table, {"id": 7})
    with CleanupManager(ResourceTracker(engine)) as cleanup, engine.begin() as connection:
        connection.execute(sa.insert(table).values(id="010"))
    assert cleanup.report.total_deleted == 1
    bystanders.assert_untouched()


def test_an_integer_of_numpy_is_one_where_the_driver_takes_it_for_one(engine):
    """SQLite's driver stores its bytes, which are the key then."""
    numpy = pytest.importorskip("numpy")
    part = sa.Column("part", sa.Integer, primary_key=True, autoincrement=False)
    code = sa.Column("code", sa.String(9), primary_key=True)
    table = sa.Table("things", sa.MetaData(), part, code)
    table.create(engine)
    bystanders = Bystanders(engine)
    bystanders.insert(table, {"part": 7, "code": "a"})
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        with engine.begin() as connection:
            connection.execute(sa.insert(table).values(part=numpy.int64(5), code="a"))
        if engine.dialect.name != "sqlite":
            assert [[*map(type, row.key)] for row in tracker.rows()] == [[int, str]]
    assert cleanup.report.total_deleted == 1
    bystanders.assert_untouched()


def test_a_key_that_the_driver_stores_in_a_form_of_its_own_names_no_other_row(engine):
    """PostgreSQL makes 10 of 10.0, and true of True."""
    table = sa.Table("texts", sa.MetaData(), sa.Column("id", sa.String(9), primary_key=True))
    table.create(engine)
    others = {"10.0", "t", "1E+1"}
    bystanders = Bystanders(engine)
    bystanders.insert(table, *({"id": key} for key in sorted(others)))
    for key in (10.0, True, Decimal("1E+1")):
        cleanup = CleanupManager(ResourceTracker(engine))
        told = 0
        try:
            with cleanup, engine.begin() as connection:
                connection.execute(sa.insert(table).values(id=key))
        except CleanupError as error:  # a row of ours may stay, if that is said
            told = len(error.leftovers)
        except sa.exc.StatementError:  # a driver that does not take it
            continue
        with engine.begin() as connection:
            left = {*connection.execute(sa.select(table.c.id)).scalars()}
            assert others <= left
            assert len(left) == len(others) + told
            connection.execute(sa.delete(table).where(table.c.id.not_in(others)))
    bystanders.assert_untouched()
