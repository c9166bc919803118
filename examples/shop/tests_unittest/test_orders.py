"""Products, baskets, orders and payments."""

from __future__ import annotations

from sqlalchemy import func, select

from app.models import GIFT_CARD, AuditRow, Order, Product
from factories import PASSWORD, ProductFactory
from shop_case import ShopCase


class Products(ShopCase):
    def test_the_list_shows_a_product_and_its_price(self):
        product = ProductFactory(cents=1999)
        self.assertIn(f"<li>{product.name}: 19.99</li>", self.device().products().text)

    def test_a_search_finds_one_product_of_many(self):
        wanted, *others = ProductFactory.create_batch(3)
        page = self.device().products(wanted.name).text
        self.assertIn(wanted.name, page)
        for other in others:
            self.assertNotIn(other.name, page)

    def test_a_name_is_no_markup(self):
        product = ProductFactory(name="<b>bold</b>")
        self.assertNotIn(product.name, self.device().products("bold").text)


class Baskets(ShopCase):
    def test_a_basket_belongs_to_a_device(self):
        user, product = self.signed_in(), ProductFactory()
        self.device(user).add_to_basket(product.sku)
        other = self.device()
        other.log_in(user.email, PASSWORD)
        self.assertIn(product.name, self.device(user).basket().text)
        self.assertNotIn(product.name, other.basket().text)

    def test_a_full_basket_is_left_behind(self):
        """Nobody orders: the basket references the session, and the session the user."""
        customer = self.device(self.signed_in())
        self.assertEqual(customer.add_to_basket(ProductFactory().sku).status_code, 303)

    def test_what_cannot_be_put_into_a_basket(self):
        customer = self.device(self.signed_in())
        for sku, quantity, status in (("none", 1, 404), (GIFT_CARD, 0, 400)):
            with self.subTest(sku):
                self.assertEqual(customer.add_to_basket(sku, quantity).status_code, status)


class Orders(ShopCase):
    def stock_of(self, product):
        return self.scalar(select(Product.stock).where(Product.id == product.id))

    def audited(self, user):
        rows = select(AuditRow.action).where(AuditRow.user_id == user.id).order_by(AuditRow.id)
        return self.tidy.session.scalars(rows).all()

    def test_an_order_lowers_the_stock_and_is_audited(self):
        for quantity in (1, 2, 10):
            with self.subTest(quantity):
                user, product = self.signed_in(), ProductFactory(cents=150)
                customer = self.device(user)
                customer.add_to_basket(product.sku, quantity)
                answer = customer.place_order()
                self.assertEqual(answer.status_code, 201)
                self.assertEqual(answer.json()["cents"], 150 * quantity)
                self.assertEqual(self.stock_of(product), 10 - quantity)
                self.assertEqual(self.audited(user), ["logged in", "ordered"])
                self.assertIn(f"{quantity} x {product.name}", customer.orders().text)

    def test_an_order_of_several_products(self):
        customer = self.device(self.signed_in())
        for product in ProductFactory.create_batch(3, cents=100):
            customer.add_to_basket(product.sku)
            customer.add_to_basket(product.sku, 2)
        self.assertEqual(customer.place_order().json()["cents"], 900)

    def test_what_everybody_buys(self):
        """The gift card is nobody's: it stays, and its order lines go with their order."""
        customer = self.device(self.signed_in())
        customer.add_to_basket(GIFT_CARD)
        self.assertEqual(customer.place_order().status_code, 201)

    def test_everybody_sees_their_own_orders(self):
        product = ProductFactory()
        ann, bob = self.device(self.signed_in()), self.device(self.signed_in())
        ann.add_to_basket(product.sku)
        ann.place_order()
        self.assertIn(product.name, ann.orders().text)
        self.assertNotIn(product.name, bob.orders().text)

    def test_an_empty_basket_is_no_order(self):
        self.assertEqual(self.device(self.signed_in()).place_order().status_code, 400)

    def test_more_than_there_is_cannot_be_ordered(self):
        product = ProductFactory(stock=1)
        customer = self.device(self.signed_in())
        customer.add_to_basket(product.sku, 2)
        self.assertEqual(customer.place_order().status_code, 409)
        self.assertEqual(self.stock_of(product), 1)
        self.assertIn(product.name, customer.basket().text, "the basket is as it was")

    def test_a_refused_payment_leaves_no_order(self):
        user, product = self.signed_in(), ProductFactory()
        self.payments.refused.add(user.email)
        customer = self.device(user)
        customer.add_to_basket(product.sku)
        self.assertEqual(customer.place_order().status_code, 402)
        orders = select(func.count()).select_from(Order).where(Order.user_id == user.id)
        self.assertEqual(self.scalar(orders), 0)
        self.assertEqual(self.audited(user), ["logged in", "payment refused"])
        self.assertEqual(self.stock_of(product), 10)
