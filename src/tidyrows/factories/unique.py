"""Unique: what another declaration makes, with a tag, so that no other worker produces it."""

from __future__ import annotations

import re
import uuid
from enum import Enum
from typing import TYPE_CHECKING, Any

from factory.declarations import BaseDeclaration
from factory.enums import BuilderPhase, get_builder_phase

from tidyrows.arguments import Kind, checked
from tidyrows.errors import ScopeError
from tidyrows.factories.column_limits import ColumnLimits, column_limits, field_of
from tidyrows.factories.coroutines import result_of
from tidyrows.factories.declarations import ADDRESS_WIDTH, LOCAL_WIDTH, active_context
from tidyrows.template import TAG_WIDTH

if TYPE_CHECKING:
    from factory.builder import BuildStep, Resolver

_ADDRESS = re.compile(r"([^@\s]+)(@[^@\s]+)")
_HOST = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^/?#\s]+)/?")
_DECLARATION = Kind(
    lambda value: get_builder_phase(value) is BuilderPhase.ATTRIBUTE_RESOLUTION,  # type: ignore[no-untyped-call]  # factory_boy's is untyped
    "a declaration of factory_boy for an attribute (no hook)",
    'factory.Faker("user_name")',
)
_LINES = {
    int: "{field} = ScopedInteger()",
    uuid.UUID: "{field} = factory.LazyFunction(uuid.uuid4)",
}
_OTHERS = (
    "number = ScopedInteger() in class Params, and {field} = factory.LazyAttribute(lambda it: ...) "
    "that makes the value of it.number"
)


class Unique(BaseDeclaration):
    """The text that another declaration makes, different in every call, test, worker, run and host.

    A hyphen and a tag follow the text, or the part of an e-mail address before the @. The text is
    cut to fit the mapped column; the tag, the domain of an address and the host of a URL never.
    None stays None.

    For a unique constraint over several columns, one of them is enough.

    Args:
        declaration: of an attribute, as ``factory.Faker("user_name")``. Overrides such as
            ``name__locale="de_DE"`` go to it.

    Raises:
        ArgumentError: it is not a declaration, or one that runs after the object is made.
        ScopeError: when a value is made: it is not text, the type of the column takes text of one
            form only, or the column is too short for the tag.

    Example:
        >>> class UserFactory(TrackedFactory[User]):
        ...     class Meta:
        ...         model = User
        ...
        ...     name = Unique(factory.Faker("user_name"))
        >>> UserFactory.build().name
        'julia73-qr0wctk03010'
    """

    @checked(declaration=_DECLARATION)
    def __init__(self, declaration: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        self.declaration = declaration

    def evaluate_pre(
        self, instance: Resolver, step: BuildStep, overrides: dict[str, Any]
    ) -> str | None:
        """The declaration's next text, with the next tag."""
        factory = step.builder.factory_meta.factory
        value = self.declaration.evaluate_pre(instance=instance, step=step, overrides=overrides)
        field = field_of(instance) or "field"
        value = result_of(value, factory, field)
        if value is None:
            return None
        limits = column_limits(instance, step)
        place = limits.name or f"{factory.__name__}.{field}"
        if not isinstance(value, str) or isinstance(value, Enum) or limits.fixed_form:
            raise _refusal(value, field, limits, place)
        return self._tagged(value, limits, place)

    def _tagged(self, text: str, limits: ColumnLimits, place: str) -> str:
        start, text, end, room = _parts(text, limits.length)
        if room is not None:
            room -= TAG_WIDTH
            if room < 0:
                length = limits.length or ADDRESS_WIDTH
                need = len(start) + TAG_WIDTH + len(end)
                raise ScopeError(
                    f"{place} holds {length} characters, but a value of {self!r} that no other "
                    f"worker can have needs {need}. Make the column longer, or give the field a "
                    f"value in the test.",
                    column=limits.name,
                    length=length,
                    need=need,
                )
            if len(text) >= room:
                text = text[: max(room - 1, 0)].rstrip(" -_./")
        # The character before the tag is none of a tag: no value ends in the tag of another.
        return f"{start}{text}{'-' if text else ''}{active_context().text('{tag}')}{end}"

    def __repr__(self) -> str:
        return f"Unique({self.declaration!r})"


def _parts(text: str, length: int | None) -> tuple[str, str, str, int | None]:
    """What is kept, what may be cut, what is kept behind the tag, and the room for text and tag."""
    start = end = ""
    if host := _HOST.match(text):
        start, text = f"{host[1]}/", text[host.end() :]
    elif address := _ADDRESS.fullmatch(text):
        text, end = address.groups()
        length = ADDRESS_WIDTH if length is None else min(length, ADDRESS_WIDTH)
        length = min(length, LOCAL_WIDTH + len(end))
    return start, text, end, None if length is None else length - len(start) - len(end)


def _refusal(value: Any, field: str, limits: ColumnLimits, place: str) -> ScopeError:
    kind, why = type(value), "a tag can be added to text only"
    if limits.fixed_form:
        kind = uuid.UUID if limits.fixed_form.upper() == "UUID" else object
        why = f"the type {limits.fixed_form} takes text of one form only"
    line = _LINES.get(kind, _OTHERS).format(field=field)
    return ScopeError(
        f"Unique cannot add a tag to the {type(value).__name__} for {place}: {why}. Write {line}.",
        column=limits.name,
    )
