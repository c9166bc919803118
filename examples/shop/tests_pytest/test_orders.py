"""Products, baskets and orders."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select

from app.models import GIFT_CARD, AuditRow, Order, Product
from factories import PASSWORD, ProductFactory

pytestmark = pytest.mark.tidy(own=[AuditRow])


def stock_of(tidy, product):
    return tidy.session.scalar(select(Product.stock).where(Product.id == product.id))


def audited(tidy, user):
    rows = select(AuditRow.action).where(AuditRow.user_id == user.id).order_by(AuditRow.id)
    return tidy.session.scalars(rows).all()


@pytest.mark.usefixtures("tidy")
def test_the_list_shows_a_product_and_its_price(device):
    product = ProductFactory(cents=1999)
    assert f"<li>{product.name}: 19.99</li>" in device().products().text


@pytest.mark.usefixtures("tidy")
def test_a_search_finds_one_product_of_many(device):
    wanted, *others = ProductFactory.create_batch(3)
    page = device().products(wanted.name).text
    assert wanted.name in page
    assert not any(other.name in page for other in others)


@pytest.mark.usefixtures("tidy")
def test_a_name_is_no_markup(device):
    product = ProductFactory(name="<b>bold</b>")
    assert product.name not in device().products("bold").text


@pytest.mark.parametrize("quantity", [1, 2, 10])
def test_an_order_lowers_the_stock_and_is_audited(tidy, signed_in, device, quantity):
    user, product = signed_in(), ProductFactory(cents=150)
    customer = device(user)
    customer.add_to_basket(product.sku, quantity)
    answer = customer.place_order()
    assert answer.status_code == 201
    assert answer.json()["cents"] == 150 * quantity
    assert stock_of(tidy, product) == 10 - quantity
    assert audited(tidy, user) == ["logged in", "ordered"]
    assert f"{quantity} x {product.name}" in customer.orders().text


@pytest.mark.usefixtures("tidy")
def test_an_order_of_several_products(signed_in, device):
    customer = device(signed_in())
    for product in ProductFactory.create_batch(3, cents=100):
        customer.add_to_basket(product.sku)
        customer.add_to_basket(product.sku, 2)
    assert customer.place_order().json()["cents"] == 900


@pytest.mark.usefixtures("tidy")
def test_what_everybody_buys(signed_in, device):
    """The gift card is nobody's: it stays, and its order lines go with their order."""
    customer = device(signed_in())
    customer.add_to_basket(GIFT_CARD)
    assert customer.place_order().status_code == 201


@pytest.mark.usefixtures("tidy")
def test_everybody_sees_their_own_orders(signed_in, device):
    product = ProductFactory()
    ann, bob = device(signed_in()), device(signed_in())
    ann.add_to_basket(product.sku)
    ann.place_order()
    assert product.name in ann.orders().text
    assert product.name not in bob.orders().text


@pytest.mark.usefixtures("tidy")
def test_an_empty_basket_is_no_order(signed_in, device):
    assert device(signed_in()).place_order().status_code == 400


@pytest.mark.usefixtures("tidy")
def test_a_basket_belongs_to_a_device(signed_in, device):
    user, product = signed_in(), ProductFactory()
    device(user).add_to_basket(product.sku)
    other = device()
    other.log_in(user.email, PASSWORD)
    assert product.name in device(user).basket().text
    assert product.name not in other.basket().text


def test_more_than_there_is_cannot_be_ordered(tidy, signed_in, device):
    product = ProductFactory(stock=1)
    customer = device(signed_in())
    customer.add_to_basket(product.sku, 2)
    assert customer.place_order().status_code == 409
    assert stock_of(tidy, product) == 1
    assert product.name in customer.basket().text, "the basket is as it was"


def test_a_refused_payment_leaves_no_order(tidy, signed_in, device, payments):
    user, product = signed_in(), ProductFactory()
    payments.refused.add(user.email)
    customer = device(user)
    customer.add_to_basket(product.sku)
    assert customer.place_order().status_code == 402
    mine = select(func.count()).select_from(Order).where(Order.user_id == user.id)
    assert tidy.session.scalar(mine) == 0
    assert audited(tidy, user) == ["logged in", "payment refused"]
    assert stock_of(tidy, product) == 10


@pytest.mark.usefixtures("tidy")
def test_a_full_basket_is_left_behind(signed_in, device):
    """Nobody orders: the basket references the session, and the session the user."""
    customer = device(signed_in())
    assert customer.add_to_basket(ProductFactory().sku).status_code == 303


@pytest.mark.parametrize(("sku", "quantity", "status"), [("none", 1, 404), (GIFT_CARD, 0, 400)])
@pytest.mark.usefixtures("tidy")
def test_what_cannot_be_put_into_a_basket(signed_in, device, sku, quantity, status):
    assert device(signed_in()).add_to_basket(sku, quantity).status_code == status


@pytest.mark.parametrize("what", ["basket", "orders", "place_order", "log_out"])
def test_a_guest_must_log_in_first(device, what):
    assert getattr(device(), what)().status_code == 401
