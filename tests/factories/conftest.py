"""A tracker that only gives a session, and counts what factories ask of it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from harness.models import Base
from tidyrows.capture.ownership import entered
from tidyrows.worker import WorkerContext


class SessionOnly:
    """What factories see of a ResourceTracker."""

    def __init__(self, session: Session, *, owns_session: bool = True, context: Any = None) -> None:
        self.session = session
        self.engines = self.sessions = self.store = self
        self.owns_session = owns_session
        self.context = context or WorkerContext.current()
        self.active = True
        self.is_async = False
        self.watched: list[Session] = []
        self.ended: list[str] = []
        sa.event.listen(session, "after_commit", lambda _: self.ended.append("commit"))
        sa.event.listen(session, "after_rollback", lambda _: self.ended.append("rollback"))

    @property
    def in_transaction(self) -> bool:
        return self.session.in_transaction()

    def is_transient(self, error: BaseException) -> bool:
        return False

    def uncertain_keys(self) -> set[Any]:
        return set()

    def watch(self, session: Session) -> None:
        self.watched.append(session)

    @contextmanager
    def block(self):
        with entered(self):
            yield self


@pytest.fixture
def shop(tmp_path):
    """An engine on SQLite with the zoo's tables."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def make_tracker(shop):
    """Trackers with a session each, on the zoo's tables."""
    sessions = []

    def make(**options: Any) -> SessionOnly:
        session = Session(options.pop("bind", shop), expire_on_commit=False)
        sessions.append(session)
        return SessionOnly(session, **options)

    yield make
    for session in sessions:
        session.close()


@pytest.fixture
def tracker(make_tracker):
    """The ambient tracker of the test."""
    with make_tracker().block() as tracker:
        yield tracker


@pytest.fixture
def rows(shop):
    """What another connection sees of a table: what is committed."""

    def count(model: Any) -> int:
        with shop.connect() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(model.__table__))

    return count
