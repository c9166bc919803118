"""What becomes of the rows that the application made."""

from __future__ import annotations

from threading import Thread

import pytest

from app.models import AuditRow
from factories import ProductFactory, SignedInUserFactory
from tidyrows import CleanupError, CleanupManager
from tidyrows.testing.tidy import Tidy

# Where a worker is killed, its controller deletes what the test of the mark had made.
pytestmark = [pytest.mark.tidy(own=[AuditRow]), pytest.mark.usefixtures("tidy")]


def by_table(rows):
    return {table.name: len(found) for table, found in rows.items()}


def order(customer, product):
    customer.add_to_basket(product.sku)
    return customer.place_order()


def test_rows_of_the_application_go_with_ours(tidy_engine, shop_url, device):
    with Tidy(tidy_engine, test="owned", own=[AuditRow]) as tidy:
        customer = device(SignedInUserFactory(shop=shop_url))
        order(customer, ProductFactory())
        customer.add_to_basket(ProductFactory().sku)
    assert by_table(tidy.report.dependents) == {
        "audit_rows": 2,
        "basket_items": 1,
        "login_sessions": 1,
        "order_lines": 1,
        "orders": 1,
    }
    assert not tidy.report.detached


def test_audit_rows_that_nobody_owns_are_detached(tidy, tidy_engine, shop_url, device):
    """An audit row may be without its user, so it stays, and is reported."""
    with Tidy(tidy_engine, test="detached") as inner:
        order(device(SignedInUserFactory(shop=shop_url)), ProductFactory())
    assert by_table(inner.report.detached) == {"audit_rows": 2}
    (rows,) = inner.report.detached.values()
    # So that this test leaves nothing all the same:
    tidy.tracker.track_rows(AuditRow, [row.key for row in rows])


@pytest.mark.parametrize("paid", [True, False])
def test_a_request_that_is_still_running(tidy_engine, shop_url, device, payments, paid):
    """The shop waits for the payment, with an order that it has not committed."""
    answers = []
    with Tidy(tidy_engine, test="running", own=[AuditRow]) as tidy:
        user = SignedInUserFactory(shop=shop_url)
        customer, product = device(user), ProductFactory()
        held = payments.hold(user.email)
        if not paid:
            payments.refused.add(user.email)
        request = Thread(target=lambda: answers.append(order(customer, product)))
        request.start()
        try:
            assert held.arrived.wait(60)
            impatient = CleanupManager(tidy.tracker, own=[AuditRow], lock_timeout=0.2, deadline=0.5)
            with pytest.raises(CleanupError, match="gave up"):
                impatient.cleanup()
        finally:
            held.answer.set()
            request.join()
    assert answers[0].status_code == (201 if paid else 402)
    assert not tidy.report.leftovers, "the request is over, and nothing was lost"


def test_a_request_that_ends_while_the_cleanup_runs(tidy_engine, shop_url, device, payments):
    """The test does not wait for its own request; the cleanup does."""
    answers = []
    with Tidy(tidy_engine, test="not waited for", own=[AuditRow]) as tidy:
        user = SignedInUserFactory(shop=shop_url)
        customer, product = device(user), ProductFactory()
        held = payments.hold(user.email)
        request = Thread(target=lambda: answers.append(order(customer, product)))
        request.start()
        assert held.arrived.wait(60)
        held.answer.set()
    request.join()
    assert not tidy.report.leftovers
    assert answers[0].status_code == 201
