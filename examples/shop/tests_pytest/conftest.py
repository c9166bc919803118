"""What the tests need: a database that all workers share, and an application for each of them."""

from __future__ import annotations

import os
from functools import partial

import pytest

from accounts import ShopAccounts
from app.models import connect, create_schema
from client import Customer
from factories import SignedInUserFactory
from serving import running_payments, running_shop
from tidyrows import Accounts


@pytest.fixture(scope="session")
def database_url(tmp_path_factory):
    """SHOP_DATABASE_URL, else one SQLite file for all workers of the run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return os.environ.get("SHOP_DATABASE_URL") or f"sqlite:///{folder / 'shop.db'}"


@pytest.fixture(scope="session")
def tidy_engine(database_url):
    """The tests' own engine on it."""
    engine = connect(database_url)
    create_schema(engine)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def payments():
    """The payment service that this worker's shop uses."""
    with running_payments() as service:
        yield service


@pytest.fixture(scope="session")
def shop_url(database_url, payments):
    """This worker's shop."""
    with running_shop(database_url, payments.url) as url:
        yield url


@pytest.fixture
def signed_in(tidy, shop_url):
    """Makes users who have logged in, as ``signed_in(name="Ann")``."""
    return partial(SignedInUserFactory, shop=shop_url)


@pytest.fixture(scope="session")
def buyer(tidy_worker, tidy_engine, shop_url):
    """The login of an account that this worker has signed up, for all of its tests."""
    accounts = Accounts(ShopAccounts(shop_url, tidy_engine), username="buyer-{tag}@example.test")
    with tidy_worker:
        return accounts.log_in("buyer")


@pytest.fixture
def device(shop_url):
    """Makes customers' devices: of a guest by ``device()``, of a user by ``device(user)``."""
    made = []

    def make(user=None):
        made.append(Customer(shop_url, user.cookies if user else None))
        return made[-1]

    yield make
    for each in made:
        each.http.close()
