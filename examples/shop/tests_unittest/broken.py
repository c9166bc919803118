"""Tests that end badly, to see what is left. They are run only where this module is named.

SHOP_KEEP=1 python -m unittest discover -s tests_unittest -p broken.py
"""

from __future__ import annotations

import os
import signal

from factories import ProductFactory
from shop_case import ShopCase


class Broken(ShopCase):
    def order(self):
        customer = self.device(self.signed_in())
        customer.add_to_basket(ProductFactory().sku)
        customer.place_order()

    def test_1_that_fails_halfway(self):
        self.order()
        raise AssertionError("halfway")

    def test_2_whose_process_is_killed(self):
        self.order()
        os.kill(os.getpid(), signal.SIGKILL)
