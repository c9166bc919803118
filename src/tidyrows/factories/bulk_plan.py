"""A factory compiled for many objects: what factory_boy finds out for each of them, found once.

Values come from the declarations themselves, in factory_boy's order, one object after the other.
The objects are made, and :mod:`~tidyrows.factories.bulk_rows` writes their rows later.
"""

from __future__ import annotations

from inspect import isawaitable
from types import CoroutineType
from typing import TYPE_CHECKING, Any, NoReturn

from factory import declarations as of
from factory.alchemy import SQLAlchemyModelFactory
from factory.base import BaseFactory
from factory.builder import BuildStep, Resolver, StepBuilder, parse_declarations
from factory.enums import CREATE_STRATEGY, BuilderPhase, get_builder_phase
from factory.errors import AssociatedClassError, CyclicDefinitionError

from tidyrows.errors import BulkError
from tidyrows.factories.bulk_shapes import shape_of
from tidyrows.factories.coroutines import refuse_coroutines
from tidyrows.factories.options import TrackedOptions
from tidyrows.greenlets import in_greenlet, wait_for
from tidyrows.tracking.sessions import Exclusive

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tidyrows.factories.bulk_rows import Rows
    from tidyrows.factories.bulk_shapes import Shape

    Getter = Callable[[Resolver, BuildStep], Any]

_WAYS = "_create", "_save", "_get_or_create", "_after_postgeneration"
_WAYS_OF_A_CALL = *_WAYS, "create", "create_batch", "_generate"
_OPTIONS = "instantiate", "use_postgeneration_results"


class BulkBuilder(StepBuilder):
    """factory_boy's builder of one factory, with its declarations compiled.

    Factories below it get a builder of this class too.

    Args:
        options: the factory's.
        extras: the values and declarations of the call, or of the SubFactory.
        rows: gets each object of a tracked factory, in the order in which they are made.
        is_called: whether it is the factory of the call, no SubFactory.

    Raises:
        BulkError: the factory needs the row of each object, or writes rows in a way of its own.
    """

    def __init__(
        self, options: Any, extras: dict[str, Any], rows: Rows, *, is_called: bool = False
    ) -> None:
        super().__init__(options, extras, CREATE_STRATEGY)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        self._rows = rows
        self._is_mapped = issubclass(options.factory, SQLAlchemyModelFactory)
        before, self._after = parse_declarations(  # type: ignore[no-untyped-call]  # as above
            self.extras, base_pre=options.pre_declarations, base_post=options.post_declarations
        )
        if self._is_mapped:
            self._refuse_single_rows(_WAYS_OF_A_CALL if is_called else _WAYS)
            rows.join(options)
        self.declarations = before
        self.names = list(before)
        self.constants: dict[str, Any] = {}
        self.getters: dict[str, Getter] = {}
        for name in self.names:
            getter = _getter(before[name].declaration, before[name].context)
            if getter is None:
                self.constants[name] = before[name].declaration
            else:
                self.getters[name] = _awaiting(getter) if in_greenlet() else getter
        self._arguments = self._plain_arguments()
        self._model = options.get_model_class()
        self._construct = options.constructor(self._model) if self._is_mapped else self._model
        self._below: dict[Any, BulkBuilder] = {}
        self._shapes: dict[tuple[str, ...], Shape | None] = {}

    def build(self, parent_step: Any = None, force_sequence: int | None = None) -> Any:
        """Make one object, and those of its SubFactories before it."""
        options = self.factory_meta
        number = self.force_init_sequence if force_sequence is None else force_sequence
        number = options.next_sequence() if number is None else number
        step = BuildStep(self, number, parent_step)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        step.stub = stub = Values(self, step)
        values = vars(stub)
        pending = values["_Resolver__pending"]
        for name, getter in self.getters.items():
            if name not in values:
                pending.append(name)
                values[name] = getter(stub, step)
                pending.pop()
        if not self._is_mapped:
            return self._build_unmapped(step)
        args: tuple[Any, ...] = ()
        if self._arguments is None:
            step.attributes = {name: values[name] for name in self.names}
            args, kwargs = options.prepare_arguments(step.attributes)
        else:
            kwargs = {
                name: value for name in self._arguments if (value := values[name]) is not of.SKIP
            }
            if CoroutineType in map(type, kwargs.values()):
                refuse_coroutines(kwargs, options.factory)
        shape = None if args else self._shape_of(tuple(kwargs))
        instance = None if shape is None else shape.make(kwargs, self._rows.knows)
        if instance is None:
            shape = None
            self._rows.given(kwargs.values())
            instance = self._construct(*args, **kwargs)
        self._rows.add(instance, shape, is_parent=parent_step is not None)
        for name in self._after:
            self._refuse_chosen_hook(name, step)
        step.stub = None  # no cycle, which the garbage collector would have to find
        return instance

    def recurse(self, factory_meta: Any, extras: dict[str, Any]) -> BulkBuilder:
        """The builder of a factory below this one."""
        if extras:
            return BulkBuilder(factory_meta, extras, self._rows)
        if factory_meta not in self._below:
            self._below[factory_meta] = BulkBuilder(factory_meta, extras, self._rows)
        return self._below[factory_meta]

    def _build_unmapped(self, step: BuildStep) -> Any:
        """A dict, a list, an object that has no row: its hooks are called."""
        options = self.factory_meta
        step.attributes = {name: vars(step.stub)[name] for name in self.names}
        args, kwargs = options.prepare_arguments(step.attributes)
        instance = options.instantiate(step=step, args=args, kwargs=kwargs)
        results = {
            name: self._after[name].declaration.evaluate_post(
                instance=instance, step=step, overrides=self._after[name].context
            )
            for name in self._after.sorted()
        }
        options.use_postgeneration_results(instance=instance, step=step, results=results)
        return instance

    def _shape_of(self, names: tuple[str, ...]) -> Shape | None:
        """How an object with these attributes is made; traits change which there are."""
        if names not in self._shapes:
            self._shapes[names] = shape_of(self._model, names)
        return self._shapes[names]

    def _plain_arguments(self) -> list[str] | None:
        """The fields that the model gets by their own names; None where Meta has more to say."""
        options = self.factory_meta
        if options.rename or options.inline_args or _is_own(options.factory, "_adjust_kwargs"):
            return None
        if _is_own(type(options), "prepare_arguments"):
            return None
        hidden = {*options.exclude, *options.parameters}
        if self._is_mapped and options.from_model is not None:
            hidden |= set(options.from_model.parents)
        return [name for name in self.names if name not in hidden]

    # -- what needs the row of each object -----------------------------------------------------

    def _refuse_single_rows(self, ways: tuple[str, ...]) -> None:
        options, factory = self.factory_meta, self.factory_meta.factory
        if not isinstance(options, TrackedOptions):
            self._refuse(
                "the factory", "it is no TrackedFactory, so it writes each object by itself"
            )
        for name in ways:
            if _is_own(factory, name):
                self._refuse(name, "the factory overrides it, and it is called with each object")
        for name in _OPTIONS:
            if _is_own(type(options), name):
                self._refuse(f"_meta.{name}", "its class of options overrides it")
        if options.creates_in_coroutine:
            self._refuse("_build", "it is async def, and it is called with each object")
        if options.sqlalchemy_get_or_create:
            self._refuse("Meta.sqlalchemy_get_or_create", "it looks for the row of each object")
        for name in self._after:
            if not isinstance(self._after[name].declaration, of.Maybe):
                self._refuse_hook(name, self._after[name].declaration)

    def _refuse_chosen_hook(self, name: str, step: BuildStep) -> None:
        """Raise where a trait or a Maybe has chosen a hook for this object."""
        hook = self._after[name]
        declaration = hook.declaration
        while isinstance(declaration, of.Maybe):
            decider: Any = declaration.decider
            if _phase(decider) != BuilderPhase.ATTRIBUTE_RESOLUTION:
                self._refuse_hook(name, decider)
            chosen = decider.evaluate_pre(step.stub, step, dict(hook.context))
            declaration = declaration.yes if chosen else declaration.no
        if _phase(declaration) is not None:
            self._refuse_hook(name, declaration)

    def _refuse_hook(self, name: str, declaration: Any) -> NoReturn:
        kind = type(declaration).__name__
        kind = "post_generation" if kind == "PostGeneration" else kind
        self._refuse(name, f"it is a {kind}, which runs when the object has its row")

    def _refuse(self, declaration: str, why: str) -> NoReturn:
        raise BulkError(self._rows.factory, self.factory_meta.factory, declaration, why)


class Values(Resolver):
    """What a declaration sees of the object that is made: factory_boy's Resolver, compiled.

    The values are attributes, so that a second look at one costs nothing.
    """

    def __init__(self, builder: BulkBuilder, step: BuildStep) -> None:
        own = vars(self)
        own["_Resolver__step"] = step
        own["_Resolver__pending"] = []
        own["_Resolver__initialized"] = True
        own.update(builder.constants)

    def __getattr__(self, name: str) -> Any:
        own = vars(self)
        step = own["_Resolver__step"]
        getter = step.builder.getters.get(name)
        if getter is None:
            raise AttributeError(
                f"The parameter {name!r} is unknown; {step.builder.factory_meta.factory.__name__} "
                f"has {step.builder.declarations!r}."
            )
        pending = own["_Resolver__pending"]
        if name in pending:
            raise CyclicDefinitionError(
                f"Cyclic lazy attribute definition for {name!r}; cycle found in {pending!r}."
            )
        pending.append(name)
        try:
            value = own[name] = getter(self, step)
        finally:
            pending.pop()
        return value


def _is_own(kind: type[Any], name: str) -> bool:
    """Whether a class of the user defines this method, neither factory_boy nor this library."""
    owner = next(each for each in kind.__mro__ if name in vars(each))
    return not owner.__module__.startswith(("factory.", "tidyrows."))


def _phase(declaration: Any) -> Any:
    return get_builder_phase(declaration)  # type: ignore[no-untyped-call]  # factory_boy's is untyped


# -- getters ---------------------------------------------------------------------------------------


def _getter(declaration: Any, context: Mapping[str, Any]) -> Getter | None:
    """A function that gives the next value of a declaration; None for a plain value."""
    if _phase(declaration) != BuilderPhase.ATTRIBUTE_RESOLUTION:
        return None
    kind = type(declaration)
    simple = _SIMPLE.get(kind)
    if simple is not None:
        return simple(declaration, context)
    if kind.evaluate_pre is of.BaseDeclaration.evaluate_pre:
        full = {**declaration._defaults, **context}  # noqa: SLF001 -- as unroll_context() reads them
        if isinstance(declaration, of.SubFactory) and kind.evaluate is of.SubFactory.evaluate:
            return _sub_factory(declaration, full)
        if not any(_phase(value) for value in full.values()):
            evaluate = declaration.evaluate
            return lambda stub, step: evaluate(stub, step, full.copy())
    return lambda stub, step: declaration.evaluate_pre(stub, step, dict(context))


def _sequence(declaration: Any, _context: Any) -> Getter:
    function = declaration.function
    return lambda _stub, step: function(int(step.sequence))


def _lazy_function(declaration: Any, _context: Any) -> Getter:
    function = declaration.function
    return lambda _stub, _step: function()


def _lazy_attribute(declaration: Any, _context: Any) -> Getter:
    function = declaration.function
    return lambda stub, _step: function(stub)


def _maybe(declaration: Any, context: Mapping[str, Any]) -> Getter:
    decide: Any = _getter(declaration.decider, {})
    yes, no = (_value_or_getter(each, context) for each in (declaration.yes, declaration.no))

    def get(stub: Resolver, step: BuildStep) -> Any:
        value, getter = yes if decide(stub, step) else no
        return value if getter is None else getter(stub, step)

    return get


_SIMPLE: dict[type[Any], Callable[[Any, Any], Getter]] = {
    of.Sequence: _sequence,
    of.LazyFunction: _lazy_function,
    of.LazyAttribute: _lazy_attribute,
    of.Maybe: _maybe,
}
"""Declarations of exactly these classes; a subclass may give its values in another way."""


def _value_or_getter(value: Any, context: Mapping[str, Any]) -> tuple[Any, Getter | None]:
    return value, _getter(value, context)


def _sub_factory(declaration: Any, extras: dict[str, Any]) -> Getter:
    """Compiles the other factory once, when the first object is made."""
    builder: BulkBuilder | None = None
    forced = declaration.FORCE_SEQUENCE

    def get(_stub: Resolver, step: BuildStep) -> Any:
        nonlocal builder
        if builder is None:
            factory = declaration.get_factory()
            if not issubclass(factory, BaseFactory):
                raise AssociatedClassError(
                    f"{step!r}: Attempting to recursing into a non-factory object {factory!r}"
                )
            builder = step.builder.recurse(factory._meta, extras.copy())  # noqa: SLF001 -- an extension point of factory_boy
        return builder.build(step, step.sequence if forced else None)

    return get


def _awaiting(getter: Getter) -> Getter:
    """The same, inside a greenlet: what it gives is awaited."""

    def get(stub: Resolver, step: BuildStep) -> Any:
        value = getter(stub, step)
        return wait_for(Exclusive.lend(value)) if isawaitable(value) else value

    return get
