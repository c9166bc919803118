"""TrackedFactory: factory_boy's SQLAlchemyModelFactory, whose rows are tracked."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from factory.alchemy import SQLAlchemyModelFactory
from factory.enums import CREATE_STRATEGY
from sqlalchemy import orm

from tidyrows.arguments import checked
from tidyrows.capture.ownership import entered
from tidyrows.errors import NoSessionError, SessionStateError
from tidyrows.factories.bulk import CHUNK_SIZE, create_bulk
from tidyrows.factories.call import running_call
from tidyrows.factories.call_retry import call_with_retries
from tidyrows.factories.coroutines import AwaitingBuilder
from tidyrows.factories.get_or_create import get_or_create
from tidyrows.factories.one_call import awaited
from tidyrows.factories.options import TrackedOptions, watch
from tidyrows.factories.used_session import SESSION, session_behind, used_session, using
from tidyrows.greenlets import in_greenlet, is_async
from tidyrows.tracking.tracker import current_tracker

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from types import FrameType

    from tidyrows.cleanup.report import Progress
    from tidyrows.tracking.tracker import ResourceTracker

T = TypeVar("T")

_TEST_CASE = "unittest.case.TestCase"
_PYTEST = "PYTEST_CURRENT_TEST"
"""The variable of the environment that pytest sets while a test or its fixtures run."""


class TrackedFactory(SQLAlchemyModelFactory, Generic[T]):
    """A factory_boy factory whose rows the ambient tracker tracks.

    The session and persistence of Meta are used as in factory_boy. Where Meta names no session, the
    session of the ambient tracker is used: every object is flushed when it is made, and the
    outermost call commits once, with the changes of hooks. If that call raises, a session that the
    tracker opened is rolled back.

    A transaction that you began by hand in your own session is yours to commit.

    A call whose whole transaction the database undid, as after a deadlock, runs again by the
    ``retry`` policy of the tracker. Hooks run again too, and every declaration gives a new value.
    Where the transaction had begun before the call, the error surfaces.

    Raises:
        NoSessionError: created where neither Meta nor a tracker gives a session.

    Example:
        >>> class UserFactory(TrackedFactory[User]):
        ...     class Meta:
        ...         model = User
        ...
        ...     email = Scoped("user-{tag}@example.test")
        >>> with CleanupManager(ResourceTracker(engine)):
        ...     user = UserFactory()
    """

    _options_class = TrackedOptions
    _meta: TrackedOptions

    if TYPE_CHECKING:
        # For a type checker, each Meta would override a nested class wrongly, and factory_boy's
        # metaclass, by which ``UserFactory()`` is a User, is unknown.
        Meta: Any

        def __new__(cls, *args: Any, **kwargs: Any) -> T:  # type: ignore[misc]  # as above
            """An object, made by ``Meta.strategy``."""

        @classmethod
        def build(cls, **kwargs: Any) -> T:
            """An object that is in no session."""

        @classmethod
        def build_batch(cls, size: int, **kwargs: Any) -> list[T]:
            """Objects that are in no session."""

        @classmethod
        def create(cls, **kwargs: Any) -> T:
            """An object and its row."""

    else:

        class Meta:
            """The options; a factory without a model is abstract."""

            abstract = True

    @classmethod
    def create_batch(cls, size: int, **kwargs: Any) -> list[T]:
        """Create ``size`` objects, with one commit for all."""
        tracker = current_tracker()
        if tracker is None or used_session() is not None or running_call(tracker) is not None:
            return super().create_batch(size, **kwargs)
        if tracker.is_async:
            tracker.sessions.refuse_blocking(f"await {cls.__name__}.create_batch_async({size})")
        create = super().create_batch
        return call_with_retries(tracker, lambda params: create(size, **params), kwargs)

    @classmethod
    async def create_async(cls, **kwargs: Any) -> T:
        """An object and its row, through an asynchronous engine or session.

        Every declaration works, and attributes and hooks may be ``async def``. Loaded attributes
        stay loaded: no attribute of the new objects needs the database afterwards.

        Example:
            >>> user = await UserFactory.create_async()
        """
        return await awaited(lambda: cls.create(**kwargs))

    @classmethod
    async def create_batch_async(cls, size: int, **kwargs: Any) -> list[T]:
        """``size`` objects, with one commit for all, through an asynchronous engine or session."""
        return await awaited(lambda: cls.create_batch(size, **kwargs))

    @classmethod
    def create_bulk(
        cls,
        n: int,
        *,
        returning: bool = True,
        chunk_size: int = CHUNK_SIZE,
        on_progress: Callable[[Progress], None] | None = None,
        hooks: bool = False,
        **kwargs: Any,
    ) -> list[T]:
        """Create ``n`` objects, whose rows are written with a few statements for each table.

        Every declaration gives its value for each object, as with :meth:`create_batch`. The rows of
        SubFactories are written first. Declarations do not see the rows of this call in queries.

        Args:
            n: how many.
            returning: False for rows alone: nothing is returned, each chunk has its own commit, and
                the memory that is used does not grow with ``n``.
            chunk_size: how many objects are made before their rows are written.
            on_progress: called with a :class:`Progress` after each chunk, and its commit if it has
                one, as ``progress_bar()``.
            hooks: make one object after the other, as :meth:`create_batch` does: for factories with
                hooks, ``_create`` methods, or ``sqlalchemy_get_or_create``.
            kwargs: overrides, as ``org__name="one"``.

        Raises:
            ArgumentError: an argument does not fit.
            BulkError: a declaration needs the row of each object; ``hooks=True`` gives it.

        Example:
            >>> users = UserFactory.create_bulk(10_000, org=org)
        """
        return create_bulk(
            cls,
            n,
            kwargs,
            returning=returning,
            chunk_size=chunk_size,
            on_progress=on_progress,
            hooks=hooks,
        )

    @classmethod
    async def create_bulk_async(cls, n: int, **kwargs: Any) -> list[T]:
        """:meth:`create_bulk` through an asynchronous engine or session, with its arguments."""
        return await awaited(lambda: cls.create_bulk(n, **kwargs))

    @classmethod
    def scoped_to(cls, tracker: ResourceTracker) -> BoundFactory[T]:
        """This factory with a tracker that the context does not reach, as in another thread.

        Example:
            >>> Thread(target=lambda: UserFactory.scoped_to(tracker).create()).start()
        """
        return BoundFactory(cls, lambda: entered(tracker))

    @classmethod
    @checked(session=SESSION)
    def using(cls, session: Any) -> BoundFactory[T]:
        """This factory, and those that its calls reach, with a session of yours.

        Each object is flushed, and nothing is committed: the session is yours to commit. An active
        tracker tracks its rows. The session and persistence of Meta do not count.

        Args:
            session: a Session, an AsyncSession for the asynchronous calls, or a registry of them.

        Example:
            >>> with Session(engine) as session:
            ...     user = UserFactory.using(session).create()
            ...     session.commit()
        """
        return BoundFactory(cls, lambda: using(session))

    @classmethod
    def _generate(cls, strategy: str, params: dict[str, Any]) -> Any:
        generate = cls._generate_awaiting if in_greenlet() else super()._generate
        if strategy != CREATE_STRATEGY:
            return generate(strategy, params)
        if (used := used_session()) is not None:
            cls._refuse_blocking(used)
            return generate(strategy, params)
        if (tracker := current_tracker()) is None:
            return generate(strategy, params)
        if tracker.is_async:  # a hook that is a coroutine runs outside of the greenlet
            tracker.sessions.refuse_blocking(f"await {cls.__name__}.create_async()")
        if running_call(tracker) is not None:
            return generate(strategy, params)
        return call_with_retries(tracker, partial(generate, strategy), params)

    @classmethod
    def _generate_awaiting(cls, strategy: str, params: dict[str, Any]) -> Any:
        if cls._meta.abstract:
            return super()._generate(strategy, params)  # type: ignore[no-untyped-call]  # which raises
        return AwaitingBuilder(cls._meta, params, strategy).build()  # type: ignore[no-untyped-call]  # factory_boy's is untyped

    @classmethod
    def _session_of_call(cls) -> Any:
        """The session of Meta, of its session factory, or of the ambient tracker."""
        options = cls._meta
        if options.sqlalchemy_session_factory and used_session() is None:
            options.sqlalchemy_session = options.sqlalchemy_session_factory()
            tracker = current_tracker()
            if tracker is not None:
                watch(tracker, options.sqlalchemy_session)
        session = options.sqlalchemy_session
        if session is None:
            raise NoSessionError(
                f"{cls.__name__} has no session to create in: its Meta names none, and no tracker "
                f"is active here. {_remedy(cls.__name__)}"
            )
        if not isinstance(session, orm.Session) and is_async(session):
            cls._refuse_blocking(session)
            session = session_behind(session)
        return session

    @classmethod
    def _create(cls, model_class: type[T], *args: Any, **kwargs: Any) -> T:
        session = cls._session_of_call()
        made: T
        if cls._meta.sqlalchemy_get_or_create:
            made = cls._get_or_create(model_class, session, args, kwargs)
        else:
            made = cls._save(cls._meta.constructor(model_class), session, args, kwargs)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        return made

    @classmethod
    def _build(cls, model_class: type[T], *args: Any, **kwargs: Any) -> T:
        made: T = cls._meta.constructor(model_class)(*args, **kwargs)
        return made

    @classmethod
    def _refuse_blocking(cls, session: Any) -> None:
        if is_async(session) and not in_greenlet():
            raise SessionStateError(
                f"The session of {cls.__name__} is asynchronous, and a synchronous call cannot "
                f"wait for it. Write await {cls.__name__}.create_async()."
            )

    _get_or_create = classmethod(get_or_create)


@dataclass(frozen=True, slots=True)
class BoundFactory(Generic[T]):
    """A factory whose calls run in a block, of a tracker or of a session.

    Attributes:
        factory: the factory.
        block: makes the block.
    """

    factory: type[TrackedFactory[T]]
    block: Callable[[], AbstractContextManager[None]]

    def __call__(self, **kwargs: Any) -> T:
        """Make an object by ``Meta.strategy``."""
        with self.block():
            return self.factory(**kwargs)

    def create(self, **kwargs: Any) -> T:
        """Create an object."""
        with self.block():
            return self.factory.create(**kwargs)

    def create_batch(self, size: int, **kwargs: Any) -> list[T]:
        """Create ``size`` objects, with one commit for all."""
        with self.block():
            return self.factory.create_batch(size, **kwargs)

    async def create_async(self, **kwargs: Any) -> T:
        """Create an object through an asynchronous engine or session."""
        with self.block():
            return await self.factory.create_async(**kwargs)

    async def create_batch_async(self, size: int, **kwargs: Any) -> list[T]:
        """Create ``size`` objects through an asynchronous engine or session, with one commit."""
        with self.block():
            return await self.factory.create_batch_async(size, **kwargs)

    def create_bulk(self, n: int, **kwargs: Any) -> list[T]:
        """:meth:`TrackedFactory.create_bulk`, with its arguments."""
        with self.block():
            return self.factory.create_bulk(n, **kwargs)

    async def create_bulk_async(self, n: int, **kwargs: Any) -> list[T]:
        """:meth:`TrackedFactory.create_bulk_async`, with its arguments."""
        with self.block():
            return await self.factory.create_bulk_async(n, **kwargs)

    def build(self, **kwargs: Any) -> T:
        """Build an object; of a tracker, its tag is in the scoped values."""
        with self.block():
            return self.factory.build(**kwargs)

    def build_batch(self, size: int, **kwargs: Any) -> list[T]:
        """Build ``size`` objects."""
        with self.block():
            return self.factory.build_batch(size, **kwargs)


_IN_THREAD = (
    "In a thread that the block does not reach, write {factory}.scoped_to(tracker).create()."
)
_IN_UNITTEST = """Use TidyTestCase:

    from tidyrows.testing import TidyTestCase

    class {case}(TidyTestCase):
        tidy_engine = engine
"""
_IN_PYTEST = """Ask for the fixture `tidy`, in the test or in the fixture that creates rows:

    def test_it(tidy):
        {factory}()

In a fixture of a module, class or session, ask for tidy_worker, and create in its block:

    @pytest.fixture(scope="module")
    def shared(tidy_worker):
        with tidy_worker:
            return {factory}()
"""
_ELSEWHERE = """Write

    tracker = ResourceTracker(engine)
    with CleanupManager(tracker):
        {factory}()
"""


def _remedy(factory: str) -> str:
    """What to write where a factory has no tracker: it depends on the framework that runs."""
    case: str | None = None
    frame: FrameType | None = sys._getframe()  # noqa: SLF001 -- nothing else shows who calls
    while case is None and frame is not None:
        owner = frame.f_locals.get("self", frame.f_locals.get("cls"))
        kind = owner if isinstance(owner, type) else type(owner)
        if any(f"{each.__module__}.{each.__name__}" == _TEST_CASE for each in kind.__mro__):
            case = kind.__name__
        frame = frame.f_back
    text = _IN_UNITTEST if case else _IN_PYTEST if _PYTEST in os.environ else _ELSEWHERE
    return f"{text}\n{_IN_THREAD}".format(factory=factory, case=case)
