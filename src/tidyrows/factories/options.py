"""The Meta of a tracked factory: its session, its sequence, and when an object is flushed."""

from __future__ import annotations

from functools import cached_property, partial
from inspect import iscoroutinefunction
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from factory.alchemy import SESSION_PERSISTENCE_FLUSH, SQLAlchemyOptions
from factory.base import Factory, OptionDefault
from factory.builder import DeclarationSet, parse_declarations
from factory.enums import CREATE_STRATEGY
from factory.errors import InvalidDeclarationError
from factory.utils import sort_ordered_objects
from sqlalchemy.exc import DBAPIError

from tidyrows.arguments import SWITCH, check
from tidyrows.factories.auto_declarations import (
    AutoDeclarations,
    auto_declarations,
    note_constraint,
)
from tidyrows.factories.call import Call, innermost_call, running_call
from tidyrows.factories.call_retry import unkeyed_with
from tidyrows.factories.coroutines import refuse_coroutines, result_of
from tidyrows.factories.declarations import active_context
from tidyrows.factories.factory_of import derived, factory_of
from tidyrows.factories.foreign_keys import AttributeDeclarations, key_attributes
from tidyrows.factories.get_or_create import parameters
from tidyrows.factories.loading import is_new, readable, record
from tidyrows.factories.related_objects import HookDeclarations
from tidyrows.factories.used_session import session_behind, used_session
from tidyrows.tracking.tracker import current_tracker

if TYPE_CHECKING:
    from collections.abc import Callable

    from tidyrows.tracking.tracker import ResourceTracker


_NAMED = {
    "sqlalchemy_session": "named_session",
    "sqlalchemy_session_persistence": "named_persistence",
}


class _Named(OptionDefault):
    """An option of a Meta. A subclass inherits what Meta names, never what is ambient."""

    def apply(self, meta: Any, base_meta: Any) -> Any:
        inherited = _NAMED[self.name] if isinstance(base_meta, TrackedOptions) else self.name
        value = getattr(meta, self.name, getattr(base_meta, inherited, self.value))
        if self.checker is not None:
            self.checker(meta, value)
        return value


class TrackedOptions(SQLAlchemyOptions):
    """factory_boy's options, with the ambient tracker's session where Meta names none.

    What must happen for every object is done here and not in ``_create``: real suites override that
    method without calling super, and a SubFactory calls the options, not the factory's ``create``.

    Attributes:
        named_session: the session that Meta names, or that its session factory returned, or None.
        named_persistence: the persistence that Meta names.
        creates_in_coroutine: whether the factory's ``_create`` or ``_build`` is ``async def``.
        auto: whether declarations are made from the model.
        is_defined: whether the class of the factory is complete.
        from_model: these declarations; None before the factory is first used.
    """

    auto: bool
    factory: Any
    from_model: AutoDeclarations | None = None
    is_defined: bool = False
    named_session: Any
    named_persistence: str | None
    exclude: tuple[str, ...]
    inline_args: tuple[str, ...]
    rename: dict[str, str]
    sqlalchemy_get_or_create: tuple[str, ...]
    sqlalchemy_session_factory: Any

    @property
    def sqlalchemy_session(self) -> Any:
        """The session of ``using``, else the named one, else the ambient tracker's, else None.

        A property, since hooks and overridden ``_create`` methods read this very name.
        """
        # Before Meta is read there is no named_session: the AttributeError tells factory_boy that
        # the option is free.
        named = self.named_session
        used = used_session()
        if used is not None:
            return used
        if named is not None or self.sqlalchemy_session_factory:
            return named
        tracker = current_tracker()
        return None if tracker is None else tracker.session

    @sqlalchemy_session.setter
    def sqlalchemy_session(self, session: Any) -> None:
        self.named_session = session

    def constructor(self, model: Any) -> Any:
        """What makes an object of a model: the model, unless its constructor takes too little."""
        return model if self.from_model is None else self.from_model.constructor.of(model)

    @property
    def sqlalchemy_session_persistence(self) -> str | None:
        """The named persistence; a session of ``using`` is flushed, and its user commits it."""
        named = self.named_persistence
        return named if used_session() is None else SESSION_PERSISTENCE_FLUSH

    @sqlalchemy_session_persistence.setter
    def sqlalchemy_session_persistence(self, persistence: str | None) -> None:
        self.named_persistence = persistence

    @property
    def flushes_each_object(self) -> bool:
        """Whether an object has its row when the factory returns it."""
        return self.sqlalchemy_session_persistence is not None or self.commits_at_the_end

    def next_sequence(self) -> int:
        """The next number of factory_boy's counter for this worker.

        One worker counts 0, 1, 2. Of several workers, worker 3 counts 3, 1003, 2003. The worker is
        looked up with each number: at import time it is not known yet.
        """
        if self._counter is None:
            self._initialize_counter()  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        counter: Any = self._counter
        context = active_context()
        number: int = counter.seq + context.worker_index
        counter.seq += context.stride
        return number

    @cached_property
    def key_attributes(self) -> dict[str, frozenset[str]]:
        """Each field of a many-to-one relationship, with the attributes of its foreign key."""
        return key_attributes(self)

    def contribute_to_class(self, factory: Any, *args: Any, **kwargs: Any) -> None:
        """Read the factory's Meta and declarations."""
        super().contribute_to_class(factory, *args, **kwargs)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        self._set_declarations(self._pre_declarations)
        hooks = self.post_declarations.as_dict()  # type: ignore[no-untyped-call]  # as above
        self.post_declarations = HookDeclarations(hooks, self)
        self._has_last_hook = (
            factory._after_postgeneration.__func__ is not Factory._after_postgeneration.__func__  # type: ignore[attr-defined]  # noqa: SLF001 -- an extension point of factory_boy
        )
        makers = factory._create, factory._build  # noqa: SLF001 -- extension points of factory_boy
        self.creates_in_coroutine = any(map(iscoroutinefunction, makers))
        if iscoroutinefunction(factory._adjust_kwargs):  # noqa: SLF001 -- as above
            raise InvalidDeclarationError(
                f"{factory.__name__}._adjust_kwargs is async def, and factory_boy needs its result "
                f"at once. Make it a plain def, and what it awaits an attribute: "
                f"@factory.lazy_attribute on an async def."
            )
        self.is_defined = True

    @property
    def pre_declarations(self) -> Any:
        """The declarations of attributes; those from the model are made at the first use."""
        # The models of a project may not be complete when the class of the factory is made.
        if self.auto and self._is_unread:
            self._read_model()
        return self._pre_declarations

    @pre_declarations.setter
    def pre_declarations(self, declarations: Any) -> None:
        self._pre_declarations = declarations

    @property
    def declarations(self) -> dict[str, Any]:
        """The declarations of the class and those from the model, with what traits make of them."""
        if self.auto and self._is_unread:
            self._read_model()
        if self.from_model is not None:
            return self._merged(self.from_model.declarations)
        made = self._merged({})
        # user__name = ..., of a parent that is not known yet
        return {name: each for name, each in made.items() if not self.auto or _root(name) in made}

    def _merged(self, from_model: dict[str, Any]) -> dict[str, Any]:
        made = from_model | self.base_declarations
        for name, parameter in sort_ordered_objects(  # type: ignore[no-untyped-call]  # factory_boy's is untyped
            self.parameters.items(), getter=lambda item: item[1]
        ):
            made.update(parameter.as_declarations(name, made))
        return made

    @property
    def _is_unread(self) -> bool:
        return self.is_defined and self.from_model is None and not self.abstract

    def _read_model(self) -> None:
        renamed = {self.rename[name] for name in self.base_declarations if name in self.rename}
        declared = renamed.union(self.base_declarations, self.exclude)
        base = next(
            each
            for each in reversed(self.factory.__mro__)
            if getattr(each, "_options_class", None) is TrackedOptions
        )
        parents: dict[type, Any] = {}

        def factory_of_parent(model: type) -> Any:
            if self.commits_at_the_end:
                return factory_of(model, base)
            if model not in parents:
                parents[model] = derived(model, base)
            options = parents[model]._meta  # noqa: SLF001 -- factory_boy's name
            options.named_session = self.named_session  # a suite may set another for each test
            options.sqlalchemy_session_factory = self.sqlalchemy_session_factory
            options.named_persistence = self.named_persistence
            return parents[model]

        made = auto_declarations(self.get_model_class(), declared, factory_of_parent)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        every, _ = parse_declarations(self._merged(made.declarations))  # type: ignore[no-untyped-call]  # as above
        self._set_declarations(every)
        self.from_model = made  # last, since another thread may look

    def _set_declarations(self, declared: DeclarationSet) -> None:
        self._pre_declarations = AttributeDeclarations(declared.as_dict(), self)  # type: ignore[no-untyped-call]  # factory_boy's is untyped

    def prepare_arguments(self, attributes: dict[str, Any]) -> Any:
        """The arguments of the model."""
        if self.from_model is not None and self.from_model.parents:
            parents = self.from_model.parents
            attributes = {name: each for name, each in attributes.items() if name not in parents}
        if CoroutineType in map(type, attributes.values()):
            refuse_coroutines(attributes, self.factory)
        return super().prepare_arguments(attributes)  # type: ignore[no-untyped-call]  # factory_boy's is untyped

    def instantiate(self, step: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the object; if it is created in the tracker's session, flush it."""
        is_plain = not (self.sqlalchemy_get_or_create or self.creates_in_coroutine)
        make = super().instantiate if is_plain else self._with_parameters
        if step.builder.strategy != CREATE_STRATEGY:
            return make(step, args, kwargs)
        tracker = current_tracker()
        if tracker is None or not self.commits_at_the_end:
            return self._instantiate_elsewhere(tracker, lambda: make(step, args, kwargs))
        call = running_call(tracker)
        if call is None:
            # This factory is a SubFactory of a plain factory_boy factory, or inside of a build.
            call = Call(tracker, commits=False)
            return call.run(self.instantiate, step, args, kwargs)
        step.tidyrows_call = call
        call.session = session = tracker.session
        if call.began_transaction:
            for value in kwargs.values():
                if hasattr(value, "_sa_instance_state"):
                    call.unkeyed += unkeyed_with(value)
        instance = make(step, args, kwargs)
        if not call.made:
            call.transaction = session.get_transaction()
        call.made.append(instance)
        self._flush(session)
        return instance

    def _instantiate_elsewhere(
        self, tracker: ResourceTracker | None, make: Callable[[], Any]
    ) -> Any:
        """Make the object in a session whose user commits it, or without a tracker."""
        used = used_session()
        if tracker is not None:
            if (call := innermost_call()) is not None:
                call.is_alone = False  # this factory has a session of its own, or commits by itself
            if used is not None or self.named_session is not None:
                watch(tracker, self.sqlalchemy_session)
        instance = make()
        session = session_behind(self.sqlalchemy_session)
        if session is not None:
            if used is not None:
                self._flush(session)  # a _create of the factory's own may have left that out
            if not self.sqlalchemy_get_or_create or is_new(instance, session):
                record(instance)
        return instance

    def _flush(self, session: Any) -> None:
        try:
            session.flush()
        except DBAPIError as error:  # on MariaDB a CHECK raises an OperationalError
            if self.auto:
                note_constraint(error, self.get_model_class())  # type: ignore[no-untyped-call]  # factory_boy's is untyped
            raise

    def use_postgeneration_results(self, step: Any, instance: Any, results: dict[str, Any]) -> None:
        """Call the factory's last hook; commit if the call that flushed the object has ended."""
        factory = self.factory
        if CoroutineType in map(type, results.values()):
            refuse_coroutines(results, factory)
        is_created = step.builder.strategy == CREATE_STRATEGY
        finish = partial(factory._after_postgeneration, instance, is_created, results)  # noqa: SLF001 -- an extension point of factory_boy
        call = getattr(step, "tidyrows_call", None)
        if call is None or call.running:
            last = finish()
            if last is not None:
                with readable(instance, None if call is None else call.filled):
                    result_of(last, factory, "_after_postgeneration")
            if is_created and (results or self._has_last_hook):
                self._save_changes()
        else:
            again = Call(call.tracker, session=call.tracker.session)
            again.run(lambda: result_of(finish(), factory, "_after_postgeneration"))

    def _save_changes(self) -> None:
        """Save what hooks have changed, as Meta wants the object itself saved."""
        persistence = self.sqlalchemy_session_persistence
        session = self.sqlalchemy_session
        if persistence is None or session is None:
            return
        session = session_behind(session) or session
        if persistence == SESSION_PERSISTENCE_FLUSH:
            session.flush()
        else:
            session.commit()

    @property
    def commits_at_the_end(self) -> bool:
        """Whether the outermost call commits the objects, through the ambient tracker's session."""
        return (
            used_session() is None
            and self.named_session is None
            and self.sqlalchemy_session_persistence is None
            and not self.sqlalchemy_session_factory
        )

    def _with_parameters(self, step: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        token = parameters.set((self, step.builder.extras))
        try:
            made = super().instantiate(step, args, kwargs)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
            return result_of(made, self.factory, f"_{step.builder.strategy}")
        finally:
            parameters.reset(token)

    def _build_default_options(self) -> list[OptionDefault]:
        return [
            OptionDefault("auto", False, inherit=True, checker=_check_auto),  # type: ignore[no-untyped-call]  # noqa: FBT003 -- factory_boy's is untyped, and its second argument is the value
            *(
                _Named(option.name, option.value, inherit=True, checker=option.checker)  # type: ignore[no-untyped-call]  # as above
                if option.name in _NAMED
                else option
                for option in super()._build_default_options()  # type: ignore[no-untyped-call]  # as above
            ),
        ]


def _root(name: str) -> str:
    return name.partition("__")[0] or name


def _check_auto(meta: Any, value: Any) -> None:
    check("class Meta", {"auto": SWITCH}, [("auto", value)])


def watch(tracker: ResourceTracker, session: Any) -> None:
    """Have the tracker track what a named session writes."""
    real = session_behind(session)
    if real is not None:
        tracker.sessions.watch(real)
