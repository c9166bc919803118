"""External resources: what a test made that is no row (an account, a file), and their handlers."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from tidyrows.arguments import SWITCH, Kind, checked
from tidyrows.errors import ExternalResourceError
from tidyrows.keys import RowKey, TableName

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidyrows.keys import KeyedTable

Handle: TypeAlias = Callable[[Any], None]
HandleT = TypeVar("HandleT", bound=Handle)
_TRANSIENT: tuple[type[Exception], ...] = (ConnectionError, TimeoutError)


@dataclass(frozen=True, eq=False)
class ExternalResource:
    """Something outside of the databases that a cleanup removes; equal only to itself.

    The payload may contain secrets, so no text shows it.

    Attributes:
        kind: the kind; its handler removes the resource.
        payload: the argument of the handler; JSON values only.
        number: different for each resource of a tracker.
    """

    kind: str
    payload: Any = field(repr=False)
    number: int

    def __repr__(self) -> str:
        return f"<ExternalResource {self.kind} #{self.number}>"

    def __str__(self) -> str:
        return f"external resource {self.kind} #{self.number}"


Item: TypeAlias = "TableName | RowKey | ExternalResource"
"""A resource is removed after it, or before it; a table stands for all its tracked rows."""


@dataclass(frozen=True, slots=True)
class Tie:
    """A resource, the items that are removed before it (``after``), and those removed later."""

    resource: ExternalResource
    after: tuple[Item, ...] = ()
    before: tuple[Item, ...] = ()

    def renamed(self, keys: dict[RowKey, RowKey]) -> Tie:
        """The same, with rows under new keys."""

        def new(items: tuple[Item, ...]) -> tuple[Item, ...]:
            return tuple(keys.get(i, i) if isinstance(i, RowKey) else i for i in items)

        return replace(self, after=new(self.after), before=new(self.before))


class Externals:
    """The external resources of one tracker, in the order in which they were tracked."""

    def __init__(self) -> None:
        self._ties: dict[ExternalResource, Tie] = {}
        self._made: weakref.WeakSet[ExternalResource] = weakref.WeakSet()
        self._last = 0

    def new(self, kind: str, payload: Any, number: int | None = None) -> ExternalResource:
        """A resource of this tracker, not held yet."""
        resource = ExternalResource(
            kind_of(kind), plain(kind, payload), self._last + 1 if number is None else number
        )
        self._last = max(self._last, resource.number)
        self._made.add(resource)
        return resource

    def tie(
        self, resource: ExternalResource, after: Iterable[Item], before: Iterable[Item]
    ) -> None:
        """Hold a resource, in its place in the order."""
        self._ties[resource] = Tie(resource, tuple(after), tuple(before))

    def forget(self, resource: ExternalResource) -> None:
        """The resource has been removed."""
        self._ties.pop(resource, None)

    def clear(self) -> None:
        """Forget all resources, and that they were of this tracker."""
        self._ties.clear()
        self._made.clear()
        self._last = 0

    def made(self, resource: ExternalResource) -> bool:
        """Whether the resource is, or was, one of this tracker."""
        return resource in self._made

    def rename(self, table: KeyedTable, pairs: Iterable[tuple[Any, Any]]) -> None:
        """Follow rows to their new keys; None is an unknown key."""
        keys = {table.row(old): table.row(new) for old, new in pairs if new is not None}
        self._ties = {resource: tie.renamed(keys) for resource, tie in self._ties.items()}

    def __iter__(self) -> Iterator[Tie]:
        return iter(list(self._ties.values()))

    def __len__(self) -> int:
        return len(self._ties)


# -- handlers ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Handler:
    """The function that removes the resources of one kind, and the exceptions that it retries."""

    remove: Handle
    retry_on: tuple[type[Exception], ...] = _TRANSIENT


_handlers: dict[str, Handler] = {}
_lock = threading.Lock()


@checked(
    retry_on=Kind(
        lambda kinds: (
            isinstance(kinds, Collection)
            and all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds)
        ),
        "a list of exception classes",
        "[TimeoutError]",
    ),
    replace=SWITCH,
)
def external_handler(
    kind: str,
    *,
    retry_on: Iterable[type[Exception]] = _TRANSIENT,
    replace: bool = False,
) -> Callable[[HandleT], HandleT]:
    """Register the function that removes the external resources of one kind.

    The function gets the payload, and returns when the resource is gone. It may be called again for
    a resource that it has removed already (after a lost answer, say), so it must be idempotent: a
    missing resource is no error. It is called outside of any transaction of the cleanup. It should
    bound its own waiting: a running call is not interrupted.

    Args:
        kind: as given to :meth:`ResourceTracker.track_external`.
        retry_on: transient exceptions, after which the function is called again; any other one
            makes the resource a leftover at once.
        replace: replace another function for the same kind.

    Raises:
        ExternalResourceError: the kind has another handler already.

    Example:
        >>> @external_handler("auth-user")
        ... def remove_auth_user(payload):
        ...     auth.delete_user(payload["id"], missing_ok=True)
    """
    kind_of(kind)
    transient = tuple(retry_on)

    def register(remove: HandleT) -> HandleT:
        if not callable(remove):
            raise ExternalResourceError(
                f"The handler of {kind!r} is {remove!r}, which cannot be called. Write "
                f'@external_handler("{kind}") above a function that takes the payload.',
                kind=kind,
            )
        with _lock:
            known = _handlers.get(kind)
            if known is not None and known.remove is not remove and not replace:
                module = getattr(known.remove, "__module__", "")
                name = getattr(known.remove, "__qualname__", repr(known.remove))
                raise ExternalResourceError(
                    f"External resources of kind {kind!r} are removed by "
                    f"{module}.{name} already. Give this kind another name, or write "
                    f'@external_handler("{kind}", replace=True).',
                    kind=kind,
                )
            _handlers[kind] = Handler(remove, transient)
        return remove

    return register


def handler_of(kind: str) -> Handler | None:
    """The handler of a kind, if there is one in this process."""
    return _handlers.get(kind)


# -- checks ------------------------------------------------------------------------------------


def kind_of(kind: Any) -> str:
    """The kind, checked."""
    if not isinstance(kind, str) or not kind.strip():
        raise ExternalResourceError(
            f"{kind!r} is no kind of external resource; give a name, as in "
            f'track_external("auth-user", {{"id": 7}}).',
            kind=str(kind),
        )
    return kind


def plain(kind: str, payload: Any, at: str = "payload") -> Any:
    """A copy of a payload, as JSON would return it; an error shows the place, not the value."""
    if payload is None or isinstance(payload, (bool, int, str)):
        return payload
    if isinstance(payload, float) and math.isfinite(payload):
        return payload
    if isinstance(payload, (list, tuple)):
        return [plain(kind, value, f"{at}[{n}]") for n, value in enumerate(payload)]
    if isinstance(payload, dict) and all(isinstance(name, str) for name in payload):
        return {name: plain(kind, value, f"{at}[{name!r}]") for name, value in payload.items()}
    what = f"of type {type(payload).__name__}"
    if isinstance(payload, float):
        what = "not finite"
    elif isinstance(payload, dict):
        what = "a dict with keys that are no strings"
    raise ExternalResourceError(
        f"The payload of external resource {kind!r} cannot be written as JSON: {at} is {what}. "
        f"Give strings, numbers, booleans, None, and lists and dicts of them, such as "
        f'{{"id": str(user_id)}}.',
        kind=kind,
    )
