"""Tracked factories for the zoo: SubFactory, RelatedFactory, hooks, traits, get_or_create."""

from __future__ import annotations

import factory

from harness.models import (
    Animal,
    Cat,
    Currency,
    Document,
    Dog,
    Employee,
    Engineer,
    Group,
    Order,
    OrderLine,
    Org,
    Person,
    Player,
    Team,
    Ticket,
    User,
)
from tidyrows.factories import Scoped, TrackedFactory


class OrgFactory(TrackedFactory[Org]):
    class Meta:
        model = Org

    name = Scoped("org-{tag}")


class GroupFactory(TrackedFactory[Group]):
    class Meta:
        model = Group

    name = Scoped("group-{tag}")


class UserFactory(TrackedFactory[User]):
    """``UserFactory(groups=[...])`` or ``UserFactory(groups=2)`` joins groups in a hook."""

    class Meta:
        model = User

    class Params:
        managed = factory.Trait(manager=factory.SubFactory("harness.factories.UserFactory"))

    email = Scoped("user-{tag}@example.test")
    name = factory.Faker("first_name")
    org = factory.SubFactory(OrgFactory)

    @factory.post_generation
    def groups(self, create, extracted, **kwargs):
        if not create or not extracted:
            return
        if isinstance(extracted, int):
            extracted = GroupFactory.create_batch(extracted)
        self.groups.extend(extracted)


class OrderLineFactory(TrackedFactory[OrderLine]):
    class Meta:
        model = OrderLine

    order = factory.SubFactory("harness.factories.OrderFactory", lines=None)
    line_no = factory.Sequence(lambda n: n + 1)
    sku = Scoped("sku-{tag}")


class OrderFactory(TrackedFactory[Order]):
    """Two lines each; ``lines=None`` for none."""

    class Meta:
        model = Order

    user = factory.SubFactory(UserFactory)
    note = factory.Faker("sentence", nb_words=3)
    lines = factory.RelatedFactoryList(OrderLineFactory, factory_related_name="order", size=2)


class PersonFactory(TrackedFactory[Person]):
    class Meta:
        model = Person

    name = factory.Faker("first_name")


class EmployeeFactory(PersonFactory):
    class Meta:
        model = Employee


class EngineerFactory(EmployeeFactory):
    class Meta:
        model = Engineer


class AnimalFactory(TrackedFactory[Animal]):
    class Meta:
        model = Animal

    name = factory.Faker("first_name")


class DogFactory(AnimalFactory):
    class Meta:
        model = Dog


class CatFactory(AnimalFactory):
    class Meta:
        model = Cat


class DocumentFactory(TrackedFactory[Document]):
    class Meta:
        model = Document

    title = factory.Faker("word")


class CurrencyFactory(TrackedFactory[Currency]):
    """A natural key, which somebody else may have taken."""

    class Meta:
        model = Currency
        sqlalchemy_get_or_create = ("code",)

    code = "USD"
    name = factory.Faker("word")


class TicketFactory(TrackedFactory[Ticket]):
    class Meta:
        model = Ticket

    title = factory.Faker("word")


class TeamFactory(TrackedFactory[Team]):
    """``TeamFactory(captained=True)`` closes the cycle of the two tables with two rows."""

    class Meta:
        model = Team

    name = factory.Faker("word")

    @factory.post_generation
    def captained(self, create, extracted, **kwargs):
        if create and extracted:
            self.captain = PlayerFactory(team=self)


class PlayerFactory(TrackedFactory[Player]):
    class Meta:
        model = Player

    name = factory.Faker("first_name")
    team = factory.SubFactory(TeamFactory)
