"""Products, baskets, orders."""

from __future__ import annotations

from behave import given, then, when
from sqlalchemy import func, select

from app.models import AuditRow, Order, Product
from factories import ProductFactory


@given("a {what:Thing}")
def a_product(context, what):
    context.story.products[what] = ProductFactory()


@given("a {what:Thing} for {cents:d} cents")
def a_product_for(context, what, cents):
    context.story.products[what] = ProductFactory(cents=cents)


@given("a {what:Thing}, {stock:d} in stock")
def a_rare_product(context, what, stock):
    context.story.products[what] = ProductFactory(stock=stock)


@given('a {what:Thing} named "{name:Text}"')
def a_named_product(context, what, name):
    context.story.products[what] = ProductFactory(name=name)


@given("the payment of {who:Person} will be {answered:w}")
def the_payment_will_be(context, who, answered):
    if answered == "refused":
        context.payments.refused.add(context.story.users[who].email)


@when("a guest looks at the products")
def looks(context):
    context.story.answer = context.story.device().products()


@when("a guest searches for the {what:Thing}")
def searches_for(context, what):
    context.story.answer = context.story.device().products(context.story.products[what].name)


@when('a guest searches for "{text:Text}"')
def searches(context, text):
    context.story.answer = context.story.device().products(text)


@when("{who:Person} puts {quantity:d} of the {what:Thing} into the basket")
def puts(context, who, quantity, what):
    story = context.story
    story.answer = story.devices[who].add_to_basket(story.products[what].sku, quantity)


@when('{who:Person} puts {quantity:d} of "{sku:Text}" into the basket')
def puts_by_sku(context, who, quantity, sku):
    context.story.answer = context.story.devices[who].add_to_basket(sku, quantity)


@when("{who:Person} puts into the basket")
def puts_several(context, who):
    for row in context.table:
        puts(context, who, int(row["quantity"]), row["what"])


@when("{who:Person} orders")
def orders(context, who):
    context.story.answer = context.story.devices[who].place_order()


@then("the page shows the {what:Thing}")
def shows(context, what):
    assert context.story.products[what].name in context.story.answer.text


@then("the page shows the {what:Thing} at {price}")
def shows_at(context, what, price):
    name = context.story.products[what].name
    assert f"<li>{name}: {price}</li>" in context.story.answer.text


@then("the page does not show the {what:Thing}")
def does_not_show(context, what):
    assert context.story.products[what].name not in context.story.answer.text


@then("the basket of {who:Person} has the {what:Thing}")
def basket_has(context, who, what):
    assert context.story.products[what].name in context.story.devices[who].basket().text


@then("the basket of the second device has no {what:Thing}")
def basket_has_no(context, what):
    page = context.story.devices["the second device"].basket().text
    assert context.story.products[what].name not in page


@then("the orders of {who:Person} have the {what:Thing}")
def orders_have(context, who, what):
    assert context.story.products[what].name in context.story.devices[who].orders().text


@then('the orders of {who:Person} have "{text:Text}" the {what:Thing}')
def orders_have_so_many(context, who, text, what):
    name = context.story.products[what].name
    assert f"{text} {name}" in context.story.devices[who].orders().text


@then("the orders of {who:Person} have no {what:Thing}")
def orders_have_no(context, who, what):
    assert context.story.products[what].name not in context.story.devices[who].orders().text


@then("the order costs {cents:d} cents")
def costs(context, cents):
    assert context.story.answer.json()["cents"] == cents


@then("there are {left:d} of the {what:Thing} in stock")
def stock(context, left, what):
    mine = Product.id == context.story.products[what].id
    assert context.story.scalar(select(Product.stock).where(mine)) == left


@then("{who:Person} has {n:d} orders")
def number_of_orders(context, who, n):
    mine = Order.user_id == context.story.users[who].id
    assert context.story.scalar(select(func.count()).select_from(Order).where(mine)) == n


@then('the audit of {who:Person} says "{said:Text}"')
def audited(context, who, said):
    mine = AuditRow.user_id == context.story.users[who].id
    rows = select(AuditRow.action).where(mine).order_by(AuditRow.id)
    assert ", ".join(context.tidy.session.scalars(rows)) == said
