"""Who and what a scenario speaks of."""

from __future__ import annotations

from behave import register_type
from parse import with_pattern

from client import Customer
from factories import SignedInUserFactory


@with_pattern("Ann|Bob")
def person(text):
    return text


@with_pattern("kettle|pan|lamp")
def thing(text):
    return text


@with_pattern('[^"]*')
def quoted(text):
    return text


register_type(Person=person, Thing=thing, Text=quoted)


class Story:
    """One scenario's users, products and devices, by their names in the scenario.

    Attributes:
        answer: the shop's last one.
    """

    def __init__(self, context):
        self._context = context
        self.users = {}
        self.products = {}
        self.devices = {}
        self.answer = None

    def device(self, of=None, cookies=None):
        """A new device; ``of``: its name, by which it is found again."""
        made = self.devices[of] = Customer(self._context.shop, cookies)
        self._context.add_cleanup(made.http.close)
        return made

    def sign_in(self, name):
        user = self.users[name] = SignedInUserFactory(shop=self._context.shop, name=name)
        return self.device(name, user.cookies)

    def scalar(self, query):
        return self._context.tidy.session.scalar(query)
