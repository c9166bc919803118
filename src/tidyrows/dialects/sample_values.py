"""A value for each type that only one database has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidyrows.dialects.mysql.sample_values import SAMPLE_VALUES as MYSQL
from tidyrows.dialects.postgresql.sample_values import SAMPLE_VALUES as POSTGRESQL

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.types import TypeEngine


def sample_of(kind: TypeEngine[Any]) -> Callable[[int], Any] | None:
    """A function from a number to a value of a type; None if the type is not one database's own.

    Different numbers give different values, as far as the type has them.
    """
    for each in type(kind).__mro__:
        make = POSTGRESQL.get(each) or MYSQL.get(each)
        if make is not None:
            return lambda number: make(number, kind)
    return None
