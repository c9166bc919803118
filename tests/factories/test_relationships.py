"""What factories are asked for: lists for many-to-many relationships, and polymorphic models."""

from __future__ import annotations

import factory
import sqlalchemy as sa

from harness.factories import (
    AnimalFactory,
    DogFactory,
    EngineerFactory,
    GroupFactory,
    PersonFactory,
    UserFactory,
)
from harness.models import Animal, Dog, Engineer, Person, user_groups
from tidyrows import CleanupManager, ResourceTracker, TrackedFactory


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
