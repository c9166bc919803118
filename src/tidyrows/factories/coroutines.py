"""`async def` in a factory: awaited where the factory is awaited, else refused by name."""

from __future__ import annotations

from inspect import isawaitable
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from factory.builder import BuildStep, Resolver, StepBuilder, parse_declarations

from tidyrows.errors import SessionStateError
from tidyrows.factories.call import innermost_call
from tidyrows.factories.loading import readable
from tidyrows.greenlets import in_greenlet, wait_for
from tidyrows.tracking.sessions import Exclusive

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping


def result_of(value: Any, factory: type[Any], name: str) -> Any:
    """The value, or what its coroutine returns.

    Raises:
        SessionStateError: it is a coroutine, and nothing can await it here.
    """
    if not isinstance(value, CoroutineType):
        return value
    if in_greenlet():
        return wait_for(Exclusive.lend(value))
    value.close()
    kind = factory.__name__
    raise SessionStateError(
        f"{kind}.{name} is asynchronous (async def), and a synchronous call cannot await it. Write "
        f"await {kind}.create_async(); or make {name} a plain def; or, for an attribute, give its "
        f"value, as in {kind}.build({name}=...)."
    )


def awaited(hook: Awaitable[Any], instance: Any) -> Any:
    """What a hook returns, which may read all of its object without an await."""
    call = innermost_call()
    with readable(instance, None if call is None else call.filled):
        return wait_for(Exclusive.lend(hook))


def refuse_coroutines(values: Mapping[str, Any], factory: type[Any]) -> None:
    """Raise where a value is a coroutine: an :class:`AwaitingBuilder` would have awaited it."""
    for name, value in values.items():
        if type(value) is CoroutineType:
            result_of(value, factory, name)


class AwaitingBuilder(StepBuilder):
    """factory_boy's builder inside a greenlet: it awaits what attributes and hooks return.

    A declaration that reads an attribute gets the awaited value, and a hook runs when the hooks
    before it have ended. Factories below it get a builder of this class too.
    """

    def build(self, parent_step: Any = None, force_sequence: int | None = None) -> Any:
        """As factory_boy's, which has no place to await in."""
        options = self.factory_meta
        before, after = parse_declarations(  # type: ignore[no-untyped-call]  # factory_boy's is untyped
            self.extras,
            base_pre=options.pre_declarations,
            base_post=options.post_declarations,
        )
        number = self.force_init_sequence if force_sequence is None else force_sequence
        number = options.next_sequence() if number is None else number
        step = _Step(self, number, parent_step)  # type: ignore[no-untyped-call]  # as above
        step.resolve(before)
        args, kwargs = options.prepare_arguments(step.attributes)
        instance = options.instantiate(step=step, args=args, kwargs=kwargs)
        results = {}
        for name in after.sorted():
            hook = after[name]
            result = hook.declaration.evaluate_post(
                instance=instance, step=step, overrides=hook.context
            )
            results[name] = awaited(result, instance) if isawaitable(result) else result
        options.use_postgeneration_results(instance=instance, step=step, results=results)
        return instance


class _Step(BuildStep):
    def resolve(self, declarations: Any) -> None:
        self.stub = _Resolver(declarations, self, self.sequence)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        self.attributes.update({name: getattr(self.stub, name) for name in declarations})


class _Resolver(Resolver):
    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        if isawaitable(value):
            value = wait_for(Exclusive.lend(value))
            vars(self)["_Resolver__values"][name] = value
        return value
