"""The shop: log in, fill a basket, order. It commits for itself, as any application does.

SHOP_DATABASE_URL=sqlite:///shop.db python -m app.web
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import secrets
import sys
from threading import Thread

import httpx
from flask import Flask, abort, g, redirect, render_template_string, request
from sqlalchemy import Engine, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, selectinload
from werkzeug.serving import make_server

from app.models import (
    AuditRow,
    BasketItem,
    LoginSession,
    Order,
    OrderLine,
    Product,
    User,
    connect,
    create_schema,
    hash_password,
    is_password,
    now,
)

COOKIE = "shop_session"
SHORTEST_PASSWORD = 8

PAGE = """<!doctype html><title>{{ title }}</title><h1>{{ title }}</h1>
<p id="who">{{ user.name if user else "Not signed in" }}</p>
<ul>{% for line in lines %}<li>{{ line }}</li>{% endfor %}</ul>
{% if form %}<form method="post">{% for field in form %}
<label>{{ field }}
<input name="{{ field }}" type="{{ 'password' if field == 'password' else 'text' }}">
</label>{% endfor %}<button>{{ title }}</button></form>{% endif %}"""


def create_app(engine: Engine, payments: str | None = None) -> Flask:
    """The application.

    Args:
        engine: its database.
        payments: where orders are paid; None where they are free.
    """
    app = Flask("shop")
    http = httpx.Client(timeout=60)

    @app.before_request
    def begin():
        g.db = Session(engine, expire_on_commit=False)
        g.login = None
        token = request.cookies.get(COOKIE)
        if token:
            g.login = g.db.get(LoginSession, token, options=[selectinload(LoginSession.user)])

    @app.teardown_request
    def end(_error):
        g.db.close()

    @app.get("/health")
    def health():
        return "ok"

    @app.get("/login")
    def login_page():
        return page("Log in", form=("email", "password"))

    @app.post("/login")
    def log_in():
        email = request.form.get("email", "")
        user = g.db.scalar(select(User).where(User.email == email))
        if not is_password(user, request.form.get("password", "")):
            audit("log-in refused", email, user)
            g.db.commit()
            abort(401)
        user.last_login = now()
        return signed_in(user, "logged in")

    @app.post("/logout")
    def log_out():
        login = required()
        audit("logged out", login.user.email, login.user)
        for item in basket(login):
            g.db.delete(item)
        g.db.flush()
        g.db.delete(login)
        g.db.commit()
        answer = redirect("/login", 303)
        answer.delete_cookie(COOKIE)
        return answer

    @app.post("/signup")
    def sign_up():
        email, password = request.form["email"], request.form["password"]
        if not re.fullmatch(r"[^@\s]+@[^@\s]+", email) or len(password) < SHORTEST_PASSWORD:
            abort(400)
        user = User(email=email, name=request.form["name"], password_hash=hash_password(password))
        g.db.add(user)
        try:
            g.db.flush()
        except IntegrityError:
            g.db.rollback()
            abort(409)
        return signed_in(user, "signed up")

    @app.get("/products")
    def products():
        wanted = Product.name.contains(request.args.get("q", ""), autoescape=True)
        found = g.db.scalars(select(Product).where(wanted).order_by(Product.name))
        return page("Products", [f"{each.name}: {money(each.cents)}" for each in found])

    @app.post("/basket")
    def add_to_basket():
        login = required()
        product = g.db.scalar(select(Product).where(Product.sku == request.form["sku"]))
        if product is None:
            abort(404)
        quantity = request.form.get("quantity", 1, type=int)
        if quantity < 1:
            abort(400)
        item = g.db.get(BasketItem, (login.token, product.id))
        if item is None:
            g.db.add(BasketItem(token=login.token, product_id=product.id, quantity=quantity))
        else:
            item.quantity += quantity
        g.db.commit()
        return redirect("/basket", 303)

    @app.get("/basket")
    def show_basket():
        items = basket(required())
        return page("Basket", [f"{item.quantity} x {item.product.name}" for item in items])

    @app.post("/orders")
    def place_order():
        login = required()
        user, items = login.user, basket(login)
        if not items:
            abort(400)
        order = Order(user_id=user.id)
        for item in items:
            take_from_stock(item)
            line = OrderLine(
                product_id=item.product_id, quantity=item.quantity, cents=item.product.cents
            )
            order.lines.append(line)
            g.db.delete(item)
        g.db.add(order)
        g.db.flush()
        audit("ordered", user.email, user, order)
        g.db.flush()
        if not paid(user, order):
            g.db.rollback()
            audit("payment refused", user.email, user)
            g.db.commit()
            return "Payment refused", 402
        g.db.commit()
        return {"order": order.id, "cents": order.cents}, 201

    @app.get("/orders")
    def orders():
        login = required()
        mine = select(Order).where(Order.user_id == login.user_id).order_by(Order.id)
        return page("My orders", [in_one_line(order) for order in g.db.scalars(mine)])

    def required() -> LoginSession:
        if g.login is None:
            abort(401)
        return g.login

    def signed_in(user, action):
        login = LoginSession(token=secrets.token_hex(32), user_id=user.id)
        g.db.add(login)
        audit(action, user.email, user)
        g.db.commit()
        answer = redirect("/products", 303)
        answer.set_cookie(COOKIE, login.token, httponly=True, samesite="Lax")
        return answer

    def audit(action, email, user=None, order=None):
        g.db.add(
            AuditRow(
                action=action,
                email=email,
                user_id=user.id if user else None,
                order_id=order.id if order else None,
            )
        )

    def basket(login):
        mine = select(BasketItem).where(BasketItem.token == login.token)
        return g.db.scalars(mine.order_by(BasketItem.product_id)).all()

    def take_from_stock(item):
        if item.product.stock is None:
            return
        taken = g.db.execute(
            update(Product)
            .where(Product.id == item.product_id, Product.stock >= item.quantity)
            .values(stock=Product.stock - item.quantity)
        )
        if taken.rowcount == 0:
            abort(409)

    def paid(user, order):
        if payments is None:
            return True
        charge = {"email": user.email, "cents": order.cents}
        return http.post(f"{payments}/charge", json=charge).json()["paid"]

    def page(title, lines=(), form=()):
        user = g.login.user if g.login else None
        return render_template_string(PAGE, title=title, lines=lines, form=form, user=user)

    return app


def in_one_line(order: Order) -> str:
    lines = (f"{line.quantity} x {line.product.name}" for line in order.lines)
    return f"Order {order.id}: {', '.join(lines)} = {money(order.cents)}"


def money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02}"


def main() -> None:
    options = argparse.ArgumentParser(description="The shop, on the loopback interface.")
    options.add_argument("--port", type=int, default=8000)
    options.add_argument("--fd", type=int, help="a listening socket to take; ends with its parent")
    given = options.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    engine = connect(os.environ["SHOP_DATABASE_URL"])
    create_schema(engine)
    app = create_app(engine, os.environ.get("SHOP_PAYMENTS_URL"))
    server = make_server("127.0.0.1", given.port, app, threaded=True, fd=given.fd)
    if given.fd is not None:
        Thread(target=_end_with_parent, daemon=True).start()
    server.serve_forever()


def _end_with_parent() -> None:
    # A killed parent ends nobody, but its end of the pipe is closed.
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
