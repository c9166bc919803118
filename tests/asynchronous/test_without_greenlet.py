"""greenlet is an extra: everything synchronous works without it."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = """
import sys
sys.modules["greenlet"] = None  # an import of it fails

import asyncio
import sqlalchemy as sa
from sqlalchemy import orm
from tidyrows import CleanupManager, ResourceTracker, RetryPolicy, TrackedFactory, with_retries

class Base(orm.DeclarativeBase):
    pass

class Thing(Base):
    __tablename__ = "things"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str] = orm.mapped_column(default="a thing")

class ThingFactory(TrackedFactory[Thing]):
    class Meta:
        model = Thing

engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
Base.metadata.create_all(engine)
with CleanupManager(ResourceTracker(engine)) as cleanup:
    ThingFactory()
assert cleanup.report.total_deleted == 1
tries = []

def twice(connection):
    tries.append(1)
    if len(tries) == 1:
        raise ConnectionResetError

with_retries(engine, twice, retry=RetryPolicy(base=0.001))
assert len(tries) == 2
tracker = ResourceTracker(engine)
try:
    asyncio.run(tracker.run_sync(len))
except ModuleNotFoundError as error:
    assert 'pip install "tidyrows[postgresql-async]"' in str(error)
else:
    raise AssertionError("no error")
engine.dispose()
"""


def test_what_is_synchronous_works_without_greenlet():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
