"""Factories of the shop's tests, whichever framework runs them."""

from __future__ import annotations

import factory

from app.models import Product, User, hash_password
from client import Customer
from tidyrows import Scoped, TrackedFactory

PASSWORD = "correct horse battery staple"


class UserFactory(TrackedFactory[User]):
    class Meta:
        model = User

    class Params:
        password = PASSWORD

    email = Scoped("user-{tag}@example.test")
    name = factory.Faker("name")
    password_hash = factory.LazyAttribute(lambda user: hash_password(user.password))


class SignedInUserFactory(UserFactory):
    """A user who has logged in over HTTP: SignedInUserFactory(shop="http://127.0.0.1:8000").

    The application makes the login session; ``user.cookies`` is for an HTTP client or a browser.
    """

    class Meta:
        model = User
        # The application must see the user before the hook below: not one commit at the end.
        sqlalchemy_session_persistence = "commit"

    @factory.post_generation
    def shop(user, create, url, password=PASSWORD):
        if create:
            with Customer(url) as customer:
                answer = customer.log_in(user.email, password)
            assert answer.is_redirect, f"{user.email} cannot log in: {answer}"
            user.cookies = dict(answer.cookies)


class ProductFactory(TrackedFactory[Product]):
    class Meta:
        model = Product

    sku = Scoped("sku-{tag}")
    name = Scoped("Kettle {tag}")
    cents = 1250
    stock = 10
