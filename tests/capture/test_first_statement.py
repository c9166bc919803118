"""The statement that begins a transaction is an INSERT that was changed before it began."""

from __future__ import annotations

import sqlalchemy as sa

from harness.bystanders import Bystanders
from harness.models import Org
from harness.pairs import pairwise
from harness.targets import ALL_DRIVERS
from tidyrows import CleanupManager, ResourceTracker

FORMS = {
    "a list": lambda orgs: (sa.insert(orgs), [{"name": "one"}, {"name": "two"}]),
    "several values": lambda orgs: (sa.insert(orgs).values([{"name": "one"}, {"name": "two"}]),),
    "from select": lambda orgs: (
        sa.insert(orgs).from_select(
            ["name"], sa.select(sa.literal("one")).union_all(sa.select(sa.literal("two")))
        ),
    ),
    "returning": lambda orgs: (
        sa.insert(orgs).returning(orgs.c.name),
        [{"name": "one"}, {"name": "two"}],
    ),
}


@pairwise(any_driver_zoo_engine=ALL_DRIVERS, form=tuple(FORMS), end=["commit", "rollback"])
def test_the_first_statement_of_a_transaction_is_seen(any_driver_zoo_engine, form, end):
    bystanders = Bystanders(any_driver_zoo_engine)
    tracker = ResourceTracker(any_driver_zoo_engine)
    with CleanupManager(tracker) as cleanup:
        with any_driver_zoo_engine.connect() as connection:
            connection.execute(*FORMS[form](Org.__table__))
            getattr(connection, end)()
        assert len(tracker) == (2 if end == "commit" else 0)
    assert cleanup.report.total_deleted == (2 if end == "commit" else 0)
    bystanders.assert_untouched()
