"""Factories whose rows are tracked, and declarations of values that no other worker produces."""

from tidyrows.factories.column_values import column_maker
from tidyrows.factories.declarations import Scoped, ScopedEmail, ScopedInteger
from tidyrows.factories.factory import TrackedFactory
from tidyrows.factories.from_model import create_tree, factory_for
from tidyrows.factories.setup import Setup
from tidyrows.factories.unique import Unique

__all__ = [
    "Scoped",
    "ScopedEmail",
    "ScopedInteger",
    "Setup",
    "TrackedFactory",
    "Unique",
    "column_maker",
    "create_tree",
    "factory_for",
]
