"""The names that a factory call takes, each with its column, relationship or further factory."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from factory.declarations import RelatedFactory, SubFactory, Trait
from factory.errors import InvalidDeclarationError
from sqlalchemy.orm import ColumnProperty, RelationshipProperty

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.orm import Mapper

    from tidyrows.factories.factory import TrackedFactory


@dataclass(frozen=True, slots=True)
class Field:
    """What a name of a factory call leads to.

    Attributes:
        column: the column that gets the value; None for anything else.
        relationship: the relationship that gets the value; None for anything else.
        declaration: the factory's own, or None.
        is_made_after: the value goes to a hook, which runs when the object has been made.
    """

    column: sa.Column[Any] | None = None
    relationship: RelationshipProperty[Any] | None = None
    declaration: Any = None
    is_made_after: bool = False


class Fields:
    """The names that the calls of one factory take.

    Attributes:
        factory: the factory.
        mapper: of its model.
        traits: the names of its traits.
        declared: the names of declarations, parameters and traits.
        mapped: the names of columns and relationships of the model that the factory takes.
    """

    def __init__(self, factory: type[TrackedFactory[Any]]) -> None:
        options: Any = factory._meta  # noqa: SLF001 -- factory_boy has no public name
        if options.abstract:
            raise InvalidDeclarationError(
                f"{factory.__name__} is abstract, so it makes no rows. Give its Meta a model."
            )
        self.factory = factory
        self._options = options
        self._model: type[Any] = options.get_model_class()
        self.mapper: Mapper[Any] = sa.inspect(self._model)
        traits = [name for name, each in options.parameters.items() if isinstance(each, Trait)]
        self.traits: tuple[str, ...] = tuple(traits)
        self.declared: tuple[str, ...] = tuple(
            dict.fromkeys([*options.pre_declarations, *options.post_declarations, *traits])
        )
        renamed = set(options.rename.values())
        self.mapped: tuple[str, ...] = tuple(
            each.key for each in self.mapper.attrs if each.key not in renamed
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, the factory's own first."""
        return tuple(dict.fromkeys([*self.declared, *self.mapped]))

    @property
    def related(self) -> Iterator[str]:
        """The names of declarations that make rows which reference the object."""
        for name in self._options.post_declarations:
            if isinstance(self._options.post_declarations[name].declaration, RelatedFactory):
                yield name

    def name_of(self, attribute: str) -> str:
        """The name of a call's argument for an attribute of the model: another by Meta.rename."""
        renamed: dict[str, str] = self._options.rename
        return next((name for name, to in renamed.items() if to == attribute), attribute)

    def field(self, name: str) -> Field | None:
        """What a name without ``__`` leads to; None for a name that the factory does not take."""
        before, after = self._options.pre_declarations, self._options.post_declarations
        if name in after:
            return Field(declaration=after[name].declaration, is_made_after=True)
        declaration = before[name].declaration if name in before else None
        attribute = self._options.rename.get(name, name)
        is_passed_on = name not in self._options.exclude and name not in self._options.parameters
        found = self.mapper.attrs.get(attribute) if is_passed_on else None
        if isinstance(found, RelationshipProperty):
            return Field(relationship=found, declaration=declaration)
        if isinstance(found, ColumnProperty) and isinstance(found.columns[0], sa.Column):
            return Field(column=found.columns[0], declaration=declaration)
        is_known = name in before or name in self.traits or self._is_taken(attribute)
        return Field(declaration=declaration) if is_known else None

    def below(self, name: str) -> tuple[Fields | None, bool]:
        """The fields of the factory that ``name__...`` leads to, and whether the name may have any.

        None with True: the declaration takes parameters, and nobody knows their names.
        """
        before, after = self._options.pre_declarations, self._options.post_declarations
        found = before if name in before else after if name in after else None
        if found is None:
            return None, False
        declaration = found[name].declaration
        if isinstance(declaration, (SubFactory, RelatedFactory)):
            factory: Any = declaration.get_factory()  # type: ignore[no-untyped-call]  # factory_boy's is untyped
            if sa.inspect(factory._meta.get_model_class(), raiseerr=False) is not None:  # noqa: SLF001 -- as above
                return Fields(factory), True
        return None, True

    def _is_taken(self, attribute: str) -> bool:
        """Whether the model's ``__init__`` takes an argument, as SQLAlchemy's own does."""
        if hasattr(self._model, attribute) and not attribute.startswith("_"):
            return not callable(getattr(self._model, attribute))
        parameters = signature(self._model).parameters.values()
        kinds = {Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY}
        return any(each.name == attribute and each.kind in kinds for each in parameters)
