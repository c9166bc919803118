"""Options of tests in pytest: of the ini file, of marks and of the fixture ``tidy_options``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tidyrows.arguments import check, check_names, kinds_of
from tidyrows.cleanup.configuration import NAMING, checked_options
from tidyrows.cleanup.options import KINDS, Dependents, named_tables
from tidyrows.errors import ArgumentError, UnknownTableError
from tidyrows.isolation.levels import NAMES
from tidyrows.testing.tidy import Tidy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_LEDGERS: dict[str, bool | None] = {"on": True, "off": False, "auto": None}
MARK, FIXTURE = "@pytest.mark.tidy", "tidy_options"
_OPTIONS = sorted(kinds_of(Tidy).keys() - {"test", "context"} | {"own", "protect"})


def checked_tidy_options(call: str, options: Any, positional: Iterable[str] = ()) -> dict[str, Any]:
    """The options of a mark or a fixture; what is wrong in them fails the test."""
    if not isinstance(options, dict):
        pytest.fail(
            f'{call} returns a dict, and {options!r} is none. Write return {{"own": [...]}}.',
            pytrace=False,
        )
    try:
        check_names(call, _OPTIONS, [*options, *positional])
        check(call, kinds_of(Tidy), options.items())
        # read once: a generator would be empty for the cleanup
        return options | {n: named_tables(n, options[n]) for n in NAMING if n in options}
    except (ArgumentError, UnknownTableError) as error:
        pytest.fail(str(error), pytrace=False)


def ledger_option(config: pytest.Config) -> bool | None:
    """``tidy_ledger`` of the ini file; None where it depends on the run."""
    value = config.getini("tidy_ledger")
    if value not in _LEDGERS:
        pytest.fail(f"tidy_ledger = {value} in the ini file is none of {', '.join(_LEDGERS)}.")
    return _LEDGERS[value]


def isolation_option(config: pytest.Config) -> str:
    """``tidy_isolation`` of the ini file.

    Raises:
        pytest.UsageError: it is no level.
    """
    value = str(config.getini("tidy_isolation")).strip().lower()
    if value not in NAMES:
        raise pytest.UsageError(
            f"tidy_isolation = {value} in the ini file is none of {', '.join(NAMES)}."
        )
    return value


def ini_options(config: pytest.Config) -> dict[str, Any]:
    """The options of cleanups that the ini file has.

    Raises:
        pytest.UsageError: one has a value that it does not take.
    """
    options: dict[str, Any] = {}
    for name, read in _FROM_TEXT.items():
        ini = f"tidy_{name}"
        text = config.getini(ini)
        if not text:
            continue
        try:
            options[name] = read(text)
            checked_options(ini, {name: options[name]})
        except (KeyError, ValueError):
            kind = KINDS[name]
            raise pytest.UsageError(
                f"{ini} = {text} in the ini file: it must be {kind.need}; write "
                f"{ini} = {kind.example}"
            ) from None
    return options


def _switch(text: str) -> bool:
    switches = {"true": True, "yes": True, "on": True, "1": True}
    switches |= {"false": False, "no": False, "off": False, "0": False}
    return switches[text.strip().lower()]


def _tables(lines: list[str]) -> list[str]:
    return [name for line in lines for name in line.replace(",", " ").split()]


_FROM_TEXT: dict[str, Callable[[Any], Any]] = {
    "own": _tables,
    "protect": _tables,
    "dependents": lambda text: Dependents[text.rpartition(".")[2].upper()],
    "lock_timeout": float,
    "deadline": float,
    "rows_per_transaction": int,
    "verify": _switch,
    "trust_keys": _switch,
    "keep_on_failure": _switch,
    "allow_foreign_keys_off": _switch,
}
"""How the options in the ini file are read, each as ``tidy_`` and its name."""
