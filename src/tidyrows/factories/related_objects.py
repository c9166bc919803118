"""Objects that a call gives in place of a RelatedFactory become the relationship of that name.

``OrderFactory(lines=[line])`` has this line: factory_boy would only make no line of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from factory.declarations import PostGenerationDeclaration, RelatedFactory
from factory.enums import SPLITTER
from sqlalchemy.orm import Mapper

from tidyrows.factories.foreign_keys import CallDeclarations

if TYPE_CHECKING:
    from collections.abc import Mapping


class HookDeclarations(CallDeclarations):
    """The declarations of hooks."""

    def update(self, values: Mapping[str, Any]) -> None:
        """Add values; objects in place of a RelatedFactory are assigned to the relationship."""
        if not values:
            return
        super().update(values)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        if self.options is None:
            return
        for name, value in values.items():
            field = name.removesuffix(SPLITTER)  # a call's value for a hook ends so
            declared = self.declarations.get(field)
            if field == name or not isinstance(declared, RelatedFactory) or not _objects(value):
                continue
            mapper = sa.inspect(self.options.get_model_class(), raiseerr=False)
            if isinstance(mapper, Mapper) and field in mapper.relationships:
                self.declarations[field] = _Assigned(field, declared)


class _Assigned(PostGenerationDeclaration):
    """A hook that assigns, when the hook that it replaces would have run."""

    def __init__(self, field: str, replaced: PostGenerationDeclaration) -> None:
        vars(self).update(vars(replaced))  # its place in the order
        self._field = field

    def call(self, instance: Any, _step: Any, context: Any) -> Any:
        setattr(instance, self._field, context.value)
        return context.value


def _objects(value: Any) -> bool:
    values = value if isinstance(value, (list, set)) else [value]
    return bool(values) and all(hasattr(each, "_sa_instance_state") for each in values)
