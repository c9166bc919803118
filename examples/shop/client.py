"""What a customer does, over HTTP."""

from __future__ import annotations

import ssl

import httpx

TLS = ssl.create_default_context()
"""For all clients: httpx would make one for each, which takes longer than a log-in."""


class Customer:
    """A customer at one device. Each method returns the application's answer.

    Args:
        url: where the shop is.
        cookies: those of a user who has logged in.
    """

    def __init__(self, url, cookies=None):
        self.http = httpx.Client(base_url=url, cookies=cookies, timeout=60, verify=TLS)

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.http.close()

    def sign_up(self, email, password, name="Ann"):
        return self.http.post("/signup", data={"email": email, "password": password, "name": name})

    def log_in(self, email, password):
        return self.http.post("/login", data={"email": email, "password": password})

    def log_out(self):
        return self.http.post("/logout")

    def products(self, search=""):
        return self.http.get("/products", params={"q": search})

    def add_to_basket(self, sku, quantity=1):
        return self.http.post("/basket", data={"sku": sku, "quantity": quantity})

    def basket(self):
        return self.http.get("/basket")

    def place_order(self):
        return self.http.post("/orders")

    def orders(self):
        return self.http.get("/orders")
