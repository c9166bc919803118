"""Setup: rows of several factories that belong together, made in one commit."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from factory.base import Factory
from factory.declarations import BaseDeclaration, RelatedFactory, SubFactory

from tidyrows.arguments import check, check_names, whole
from tidyrows.errors import ArgumentError
from tidyrows.factories.coroutines import AwaitingBuilder
from tidyrows.factories.one_call import as_one_call, awaited
from tidyrows.greenlets import in_greenlet

if TYPE_CHECKING:
    from typing import Self

    from factory.builder import BuildStep, Resolver

    from tidyrows.factories.factory import TrackedFactory

T = TypeVar("T")

_SIZE = {"size": whole("3", least=0)}


class Setup:
    """Rows of several factories that belong together: a named tree, made in one commit.

    Its members are made by :meth:`one` and :meth:`many`, and by other declarations of factory_boy.
    A member that is given to another one is made once, and shared.

    Example:
        >>> class CompleteSetup(Setup):
        ...     org = Setup.one(OrgFactory)
        ...     users = Setup.many(UserFactory, 2, org=org)
        ...     group = Setup.one(GroupFactory, users=users)
        >>> setup = CompleteSetup.create(users=3, org__name="Acme")
        >>> [user.org.name for user in setup.users]
        ['Acme', 'Acme', 'Acme']
    """

    _members: ClassVar[dict[str, Any]] = {}
    _factory: ClassVar[Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        members: dict[str, Any] = {}
        names: dict[int, str] = {}  # of members that a subclass replaces, too
        for base in reversed(cls.__mro__):
            for name, value in vars(base).items():
                if isinstance(value, BaseDeclaration):
                    members[name], names[id(value)] = value, name
                else:
                    members.pop(name, None)
        for name, member in members.items():
            _refuse(cls, name, member)
        for member in members.values():
            given: dict[str, Any] = member._defaults  # noqa: SLF001 -- factory_boy has no public name
            given.update({name: _shared(value, names) for name, value in given.items()})
        cls._members = members
        meta = type("Meta", (), {"model": cls})
        cls._factory = type(f"{cls.__name__}Factory", (_SetupFactory,), {"Meta": meta, **members})

    def __init__(self) -> None:
        name = type(self).__name__
        raise ArgumentError(
            f"{name}() makes nothing. Write {name}.create(), or await {name}.create_async().",
            argument="self",
        )

    @staticmethod
    def one(factory: type[TrackedFactory[T]], /, **overrides: Any) -> T:
        """A member that is one object of a factory.

        Args:
            factory: the factory.
            overrides: of the factory's call; a value may be a member that stands above, or a list
                of such members.

        Raises:
            ArgumentError: it is no factory.
        """
        return cast("T", SubFactory(_checked(factory), **overrides))  # type: ignore[no-untyped-call]  # factory_boy's is untyped

    @staticmethod
    def many(factory: type[TrackedFactory[T]], size: int, /, **overrides: Any) -> list[T]:
        """A member that is a list of objects of a factory.

        Args:
            factory: the factory.
            size: how many, where :meth:`create` is not given another number for this member.
            overrides: as for :meth:`one`, the same for all objects.

        Raises:
            ArgumentError: it is no factory, or ``size`` is no number of objects.
        """
        check("many", _SIZE, [("size", size)])
        return cast("list[T]", _Many(_checked(factory), size, overrides))

    @classmethod
    def create(cls, **overrides: Any) -> Self:
        """Make the members, with one commit for all.

        Args:
            overrides: a number of objects for a member of :meth:`many`, as ``users=3``; a value
                that is taken as the member, as ``org=acme``; or, with two underscores, arguments of
                its factory, as ``users__name="Ada"``.

        Raises:
            ArgumentError: there is no such member, or the argument would have no effect.
            NoSessionError: no tracker is active here.
        """
        if not cls._members:
            raise ArgumentError(
                f"{cls.__name__} has no members. Write a subclass, with members such as "
                f"org = Setup.one(OrgFactory).",
                argument="self",
            )
        first = [name.partition("__")[0] for name in overrides]
        check_names(f"{cls.__name__}.create", cls._members, first)
        for name in overrides:
            cls._refuse_unused(name, overrides)
        given = {name: cls._given(name, value) for name, value in overrides.items()}
        made: Self = as_one_call(
            lambda: cls._factory.create(**given), f"await {cls.__name__}.create_async()"
        )
        return made

    @classmethod
    async def create_async(cls, **overrides: Any) -> Self:
        """As :meth:`create`, through an asynchronous engine or session."""
        return await awaited(lambda: cls.create(**overrides))

    @classmethod
    def _refuse_unused(cls, name: str, overrides: dict[str, Any]) -> None:
        """Raise for an argument of an object that is not made for this member."""
        member, _, below = name.partition("__")
        field, _, deeper = below.partition("__")
        declared: Any = cls._members[member]
        given = overrides.get(member, declared)
        if not below or not isinstance(declared, SubFactory):
            return
        if given is not declared and not (isinstance(declared, _Many) and type(given) is int):
            why = f"{member}= is given too, so no object is made for it"
        elif deeper and isinstance(declared._defaults.get(field), _Shared):  # noqa: SLF001 -- factory_boy has no public name
            why = f"{field} of {member} is another member: write its arguments at that one"
        else:
            return
        raise ArgumentError(
            f"{cls.__name__}.create({name}=...) has no effect: {why}. Leave it out.", argument=name
        )

    @classmethod
    def _given(cls, name: str, value: Any) -> Any:
        member = cls._members.get(name)
        if isinstance(member, _Many) and isinstance(value, (int, float)):
            check(f"{cls.__name__}.create", {name: _SIZE["size"]}, [(name, value)])
            return member.resized(int(value))
        return value

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {', '.join(vars(self))}>"


class _SetupFactory(Factory):  # type: ignore[type-arg]  # subscripts came later than 3.3.1
    """The factory behind a Setup; its model is the Setup itself."""

    class Meta:
        abstract = True

    @classmethod
    def _generate(cls, strategy: str, params: dict[str, Any]) -> Any:
        if in_greenlet():
            return AwaitingBuilder(cls._meta, params, strategy).build()  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        return super()._generate(strategy, params)  # type: ignore[no-untyped-call]  # as above

    @classmethod
    def _create(cls, model_class: type[Setup], **members: Any) -> Setup:
        setup = model_class.__new__(model_class)
        vars(setup).update(members)
        return setup


class _Many(SubFactory):
    """A list of objects of one factory."""

    def __init__(self, factory: Any, size: int, overrides: dict[str, Any]) -> None:
        super().__init__(factory, **overrides)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        self.size = size

    def resized(self, size: int) -> _Many:
        """The same with another number of objects."""
        again = copy(self)
        again.size = size
        return again

    def evaluate(self, instance: Resolver, step: BuildStep, extra: dict[str, Any]) -> list[Any]:
        """The objects."""
        one = super().evaluate
        return [one(instance, step, dict(extra)) for _ in range(self.size)]  # type: ignore[no-untyped-call]  # as above


class _Shared(BaseDeclaration):
    """What another member of the Setup is, or a list of such members."""

    def __init__(self, value: Any, names: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        self.value, self.names = value, names

    def evaluate(self, instance: Resolver, step: BuildStep, extra: dict[str, Any]) -> Any:
        """The member, made now if it has not been made yet."""
        above: Any = step
        while not issubclass(above.builder.factory_meta.factory, _SetupFactory):
            above = above.parent_step

        def resolved(value: Any) -> Any:
            if isinstance(value, list):
                return [resolved(each) for each in value]
            name = self.names.get(id(value))
            return value if name is None else getattr(above.stub, name)

        return resolved(self.value)


def _shared(value: Any, names: dict[int, str]) -> Any:
    among = value if isinstance(value, list) else [value]
    return _Shared(value, names) if any(id(each) in names for each in among) else value


def _checked(factory: Any) -> Any:
    if isinstance(factory, str) or (isinstance(factory, type) and issubclass(factory, Factory)):
        return factory  # a text is the path of a factory, as in factory_boy
    raise ArgumentError(
        f"{factory!r} is no factory. Write Setup.one(UserFactory).",
        argument="factory",
        value=factory,
    )


def _refuse(cls: type[Setup], name: str, member: Any) -> None:
    """Raise for a member that cannot be one."""
    if "__" in name or name.startswith("_") or hasattr(Setup, name):
        raise ArgumentError(
            f"{cls.__name__}.{name} is no name of a member: it begins with _, has __, or is a "
            f"method of Setup. Give it another name.",
            argument=name,
        )
    if isinstance(member, RelatedFactory):
        raise ArgumentError(
            f"{cls.__name__}.{name} is a {type(member).__name__}, and a Setup has no row for its "
            f"objects to refer to. Write {name} = Setup.many(factory, size, ...).",
            argument=name,
        )
