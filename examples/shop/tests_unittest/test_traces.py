"""What becomes of the rows that the application made."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from app.models import AuditRow
from factories import ProductFactory
from shop_case import ShopCase
from tidyrows import CleanupError, CleanupManager
from tidyrows.testing import Tidy


def by_table(rows):
    return {table.name: len(found) for table, found in rows.items()}


def order(customer, product):
    customer.add_to_basket(product.sku)
    return customer.place_order()


class TracesCase(ShopCase):
    def inner(self, **options):
        """A test within the test, whose report can be looked at."""
        return Tidy(self.make_tidy_engine(), test="inner", **options)


class Traces(TracesCase):
    def test_rows_of_the_application_go_with_ours(self):
        with self.inner(own=[AuditRow]) as tidy:
            customer = self.device(self.signed_in())
            order(customer, ProductFactory())
            customer.add_to_basket(ProductFactory().sku)
        self.assertEqual(
            by_table(tidy.report.dependents),
            {
                "audit_rows": 2,
                "basket_items": 1,
                "login_sessions": 1,
                "order_lines": 1,
                "orders": 1,
            },
        )
        self.assertFalse(tidy.report.detached)

    def test_audit_rows_that_nobody_owns_are_detached(self):
        """An audit row may be without its user, so it stays, and is reported."""
        with self.inner() as tidy:
            order(self.device(self.signed_in()), ProductFactory())
        self.assertEqual(by_table(tidy.report.detached), {"audit_rows": 2})
        (rows,) = tidy.report.detached.values()
        # So that this test leaves nothing all the same:
        self.tidy.tracker.track_rows(AuditRow, [row.key for row in rows])


class Requests(TracesCase):
    """The shop waits for the payment, with an order that it has not committed."""

    @contextmanager
    def ordering(self):
        """An order in a thread, whose payment has arrived and is not answered."""
        with ThreadPoolExecutor() as pool, self.inner(own=[AuditRow]) as tidy:
            user, product = self.signed_in(), ProductFactory()
            customer, held = self.device(user), self.payments.hold(user.email)
            answer = pool.submit(order, customer, product)
            try:
                self.assertTrue(held.arrived.wait(60))
                yield tidy, user, held.answer.set, answer
            finally:
                held.answer.set()

    def test_a_request_that_is_still_running(self):
        for paid, status in ((True, 201), (False, 402)):
            with self.subTest(paid=paid):
                with self.ordering() as (tidy, user, pay, answer):
                    if not paid:
                        self.payments.refused.add(user.email)
                    impatient = {"own": [AuditRow], "lock_timeout": 0.2, "deadline": 0.5}
                    with self.assertRaisesRegex(CleanupError, "gave up"):
                        CleanupManager(tidy.tracker, **impatient).cleanup()
                    pay()
                    self.assertEqual(answer.result().status_code, status)
                self.assertFalse(tidy.report.leftovers, "nothing was lost")

    def test_a_request_that_ends_while_the_cleanup_runs(self):
        """The test does not wait for its own request; the cleanup does."""
        with self.ordering() as (tidy, _, pay, answer):
            pay()
        self.assertFalse(tidy.report.leftovers)
        self.assertEqual(answer.result().status_code, 201)
