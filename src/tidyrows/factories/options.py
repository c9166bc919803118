"""The Meta of a tracked factory: where its session comes from and when it is flushed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from factory.alchemy import SQLAlchemyOptions
from factory.base import OptionDefault
from factory.enums import CREATE_STRATEGY
from sqlalchemy import orm

from tidyrows.capture.ambient import current_tracker
from tidyrows.factories.call import Call, innermost_call, running_call
from tidyrows.factories.detach_instances import unkeyed_among
from tidyrows.factories.get_or_create import parameters
from tidyrows.factories.sequence import InterleavedCounter

if TYPE_CHECKING:
    from factory.builder import BuildStep

    from tidyrows.tracking.tracker import ResourceTracker


class _NamedSession(OptionDefault):
    """The session of a Meta. A subclass inherits what was named, never what is ambient."""

    def apply(self, meta: Any, base_meta: Any) -> Any:
        inherited = "named_session" if isinstance(base_meta, TrackedOptions) else self.name
        return getattr(meta, self.name, getattr(base_meta, inherited, self.value))


class TrackedOptions(SQLAlchemyOptions):
    """factory_boy's options, with the ambient tracker's session where Meta names none.

    All that must hold for every object stands here and not in ``_create``: real suites override
    that without calling super, and SubFactories reach the options, not the class's own calls.

    Attributes:
        named_session: what Meta names, or its session factory has returned; None where nothing.
    """

    named_session: Any
    sqlalchemy_get_or_create: tuple[str, ...]
    sqlalchemy_session_factory: Any
    sqlalchemy_session_persistence: str | None

    @property
    def sqlalchemy_session(self) -> Any:
        """The named session, else the ambient tracker's, else None.

        A property, since hooks and overridden ``_create`` methods read this very name.
        """
        # Before Meta is read there is no named_session: the AttributeError tells factory_boy that
        # the option is free.
        named = self.named_session
        if named is not None or self.sqlalchemy_session_factory:
            return named
        tracker = current_tracker()
        return None if tracker is None else tracker.session

    @sqlalchemy_session.setter
    def sqlalchemy_session(self, session: Any) -> None:
        self.named_session = session

    @property
    def flushes_each_object(self) -> bool:
        """Whether an object has its row when the factory returns it."""
        return self.sqlalchemy_session_persistence is not None or self._commits_at_the_end

    def instantiate(self, step: BuildStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the object; if it is created in the tracker's session, flush it."""
        if step.builder.strategy != CREATE_STRATEGY:
            return super().instantiate(step, args, kwargs)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        tracker = current_tracker()
        if tracker is not None:
            if self._commits_at_the_end:
                return self._flushed(tracker, step, args, kwargs)
            if (call := innermost_call()) is not None:
                call.alone = False  # this factory has a session of its own, or commits by itself
            if self.named_session is not None:
                watch(tracker, self.named_session)
        return self._created(step, args, kwargs)

    def use_postgeneration_results(
        self, step: BuildStep, instance: Any, results: dict[str, Any]
    ) -> None:
        """Call the factory's last hook; commit where no factory call will."""
        if (
            step.builder.strategy == CREATE_STRATEGY
            and self._commits_at_the_end
            and (tracker := current_tracker()) is not None
            and running_call(tracker) is None
        ):
            # This factory is a SubFactory of a plain factory_boy factory, which does not commit.
            with Call(tracker) as call:
                call.session = tracker.session
                super().use_postgeneration_results(step, instance, results)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        else:
            super().use_postgeneration_results(step, instance, results)  # type: ignore[no-untyped-call]  # factory_boy's is untyped

    @property
    def _commits_at_the_end(self) -> bool:
        """Whether the outermost call commits the objects, through the ambient tracker's session."""
        return (
            self.named_session is None
            and self.sqlalchemy_session_persistence is None
            and not self.sqlalchemy_session_factory
        )

    def _flushed(
        self,
        tracker: ResourceTracker,
        step: BuildStep,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        call = running_call(tracker)
        if call is None:
            with Call(tracker, commits=False):
                return self._flushed(tracker, step, args, kwargs)
        call.session = session = tracker.session
        if call.retriable:
            call.unkeyed += unkeyed_among(kwargs.values())
        instance = self._created(step, args, kwargs)
        if call.retriable:
            if not call.made:
                call.transaction = session.get_transaction()
            call.made.append(instance)
        session.flush()
        return instance

    def _created(self, step: BuildStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.sqlalchemy_get_or_create:
            return super().instantiate(step, args, kwargs)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        token = parameters.set((self, step.builder.extras))
        try:
            return super().instantiate(step, args, kwargs)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        finally:
            parameters.reset(token)

    def _initialize_counter(self) -> None:
        if self._counter is None and self.counter_reference is self:
            first = self.factory._setup_next_sequence()  # noqa: SLF001 -- an extension point
            self._counter = InterleavedCounter(first)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        else:
            super()._initialize_counter()  # type: ignore[no-untyped-call]  # factory_boy's is untyped

    def _build_default_options(self) -> list[OptionDefault]:
        return [
            _NamedSession("sqlalchemy_session", None, inherit=True)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
            if option.name == "sqlalchemy_session"
            else option
            for option in super()._build_default_options()  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        ]


def watch(tracker: ResourceTracker, session: Any) -> None:
    """Have the tracker hear what a named session writes."""
    real = session() if isinstance(session, orm.scoped_session) else session
    if isinstance(real, orm.Session):
        tracker.watch(real)
