"""What the tests share: one shop in each process, and rows that are gone after the test."""

from __future__ import annotations

import atexit
import os
import tempfile
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from app.models import AuditRow, connect, create_schema
from client import Customer
from factories import SignedInUserFactory
from serving import running_payments, running_shop
from tidyrows.testing import TidyTestCase


@cache
def place():
    """This process's engine, payment service and shop, until the process ends."""
    held = ExitStack()
    atexit.register(held.close)
    folder = held.enter_context(tempfile.TemporaryDirectory())
    url = os.environ.get("SHOP_DATABASE_URL") or f"sqlite:///{Path(folder, 'shop.db')}"
    engine = connect(url)
    held.callback(engine.dispose)
    create_schema(engine)
    payments = held.enter_context(running_payments())
    shop = held.enter_context(running_shop(url, payments.url))
    return SimpleNamespace(engine=engine, payments=payments, shop=shop)


class ShopCase(TidyTestCase):
    """A test with a shop. ``SHOP_KEEP=1`` leaves the rows of a failed test for study."""

    tidy_options = {  # noqa: RUF012 -- nobody changes it
        "own": [AuditRow],
        "keep_on_failure": bool(os.environ.get("SHOP_KEEP")),
    }

    @classmethod
    def make_tidy_engine(cls):
        return place().engine

    @property
    def shop(self):
        return place().shop

    @property
    def payments(self):
        return place().payments

    def signed_in(self, **fields):
        return SignedInUserFactory(shop=self.shop, **fields)

    def device(self, user=None):
        """A device of a guest, or of a user who has logged in."""
        return self.enterContext(Customer(self.shop, user.cookies if user else None))

    def scalar(self, query):
        return self.tidy.session.scalar(query)
