"""What factories are asked for: lists for many-to-many relationships, and polymorphic models."""

from __future__ import annotations

import factory
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from harness.factories import (
    AnimalFactory,
    DogFactory,
    EngineerFactory,
    GroupFactory,
    OrderFactory,
    OrderLineFactory,
    PersonFactory,
    UserFactory,
)
from harness.models import Animal, Dog, Engineer, Order, OrderLine, Person, user_groups
from tidyrows import BulkError, CleanupManager, ResourceTracker, TrackedFactory


def test_a_list_joins_objects_with_a_hook_and_without(zoo_engine):
    class Plain(UserFactory):
        groups = None  # no hook: the model's own attribute

    class Declared(UserFactory):
        groups = factory.List([factory.SubFactory(GroupFactory)])

    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker) as cleanup:
        groups = GroupFactory.create_batch(2)
        for kind in (UserFactory, Plain, Declared):
            user = kind(groups=groups)
            assert user.groups == groups
            assert [each.groups for each in kind.create_batch(2, groups=list(groups))] == [
                groups
            ] * 2
        assert len(Declared().groups) == 1
        new = Plain(groups=GroupFactory.build_batch(2))
        assert all(group.id for group in new.groups)
        assert Plain.build(groups=groups[:0]).groups == []
        assert Plain(groups=[]).groups == []
        with zoo_engine.connect() as connection:
            pairs = connection.scalar(sa.select(sa.func.count()).select_from(user_groups))
        assert pairs == 3 * 3 * 2 + 1 + 2
    assert not cleanup.report.leftovers


def test_objects_in_place_of_a_related_factory_are_the_relationship(zoo_engine):
    """factory_boy leaves the relationship empty."""

    class HolderFactory(UserFactory):
        orders = factory.RelatedFactory(OrderFactory, factory_related_name="user")

    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker) as cleanup:
        lines = [OrderLineFactory.build(order=None, line_no=number) for number in (7, 8)]
        order = OrderFactory(lines=lines)
        assert order.lines == lines
        assert len(OrderFactory().lines) == 2
        assert OrderFactory(lines=None).lines == OrderFactory(lines=[]).lines == []
        holder = HolderFactory(orders=[order])
        assert holder.orders == [order]
        line = OrderLineFactory.build(order=None, line_no=9)
        assert line in OrderLineFactory(order__lines=[line]).order.lines
        built = OrderFactory.build(lines=[OrderLineFactory.build(order=None)])
        assert len(built.lines) == 1
        with pytest.raises(BulkError, match="lines"):
            OrderFactory.create_bulk(1, lines=lines)
        with Session(zoo_engine) as session:
            found = session.scalars(
                sa.select(OrderLine.line_no).where(OrderLine.order_id == order.id)
            )
            assert sorted(found) == [7, 8]
            assert session.get(Order, order.id).user_id == holder.id
    assert not cleanup.report.leftovers


def test_a_polymorphic_base_is_made_by_the_factories_of_its_subclasses(zoo_engine):
    """Also where a SubFactory or get_or_create is of the base."""

    class Kept(AnimalFactory):
        class Meta:
            sqlalchemy_get_or_create = ("name",)

    with CleanupManager(ResourceTracker(zoo_engine)) as cleanup:
        made = [AnimalFactory(), DogFactory(), PersonFactory(), EngineerFactory()]
        assert [type(each) for each in made] == [Animal, Dog, Person, Engineer]
        assert [each.kind for each in made] == ["animal", "dog", "person", "engineer"]
        assert Kept(name=made[1].name) is made[1]
        assert isinstance(factory.create(Dog, FACTORY_CLASS=TrackedFactory, name="made"), Dog)
    assert cleanup.report.total_deleted == 3 + 1 + 3
