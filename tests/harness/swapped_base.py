"""A pytest plugin that gives a suite TrackedFactory in place of factory_boy's base classes.

Models that are not mapped are added to a session that is a mock. With TIDYROWS_SWAPPED=tracked
each test has an active tracker too, of a database without tables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar
from unittest import mock

import factory
import factory.alchemy
import factory.base
import pytest
import sqlalchemy as sa

from tidyrows import CleanupManager, ResourceTracker, TrackedFactory, WorkerContext, worker

T = TypeVar("T")


class Factory(TrackedFactory[T]):
    class Meta:
        abstract = True
        sqlalchemy_session = mock.NonCallableMagicMock()


factory.alchemy.SQLAlchemyModelFactory = TrackedFactory
factory.Factory = factory.base.Factory = Factory
worker._process.current = WorkerContext("lone", "main", 0)  # one worker counts 0, 1, 2


@pytest.fixture(autouse=True)
def _tracked(tmp_path: Path) -> Iterator[None]:
    if os.environ.get("TIDYROWS_SWAPPED") != "tracked":
        yield
        return
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'tracked.db'}")
    with CleanupManager(ResourceTracker(engine)):
        yield
    engine.dispose()
