"""Every factory of the zoo makes its rows, all are ours, and none is left."""

from __future__ import annotations

from harness import factories
from harness.bystanders import Bystanders
from harness.pairs import drivers_in_turn
from harness.strangers import strangers
from tidyrows import CleanupManager, ResourceTracker

CALLS = {
    "orgs": (factories.OrgFactory, {}, 1),
    "users with a manager and two groups": (
        factories.UserFactory,
        {"managed": True, "groups": 2},
        8,  # two users, an org each, two groups, two memberships
    ),
    "orders with lines": (factories.OrderFactory, {}, 5),
    "a line alone": (factories.OrderLineFactory, {}, 4),
    "joined inheritance": (factories.EngineerFactory, {}, 3),
    "its middle": (factories.EmployeeFactory, {}, 2),
    "its root": (factories.PersonFactory, {}, 1),
    "single-table inheritance": (factories.DogFactory, {}, 1),
    "its sibling": (factories.CatFactory, {}, 1),
    "uuid keys": (factories.DocumentFactory, {}, 1),
    "natural keys": (factories.CurrencyFactory, {}, 1),
    "converted keys": (factories.TicketFactory, {}, 1),
    "a player": (factories.PlayerFactory, {}, 2),
    "a cycle of rows": (factories.TeamFactory, {"captained": True}, 2),
}


def made(bystanders, engine):
    now = Bystanders(engine).expected
    return sum(map(len, now.added_since(bystanders.expected).values()))


@drivers_in_turn("any_driver_zoo_engine", call=tuple(CALLS))
def test_a_factory_of_the_zoo_makes_rows_and_leaves_none(any_driver_zoo_engine, call):
    factory, arguments, rows = CALLS[call]
    bystanders = strangers(any_driver_zoo_engine)
    tracker = ResourceTracker(any_driver_zoo_engine)
    with CleanupManager(tracker):
        factory(**arguments)
        assert made(bystanders, any_driver_zoo_engine) == rows
        assert len(tracker) == rows
    bystanders.assert_untouched()
