"""load_rows: the rows of a file, made through factories, in one commit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tidyrows.arguments import Kind, checked
from tidyrows.data.nodes import nearest
from tidyrows.data.planned_rows import plan_rows
from tidyrows.factories import TrackedFactory
from tidyrows.factories.one_call import as_one_call, awaited

if TYPE_CHECKING:
    import os

    from tidyrows.data.planned_rows import PlannedRow

T = TypeVar("T")


class Named(Mapping[str, T], Generic[T]):
    """What a file has made, by name: ``rows.user.ada`` or ``rows["user"]["ada"]``.

    A name of a Mapping's own method, such as ``items``, works in brackets only.
    """

    def __init__(self, kind: str, entries: Mapping[str, T]) -> None:
        self._kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            raise KeyError(self._unknown(name)) from None

    def __getattr__(self, name: str) -> T:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._entries[name]
        except KeyError:
            raise AttributeError(self._unknown(name)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<{self._kind}: {', '.join(self._entries)}>"

    def _unknown(self, name: object) -> str:
        return f"There is no {self._kind} {name!r}. {nearest(name, self._entries)}"


def _are_factories(given: Any) -> bool:
    return isinstance(given, Mapping) and all(
        isinstance(name, str)
        and name
        and "." not in name
        and isinstance(each, type)
        and issubclass(each, TrackedFactory)
        for name, each in given.items()
    )


FACTORIES = Kind(
    _are_factories,
    "a dict of names without dots and subclasses of TrackedFactory",
    '{"user": UserFactory}',
)
"""What an argument ``factories=`` takes."""


@checked(factories=FACTORIES)
def load_rows(
    path: str | os.PathLike[str], factories: Mapping[str, type[TrackedFactory[Any]]]
) -> Named[Named[Any]]:
    """Make the rows of a YAML, JSON or TOML file through factories, with one commit for all.

    Everything in the file is checked before the first row is written. A text for a unique column
    gets the tag of the test, as by :class:`Scoped`.

    Args:
        path: the file; the ending of its name is ``.yaml``, ``.yml``, ``.json`` or ``.toml``.
        factories: the factories by the names that the file has for them.

    Returns:
        The objects by factory and name: ``rows.user.ada`` or ``rows["user"]["ada"]``; a list where
        the file has a count.

    Raises:
        DataFileError: the file has something that the factories or columns do not take. The
            message begins with file, line and column.
        NoSessionError: no tracker is active here.
        ArgumentError: an argument has a value that it does not take.

    Example:
        >>> rows = load_rows("data.yaml", factories={"user": UserFactory, "org": OrgFactory})
        >>> rows.user.ada.org is rows.org.acme
        True
    """
    planned = plan_rows(path, factories)
    return as_one_call(partial(_make, planned, factories), "await load_rows_async(...)")


@checked(factories=FACTORIES)
async def load_rows_async(
    path: str | os.PathLike[str], factories: Mapping[str, type[TrackedFactory[Any]]]
) -> Named[Named[Any]]:
    """As :func:`load_rows`, through an asynchronous engine or session."""
    return await awaited(lambda: load_rows(path, factories))


def _make(
    planned: list[PlannedRow], factories: Mapping[str, type[TrackedFactory[Any]]]
) -> Named[Named[Any]]:
    made: dict[tuple[str, str], Any] = {}
    for row in planned:
        made[row.name] = row.make(made)
    entries: dict[str, dict[str, Any]] = {factory: {} for factory in factories}
    for row in sorted(planned, key=lambda row: row.number):
        entries[row.name[0]][row.name[1]] = made[row.name]
    return Named("factory", {kind: Named(kind, each) for kind, each in entries.items()})
