"""A foreign key that a call gives wins over the declaration of its relationship."""

from __future__ import annotations

from functools import partial

import factory
import pytest
import sqlalchemy as sa
from factory.alchemy import SQLAlchemyModelFactory
from factory.errors import InvalidDeclarationError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from harness.factories import OrderFactory, OrderLineFactory, UserFactory
from harness.models import Order, User
from tidyrows import CleanupManager, ResourceTracker, TrackedFactory


def count(tracker, model):
    return sum(row.table.name == model.__tablename__ for row in tracker.rows())


def test_a_key_in_the_call_creates_no_parent_and_is_kept(zoo_engine):
    """In every way to call, and where the factory is a SubFactory or under a plain factory."""

    class PlainLineFactory(SQLAlchemyModelFactory):
        class Meta:
            model = OrderLineFactory._meta.model
            sqlalchemy_session_factory = lambda: tracker.session  # noqa: E731 -- as in factory_boy's manual

        line_no, sku = 1, "sku"
        order = factory.SubFactory(OrderFactory, lines=None)

    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker) as cleanup:
        user = UserFactory()
        orders = [
            OrderFactory(user_id=user.id),
            OrderFactory(user_id=user.id, user=None),
            *OrderFactory.create_batch(2, user_id=factory.Iterator([user.id])),
            OrderLineFactory(order__user_id=user.id).order,
            PlainLineFactory(order__user_id=user.id).order,
            OrderFactory.scoped_to(tracker).create(user_id=user.id),
        ]
        tracker.session.commit()
        assert {order.user_id for order in orders} == {user.id}
        assert all(order.user is user for order in orders)
        assert count(tracker, User) == 1
        assert OrderFactory.build(user_id=7).user is None
        assert not hasattr(OrderFactory.stub(user_id=7), "user")
        assert UserFactory(managed=True, manager_id=user.id).manager is user
        assert UserFactory(managed=True, manager_id=None).manager is None
        assert OrderFactory(user=user).user is user
        assert count(tracker, User) == 3
        with pytest.raises(sa.exc.DBAPIError):
            OrderFactory(user_id=None)
        assert OrderFactory(user=user, user_id=user.id).user is user
        other = UserFactory()
        other_id = other.id
        tracker.session.expire(other)  # nothing has to be loaded for the comparison
        for make in (OrderFactory, partial(OrderFactory.create_bulk, 1)):
            with pytest.raises(InvalidDeclarationError, match=rf"id is {other_id}, and user_id="):
                make(user=other, user_id=orders[0].user_id)
    assert not cleanup.report.leftovers
    with Session(zoo_engine) as session:
        assert session.scalars(sa.select(Order)).all() == []


def test_a_key_and_values_of_a_new_parent_are_refused_by_name():
    with pytest.raises(InvalidDeclarationError, match=r"OrderFactory .* user_id, .* user__name"):
        OrderFactory.build(user_id=7, user__name="new")
    with pytest.raises(InvalidDeclarationError, match=r"OrderFactory .* user_id, .* user__name"):
        OrderLineFactory.build(order__user_id=7, order__user__name="new")


class Base(DeclarativeBase):
    pass


class Place(Base):
    __tablename__ = "places"
    country: Mapped[str] = mapped_column(sa.String(2), primary_key=True)
    town: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Visit(Base):
    __tablename__ = "visits"
    __table_args__ = (
        sa.ForeignKeyConstraint(["in_country", "in_town"], ["places.country", "places.town"]),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    land: Mapped[str] = mapped_column("in_country", sa.String(2))
    town_no: Mapped[int] = mapped_column("in_town")
    note: Mapped[str | None] = mapped_column(sa.String(40))
    place: Mapped[Place] = relationship()


class PlaceFactory(TrackedFactory[Place]):
    class Meta:
        model = Place

    country = "no"
    town = factory.Sequence(int)


class VisitFactory(TrackedFactory[Visit]):
    class Meta:
        model = Visit
        rename = {"land_": "land"}  # noqa: RUF012 -- factory_boy's way

    place = factory.SubFactory(PlaceFactory)


def test_a_composite_key_wins_if_all_of_it_is_given(engine):
    Base.metadata.create_all(engine)

    class Finding(VisitFactory):
        class Meta:
            sqlalchemy_get_or_create = ("place",)

    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        there = PlaceFactory()
        town = there.town
        visit = VisitFactory(land="no", town_no=town)
        assert visit.place is there
        assert Finding(land="no", town_no=town) is visit, "found by the key in place of the place"
        assert VisitFactory(land_="no", town_no=town).place is there
        assert count(tracker, Place) == 1
        assert VisitFactory(town_no=town).place is not there
    assert cleanup.report.total_deleted == 5


def test_a_key_that_the_factory_declares_is_as_in_factory_boy():
    class Declaring(OrderFactory):
        user_id = 7

    built = Declaring.build(), OrderFactory.build(note="n")
    assert all(isinstance(order.user, User) for order in built)


def test_a_parent_that_the_model_does_not_get_is_made_all_the_same():
    """As a parameter it is there for the other declarations, and factory_boy lets the key win."""

    class ByParameter(TrackedFactory[Order]):
        class Meta:
            model = Order

        class Params:
            user = factory.SubFactory(UserFactory, name="parameter")

        user_id = factory.SelfAttribute("user.id")
        note = factory.SelfAttribute("user.name")

    built = ByParameter.build(user_id=7)
    assert (built.user_id, built.user, built.note) == (7, None, "parameter")


def test_a_declaration_that_reads_the_parent_is_told_why_there_is_none():
    class Reading(OrderFactory):
        note = factory.SelfAttribute("user.name")

    assert Reading.build(user__name="n").note == "n"
    with pytest.raises(AttributeError, match=r"user is left out, since user_id is given"):
        Reading.build(user_id=7)
