"""The suite that every dialect must pass, on every database and driver."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from harness.databases import Database
from harness.targets import ALL_DRIVERS
from tidyrows.testing.dialect_suite import DialectSuite


@pytest.mark.parametrize("database", ALL_DRIVERS, indirect=True)
class TestBuiltIn(DialectSuite):
    @pytest.fixture
    def engine(self, database: Database) -> sa.Engine:
        return database.engine()
