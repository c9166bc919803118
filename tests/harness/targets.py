"""The databases and drivers that the one behaviour suite runs on."""

from __future__ import annotations

import pytest

DEFAULT = ("sqlite", "postgresql+psycopg", "mysql+pymysql")
"""One driver per database: what most tests need."""

ALL_DRIVERS = (*DEFAULT, "postgresql+psycopg2", "mysql+mysqldb")
"""Every driver at hand: for the main roads."""

DRIVERS = {
    backend: tuple(each for each in ALL_DRIVERS if each.partition("+")[0] == backend)
    for backend in ("sqlite", "postgresql", "mysql")
}
"""Those of each database."""

SEVERAL = frozenset(each for those in DRIVERS.values() if len(those) > 1 for each in those)
"""The drivers of databases that have more than one."""

WITHOUT_FOREIGN_KEYS = "sqlite-nofk"
"""SQLite as it comes: foreign keys are declared and not enforced."""


def on(*targets: str, fixture: str = "database") -> pytest.MarkDecorator:
    """Run a test on these targets only; give the reason in a comment or docstring.

    Args:
        targets: names from :data:`ALL_DRIVERS`, or :data:`WITHOUT_FOREIGN_KEYS`.
        fixture: ``database`` (for ``engine``) or ``zoo_database`` (for ``zoo_engine``).

    Example:
        >>> @on("postgresql+psycopg")
        ... def test_only_there(engine): ...
    """
    return pytest.mark.parametrize(fixture, targets, indirect=True)


def mostly_on(*targets: str) -> pytest.MarkDecorator:
    """Run a test on these targets always, and on the other databases with ``-m soak``.

    For what costs a process or more, and does not ask which database it is.
    """
    others = [pytest.param(each, marks=pytest.mark.soak) for each in DEFAULT if each not in targets]
    return pytest.mark.parametrize("database", [*targets, *others], indirect=True)
