"""What a tracker is bound to, and the engines through which its rows are written."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy import event, orm
from sqlalchemy.exc import UnboundExecutionError

from tidyrows.capture.connections import open_connections
from tidyrows.capture.engine import Capture, capture_for, root_engine
from tidyrows.capture.ownership import TrackerStack
from tidyrows.dialects import Fault, dialect_for
from tidyrows.errors import NotBoundError, SessionStateError
from tidyrows.greenlets import AsyncMaker, AsyncRegistry, is_async, synchronous
from tidyrows.production import refuse_places, refuse_production

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from sqlalchemy.ext.asyncio import (
        AsyncConnection,
        AsyncEngine,
        AsyncSession,
        async_scoped_session,
        async_sessionmaker,
    )

    from tidyrows.capture.changes import Change, Sink

Bind: TypeAlias = (
    "sa.Engine | sa.Connection | orm.Session | orm.sessionmaker[Any] | orm.scoped_session[Any]"
    " | AsyncEngine | AsyncConnection | AsyncSession | async_sessionmaker[Any]"
    " | async_scoped_session[Any]"
)
Synchronous: TypeAlias = (
    sa.Engine
    | sa.Connection
    | orm.Session
    | orm.sessionmaker[Any]
    | orm.scoped_session[Any]
    | AsyncMaker
    | AsyncRegistry
    | TrackerStack[Any]
)


class Engines:
    """What is known of each engine that a tracker may hold rows of.

    Attributes:
        by_database: the engine that reaches a database.
    """

    def __init__(self, sink: Sink, allow_production: bool | Collection[str]) -> None:
        self._sink = weakref.ref(sink)
        self._allow_production = allow_production
        self.by_database: dict[str, sa.Engine] = {}
        self._captures: dict[Capture, int] = {}  # with the version of the schema at first use

    @property
    def sink(self) -> Sink:
        """The tracker."""
        sink = self._sink()
        if sink is None:
            raise ReferenceError("the tracker does not exist any more")
        return sink

    def capture(self, engine: sa.Engine) -> Capture:
        """The capture of an engine, which tells the tracker of its changes from now on."""
        allowed = self._allow_production is True
        if not allowed and root_engine(engine) not in self.by_database.values():  # not looked at
            refuse_production(engine.url, self._allow_production)
            self.refuse_places(dialect_for(engine).places_by_url(engine))
        capture = capture_for(engine)
        capture.sinks.add(self.sink)
        if capture not in self._captures:
            self.refuse_places(capture.destination.places)
            self._captures[capture] = capture.tables.schema_version
            self.by_database.setdefault(capture.database, root_engine(engine))
            if self._allow_production is not True:
                capture.destination.refuse_with(self._refuse_in_use)
        return capture

    def refuse_places(self, places: list[tuple[str, str]]) -> None:
        """Raise if a place looks like production and nobody allowed it."""
        refuse_places(places, self._allow_production)

    def refuse_known(self) -> None:
        """As ``refuse_places``, of all that connections have said by now."""
        for capture in self._captures:
            self.refuse_places(capture.destination.places)

    def _refuse_in_use(self, places: list[tuple[str, str]]) -> None:
        sink = self._sink()
        if sink is not None and sink.active:
            self.refuse_places(places)

    def saw_ddl(self, capture: Capture) -> bool:
        """Whether the schema was changed through an engine since its first use."""
        return self._captures.get(capture) != capture.tables.schema_version

    def fault(self, error: BaseException) -> Fault:
        """What an error means, of whichever of the databases it is."""
        faults = (capture.dialect.fault(error) for capture in self._captures)
        return next((fault for fault in faults if fault is not Fault.OTHER), Fault.OTHER)

    def is_transient(self, error: BaseException) -> bool:
        """Whether a transaction that failed so may succeed another time."""
        return isinstance(error, Exception) and any(
            capture.dialect.is_transient(error) for capture in self._captures
        )

    def resolve(self) -> list[Capture]:
        """Apply the changes of every COMMIT that is over; where transactions are prepared yet."""
        preparing = []
        for capture in list(self._captures):
            capture.resolve()
            if capture.prepared:
                preparing.append(capture)
        return preparing

    def pending_changes(self) -> Iterator[Change]:
        """What is inserted for the tracker and not committed."""
        for capture in list(self._captures):
            yield from capture.uncommitted(self.sink)

    def pending_keys(self, table: sa.Table) -> list[Any]:
        """Keys of a table that are inserted and not committed."""
        return [
            key
            for change in self.pending_changes()
            if change.table.table is table and change.table.key_columns
            for key in change.keys
        ]


class Binding:
    """How a tracker hears what is written, and where its factories' session comes from.

    Attributes:
        owns_session: the session of :meth:`open_session` is the tracker's own, to be closed by it.
        is_ambient: factories find the tracker by it.
        is_async: what asks the database must run inside of SQLAlchemy's greenlet.
        bind: what is synchronous under it.
    """

    def __init__(self, bind: Any) -> None:
        self.is_async = is_async(bind)
        self.is_ambient = not isinstance(bind, TrackerStack)
        if self.is_async:
            bind = synchronous(bind)
        if isinstance(bind, (sa.Engine, sa.Connection, orm.sessionmaker, AsyncMaker)):
            self.owns_session = True
        elif isinstance(bind, (orm.Session, orm.scoped_session, AsyncRegistry, TrackerStack)):
            self.owns_session = False
        else:
            raise NotBoundError(
                f"ResourceTracker needs to know the database, and a {type(bind).__name__} does "
                f"not lead to one. Write ResourceTracker(engine), with an Engine, Connection, "
                f"Session, sessionmaker or scoped_session, or one of their asynchronous kin."
            )
        self.bind: Synchronous = bind
        self.refuse_unusable()

    def refuse_unusable(self) -> None:
        """Raise if nothing can be written through the bind."""
        bind = self.bind
        if isinstance(bind, sa.Connection) and bind.closed:
            raise SessionStateError(
                f"The connection {bind!r} is closed. Bind the tracker to the engine instead: "
                f"ResourceTracker(engine)."
            )
        if isinstance(bind, orm.Session) and _closed_for_good(bind):
            raise SessionStateError(
                f"The session {bind!r} is closed, and made with close_resets_only=False it stays "
                f"so. Bind the tracker to a session that is in use, or to the engine: "
                f"ResourceTracker(engine)."
            )
        if isinstance(bind, (orm.Session, orm.sessionmaker, AsyncMaker)) and not _finds_an_engine(
            bind
        ):
            raise NotBoundError(
                f"The {type(bind).__name__} has no engine, so nothing can be written through it. "
                f"Write sessionmaker(engine) or Session(engine), or configure(bind=engine) first."
            )

    def source(self) -> sa.Engine | sa.Connection | None:
        """The engine or connection behind it; None where a session has several (or none)."""
        bind: Any = self.bind.maker if isinstance(self.bind, AsyncRegistry) else self.bind
        if isinstance(bind, (orm.sessionmaker, AsyncMaker)):
            bind = bind.kw.get("bind")
        elif isinstance(bind, (orm.Session, orm.scoped_session)):
            bind = bind.bind
        return bind if isinstance(bind, (sa.Engine, sa.Connection)) else None

    def engine(self) -> sa.Engine | None:
        """The engine behind it, or None where a session has several (or none) to choose from."""
        source = self.source()
        return None if source is None else source.engine

    @property
    def translates_schemas(self) -> bool:
        """Whether a schema's name may mean another one."""
        source = self.source()
        return source is not None and "schema_translate_map" in source.get_execution_options()

    def callers_session(self) -> orm.Session | None:
        """The caller's own session, if one is bound, and open in this thread's registry."""
        if isinstance(self.bind, (orm.scoped_session, AsyncRegistry)):
            return self.bind() if self.bind.registry.has() else None
        return self.bind if isinstance(self.bind, orm.Session) else None

    def open_session(self) -> orm.Session:
        """The session that factories use."""
        bind = self.bind
        if isinstance(bind, TrackerStack):
            raise NotBoundError(
                "A tracker of whatever the process writes has no session of its own. Bind one to "
                "an engine: ResourceTracker(engine)."
            )
        if isinstance(bind, (sa.Engine, sa.Connection)):
            return orm.Session(bind, expire_on_commit=False)
        session: orm.Session = bind if isinstance(bind, orm.Session) else bind()
        return session

    def listen(self, engines: Engines) -> list[Callable[[], None]]:
        """Let the tracker own what is inserted through the bind; returns what undoes it."""
        self.refuse_unusable()
        bind = self.bind
        if isinstance(bind, TrackerStack):
            return [bind.push(engines.sink)]
        if isinstance(bind, sa.Engine):
            return [engines.capture(bind).sinks.listen(engines.sink)]
        if isinstance(bind, sa.Connection):
            engines.capture(bind.engine).sinks.attribute(bind, engines.sink)
            return []
        if isinstance(bind, (AsyncMaker, AsyncRegistry)):
            maker = bind.maker if isinstance(bind, AsyncRegistry) else bind
            kind, undo = maker.with_own_class()
            return [undo, listen_to_session(kind, engines)]
        return [listen_to_session(bind, engines)]


def _closed_for_good(session: orm.Session) -> bool:
    state = getattr(session, "_close_state", None)  # no public name
    return getattr(state, "name", None) == "CLOSED"


def _finds_an_engine(bind: orm.Session | orm.sessionmaker[Any] | AsyncMaker) -> bool:
    """Whether there is a bind, or one for each model, or code of the project's that finds one."""
    if isinstance(bind, (orm.sessionmaker, AsyncMaker)):
        kind, binds = bind.class_, (bind.kw.get("bind"), bind.kw.get("binds"))
    else:
        before_2_1 = getattr(bind, "_Session__binds", None)
        kind, binds = type(bind), (bind.bind, getattr(bind, "binds", before_2_1))
    return any(binds) or kind.get_bind is not orm.Session.get_bind


def listen_to_session(
    source: orm.Session | orm.sessionmaker[Any] | orm.scoped_session[Any] | type[orm.Session],
    engines: Engines,
    heard: sa.Engine | None = None,
) -> Callable[[], None]:
    """Attribute to the tracker every connection that a session begins; returns what undoes it.

    Which engines a session has is known only when it begins on one: by ``binds``, or by code of
    the project's in ``get_bind``. All but ``heard``, on which the tracker listens anyway, count.
    """
    tracker = engines.sink  # which lives as long as it listens

    def attribute(connection: sa.Connection) -> None:
        if heard is None or root_engine(connection.engine) is not heard:
            engines.capture(connection.engine).sinks.attribute(connection, tracker)

    def after_begin(_session: Any, _transaction: Any, connection: sa.Connection) -> None:
        attribute(connection)

    for session in _sessions_of(source):  # those that have begun already
        for connection in open_connections(session):
            attribute(connection)
    event.listen(source, "after_begin", after_begin)  # last: what is refused leaves nothing behind
    return lambda: event.remove(source, "after_begin", after_begin)


def _sessions_of(source: Any) -> list[orm.Session]:
    """The sessions that there are, of a maker or a registry in all threads."""
    if isinstance(source, orm.scoped_session):
        source = source.session_factory
    if isinstance(source, orm.Session):
        return [source]
    # each maker has a class of its own
    kind = source if isinstance(source, type) else getattr(source, "class_", None)
    # The references, not the values: other threads make sessions while we look.
    references = orm.session._sessions.valuerefs()  # noqa: SLF001 -- as close_all_sessions() does
    known = [session for reference in references if (session := reference()) is not None]
    return [session for session in known if kind is not None and type(session) is kind]


def session_engine(session: orm.Session) -> sa.Engine | None:
    """The engine of a session that has just one."""
    try:
        return session.get_bind().engine
    except UnboundExecutionError:
        return None
