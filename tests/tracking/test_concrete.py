"""Concrete inheritance: a class's rows stand in several tables, under the same numbers."""

from __future__ import annotations

from typing import ClassVar

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.declarative import AbstractConcreteBase, ConcreteBase
from sqlalchemy.orm import DeclarativeBase, Session, configure_mappers, registry

from harness.bystanders import snapshot
from tidyrows import CleanupManager, NoPrimaryKeyError, ResourceTracker, UnknownTableError


class Base(DeclarativeBase):
    pass


class Person(ConcreteBase, Base):
    __tablename__ = "persons"
    id = sa.Column(sa.Integer, primary_key=True)
    text = sa.Column(sa.String(40))
    __mapper_args__: ClassVar = {"polymorphic_identity": "person", "concrete": True}


class Manager(Person):
    __tablename__ = "managers"
    id = sa.Column(sa.Integer, primary_key=True)
    text = sa.Column(sa.String(40))
    __mapper_args__: ClassVar = {"polymorphic_identity": "manager", "concrete": True}


class Shape(AbstractConcreteBase, Base):
    strict_attrs = True
    id = sa.Column(sa.Integer, primary_key=True)
    text = sa.Column(sa.String(40))


class Circle(Shape):
    __tablename__ = "circles"
    __mapper_args__: ClassVar = {"polymorphic_identity": "circle", "concrete": True}


class Square(Shape):
    __tablename__ = "squares"
    __mapper_args__: ClassVar = {"polymorphic_identity": "square", "concrete": True}


class Plain(Base):
    __tablename__ = "plain"
    id = sa.Column(sa.Integer, primary_key=True)
    text = sa.Column(sa.String(40))


class PlainBelow(Plain):
    __tablename__ = "plain_below"
    id = sa.Column(sa.Integer, primary_key=True)
    text = sa.Column(sa.String(40))
    __mapper_args__: ClassVar = {"concrete": True}


ALL = (Person, Manager, Circle, Square, Plain, PlainBelow)
CASES = [
    (Person, (Person, Manager)),
    (Manager, (Manager,)),
    (Shape, (Circle, Square)),
    (Circle, (Circle,)),
    (Plain, (Plain,)),
    (PlainBelow, (PlainBelow,)),
]


@pytest.fixture
def tables(engine):
    """Each table with the rows 1 and 2."""
    configure_mappers()
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        for number in (1, 2):
            session.add_all([kind(id=number, text=f"row {number}") for kind in ALL])
            session.flush()
        session.commit()
    yield engine
    Base.metadata.drop_all(engine)


def left(engine):
    with engine.connect() as connection:
        return {
            kind: connection.scalars(sa.select(kind.__table__.c.id).order_by("id")).all()
            for kind in ALL
        }


@pytest.mark.parametrize(("model", "kinds"), CASES)
def test_a_query_owns_each_row_in_its_own_table(tables, model, kinds):
    tracker = ResourceTracker(tables)
    with CleanupManager(tracker):
        assert tracker.track_query(sa.select(model).where(model.id == 1)) == len(kinds)
    assert left(tables) == {kind: [2] if kind in kinds else [1, 2] for kind in ALL}


@pytest.mark.parametrize(("model", "kinds"), CASES)
def test_a_tag_owns_each_row_in_its_own_table(tables, model, kinds):
    tracker = ResourceTracker(tables)
    tagged = tracker.context.text("x-{tag}")
    with tables.begin() as connection:
        for kind in ALL:
            table = kind.__table__
            connection.execute(table.update().where(table.c.id == 2).values(text=tagged))
    with CleanupManager(tracker):
        assert tracker.track_tagged(model.text, "x-{tag}") == len(kinds)
    assert left(tables) == {kind: [1] if kind in kinds else [1, 2] for kind in ALL}


@pytest.mark.parametrize(("model", "kinds"), CASES)
def test_preserved_rows_are_put_back_in_their_own_table(tables, model, kinds):
    before = snapshot(tables)
    tracker = ResourceTracker(tables)
    with CleanupManager(tracker):
        assert tracker.preserve(sa.select(model)) == 2 * len(kinds)
        with tables.begin() as connection:
            for kind in kinds:
                connection.execute(kind.__table__.update().values(text="changed"))
    assert snapshot(tables) == before


def test_a_key_whose_columns_have_another_order_in_the_table_below(engine):
    class Other(DeclarativeBase):
        pass

    number = {"primary_key": True, "autoincrement": False}

    class Seat(ConcreteBase, Other):
        __tablename__ = "seats"
        row = sa.Column(sa.Integer, **number)
        place = sa.Column(sa.Integer, **number)
        __mapper_args__: ClassVar = {"polymorphic_identity": "seat", "concrete": True}

    class Box(Seat):
        __tablename__ = "boxes"
        place = sa.Column(sa.Integer, **number)
        row = sa.Column(sa.Integer, **number)
        __mapper_args__: ClassVar = {"polymorphic_identity": "box", "concrete": True}

    configure_mappers()
    Other.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([Box(row=1, place=2), Box(row=2, place=1), Seat(row=3, place=3)])
        session.commit()
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker):
        assert tracker.track_query(sa.select(Seat).where(Seat.row == 1)) == 1
    with engine.connect() as connection:
        assert connection.execute(sa.select(Box.__table__.c.row)).scalars().all() == [2]
    Other.metadata.drop_all(engine)


def test_a_class_of_a_join_is_refused_by_name(sqlite_engine):
    """Its rows are tracked where they are made; only to name them, no one table is meant."""

    class Joined:
        pass

    person, circle = Person.__table__, Circle.__table__
    both = person.join(circle, person.c.id == circle.c.id)
    registry().map_imperatively(
        Joined,
        both,
        properties={"id": [person.c.id, circle.c.id], "text": [person.c.text, circle.c.text]},
    )
    Base.metadata.create_all(sqlite_engine)
    tracker = ResourceTracker(sqlite_engine)
    made = Joined()
    made.id, made.text = 1, "one"
    with CleanupManager(tracker) as cleanup:
        with Session(sqlite_engine) as session:
            session.add(made)
            session.commit()
        for refused in (
            lambda: tracker.track_rows(Joined, [1]),
            lambda: tracker.track_query(sa.select(Joined)),
            lambda: tracker.mine(Joined),
        ):
            with pytest.raises(UnknownTableError, match="Joined is mapped to a join or a query"):
                refused()
    assert cleanup.report.total_deleted == 2


def test_rows_without_a_key_are_not_said_to_be_nobodys(sqlite_engine):
    keyless = sa.Table("keyless", sa.MetaData(), sa.Column("text", sa.String(40)))
    tracker = ResourceTracker(sqlite_engine)
    with pytest.raises(NoPrimaryKeyError, match="keyless has no primary key"):
        tracker.mine(keyless)


def test_a_kind_that_no_class_has_is_never_looked_for_under_its_number(tables, monkeypatch):
    monkeypatch.delitem(sa.inspect(Person).polymorphic_map, "manager")
    tracker = ResourceTracker(tables)
    with CleanupManager(tracker), pytest.raises(UnknownTableError, match="of kind 'manager'"):
        tracker.track_query(sa.select(Person))
    assert left(tables) == {kind: [1, 2] for kind in ALL}
