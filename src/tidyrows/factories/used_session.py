"""The session of ``UserFactory.using(session)``, for all factories that a call reaches."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sqlalchemy import orm

from tidyrows.arguments import Kind
from tidyrows.greenlets import AsyncRegistry, is_async, synchronous

if TYPE_CHECKING:
    from collections.abc import Callable

_used: ContextVar[Any] = ContextVar("tidyrows_used_session", default=None)

used_session: Callable[[], Any] = _used.get
"""The session of the ``using`` of this context, as it was given, or None."""


class using:  # noqa: N801 -- used as a function is
    """A block in which factories use a session.

    No generator, for the reason of :class:`tidyrows.capture.ownership.entered`.
    """

    def __init__(self, session: Any) -> None:
        self._session = session

    def __enter__(self) -> None:
        self._token = _used.set(self._session)

    def __exit__(self, *_error: object) -> None:
        _used.reset(self._token)


def session_behind(session: Any) -> orm.Session | None:
    """The Session itself: of a registry, or under an asynchronous one. None for a mock."""
    if is_async(session):
        session = synchronous(session)
    if issubclass(type(session), (orm.scoped_session, AsyncRegistry)):
        session = session()
    return session if issubclass(type(session), orm.Session) else None


def _is_session(session: Any) -> bool:
    is_registry = hasattr(session, "registry")
    if is_async(session):
        return is_registry or hasattr(session, "sync_session")
    return isinstance(session, (orm.Session, orm.scoped_session))


SESSION = Kind(_is_session, "a Session, AsyncSession or registry of them", "Session(engine)")
