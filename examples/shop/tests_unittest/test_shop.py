"""The core of it with plain unittest.

python -m unittest discover -s tests_unittest
"""

from __future__ import annotations

import os
import tempfile
import unittest
from pathlib import Path

from sqlalchemy import select

from app.models import GIFT_CARD, AuditRow, User, connect, create_schema
from client import Customer
from factories import PASSWORD, ProductFactory, SignedInUserFactory, UserFactory
from serving import running_payments, running_shop
from tidyrows.testing.tidy import Tidy


def setUpModule():
    folder = unittest.enterModuleContext(tempfile.TemporaryDirectory())
    url = os.environ.get("SHOP_DATABASE_URL") or f"sqlite:///{Path(folder, 'shop.db')}"
    ShopTest.engine = connect(url)
    unittest.addModuleCleanup(ShopTest.engine.dispose)
    create_schema(ShopTest.engine)
    ShopTest.payments = unittest.enterModuleContext(running_payments())
    ShopTest.url = unittest.enterModuleContext(running_shop(url, ShopTest.payments.url))


class ShopTest(unittest.TestCase):
    """A test with a shop, and with rows that are gone after it."""

    def setUp(self):
        self.tidy = self.enterContext(Tidy(self.engine, test=self.id(), own=[AuditRow]))

    def signed_in(self):
        return SignedInUserFactory(shop=self.url)

    def device(self, user=None):
        return self.enterContext(Customer(self.url, user.cookies if user else None))


class Accounts(ShopTest):
    def test_a_user_logs_in(self):
        user = UserFactory()
        customer = self.device()
        self.assertEqual(customer.log_in(user.email, PASSWORD).status_code, 303)
        self.assertEqual(customer.orders().status_code, 200)

    def test_a_wrong_password_is_refused(self):
        user = UserFactory()
        for password in ("", "wrong", PASSWORD.upper()):
            with self.subTest(password):
                self.assertEqual(self.device().log_in(user.email, password).status_code, 401)

    def test_a_stranger_is_refused(self):
        email = self.tidy.context.text("stranger-{tag}@example.test")
        self.tidy.tracker.track_query(select(AuditRow).where(AuditRow.email == email), late=True)
        self.assertEqual(self.device().log_in(email, PASSWORD).status_code, 401)

    def test_who_logs_out_is_out(self):
        user = self.signed_in()
        self.device(user).log_out()
        self.assertEqual(self.device(user).orders().status_code, 401)

    def test_who_signs_up_can_log_in(self):
        self.tidy.tracker.track_tagged(User.email, "new-{tag}@example.test", late=True)
        email = self.tidy.context.text("new-{tag}@example.test")
        self.assertEqual(self.device().sign_up(email, PASSWORD).status_code, 303)
        self.assertEqual(self.device().log_in(email, PASSWORD).status_code, 303)


class Orders(ShopTest):
    def test_an_order_is_on_the_list(self):
        product = ProductFactory(cents=150)
        customer = self.device(self.signed_in())
        customer.add_to_basket(product.sku, 2)
        self.assertEqual(customer.place_order().json()["cents"], 300)
        self.assertIn(f"2 x {product.name}", customer.orders().text)

    def test_what_everybody_buys(self):
        customer = self.device(self.signed_in())
        customer.add_to_basket(GIFT_CARD)
        self.assertEqual(customer.place_order().status_code, 201)

    def test_everybody_sees_their_own_orders(self):
        product = ProductFactory()
        ann, bob = self.device(self.signed_in()), self.device(self.signed_in())
        ann.add_to_basket(product.sku)
        ann.place_order()
        self.assertNotIn(product.name, bob.orders().text)

    def test_a_refused_payment_leaves_the_basket(self):
        user, product = self.signed_in(), ProductFactory()
        self.payments.refused.add(user.email)
        customer = self.device(user)
        customer.add_to_basket(product.sku)
        self.assertEqual(customer.place_order().status_code, 402)
        self.assertIn(product.name, customer.basket().text)

    def test_a_guest_must_log_in_first(self):
        for what in ("basket", "orders", "place_order", "log_out"):
            with self.subTest(what):
                self.assertEqual(getattr(self.device(), what)().status_code, 401)


if __name__ == "__main__":
    unittest.main()
