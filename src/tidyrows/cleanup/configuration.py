"""Options that every cleanup of the process has, unless it is given others."""

from __future__ import annotations

import threading
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypedDict, TypeVar, Unpack

from tidyrows.arguments import check, check_names
from tidyrows.cleanup.options import KINDS, named_tables, refuse_both
from tidyrows.errors import SessionStateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tidyrows.cleanup.options import Dependents
    from tidyrows.cleanup.report import Progress
    from tidyrows.retry import RetryPolicy

NAMING = ("own", "protect")
"""The options that name tables."""
P = ParamSpec("P")
T = TypeVar("T")


class Options(TypedDict, total=False):
    """What :class:`~tidyrows.CleanupManager` takes besides its tracker."""

    dependents: Dependents
    own: Iterable[Any]
    protect: Iterable[Any]
    retry: RetryPolicy | None
    verify: bool
    lock_timeout: float
    deadline: float | None
    rows_per_transaction: int
    on_progress: Callable[[Progress], None] | None
    trust_keys: bool
    keep_on_failure: bool
    allow_foreign_keys_off: bool


class Configuration:
    """Options that hold until :meth:`reset`, or until the end of a ``with`` block.

    Args:
        options: see :class:`Options`.
        above: they win over those of every :func:`configure`, as those of an ini file do.
    """

    def __init__(self, options: Options, *, above: bool = False) -> None:
        self._given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        self.options: dict[str, Any] = checked_options("configure", options)
        self.above = above
        self._entered = False
        _state.add(self)

    def reset(self) -> None:
        """The options do not hold any more; those of other calls do."""
        _state.remove(self)

    def __enter__(self) -> Self:
        """They hold in the block, though an earlier block has ended.

        Raises:
            SessionStateError: a block of them has not ended.
        """
        if self._entered:
            raise SessionStateError(
                f"A block of this {self!r} has not ended, and options hold until a block ends. "
                f"Write with configure(...) again."
            )
        _state.add(self)
        self._entered = True
        return self

    def __exit__(self, *_error: object) -> None:
        self._entered = False
        self.reset()

    def __repr__(self) -> str:
        return f"configure({self._given})"


class _State:
    """All configurations of the process; replaced as a whole, for threads read them."""

    def __init__(self) -> None:
        self._layers: tuple[Configuration, ...] = ()
        self._lock = threading.Lock()
        self.merged: dict[str, Any] = {}

    def add(self, layer: Configuration) -> None:
        """The options of this one win; does nothing where they hold."""
        with self._lock:
            if layer not in self._layers:
                layers = sorted((*self._layers, layer), key=lambda layer: layer.above)
                refuse_both(_merged(layers))
                self._replace(layers)

    def remove(self, layer: Configuration) -> None:
        """Its options do not hold; it raises nothing, for a block may end with an error."""
        with self._lock:
            self._replace([each for each in self._layers if each is not layer])

    def _replace(self, layers: list[Configuration]) -> None:
        self._layers, self.merged = tuple(layers), _merged(layers)


def _merged(layers: Iterable[Configuration]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer.options
    return merged


_state = _State()


def configure(**options: Unpack[Options]) -> Configuration:
    """Set options for every cleanup of this process: write it once, as in ``conftest.py``.

    They hold for each :class:`CleanupManager` that is made from now on, for ``Tidy``, the fixture
    ``tidy``, ``tidy_autouse``, ``TidyTestCase``, behave, and a sweep. An argument that a
    CleanupManager is given itself wins, and so do, in pytest, a mark ``tidy``, the fixture
    ``tidy_options`` and the ini file. A later call changes the options that it names.

    Args:
        options: those of :class:`CleanupManager`.

    Returns:
        What ends it: ``.reset()``, or the end of a ``with`` block.

    Raises:
        ArgumentError, UnknownTableError: as ``CleanupManager`` raises them. A name that no table
            has is refused where a CleanupManager is made: nothing is known of a database before.

    Example:
        >>> _ = configure(own=[AuditLog], lock_timeout=2.0)
        >>> with configure(protect=[Setting]):
        ...     call_my_app()
    """
    return Configuration(options)


def configured() -> dict[str, Any]:
    """The options of all configurations that hold now, of which later ones win."""
    return _state.merged


def checked_options(call: str, options: Any) -> dict[str, Any]:
    """These options of a CleanupManager, checked, with their tables by name.

    Raises:
        ArgumentError, UnknownTableError: as ``CleanupManager`` raises them.
    """
    check_names(call, list(Options.__annotations__), options)
    check(call, KINDS, options.items())
    tables = {name: named_tables(name, options[name]) for name in NAMING if name in options}
    refuse_both(tables)
    return dict(options) | tables


def with_configured(init: Callable[P, T]) -> Callable[P, T]:
    """Give a call the configured options that it is not given itself."""

    @wraps(init)
    def filled(*args: P.args, **options: P.kwargs) -> T:
        return init(*args, **(configured() | options))

    return filled
