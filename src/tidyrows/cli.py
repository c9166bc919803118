"""The command ``tidyrows``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from typing import TYPE_CHECKING, Any

from tidyrows.data.editor_schema import editor_schema
from tidyrows.data.loading import FACTORIES
from tidyrows.data.nodes import nearest
from tidyrows.data.planned_rows import plan_rows
from tidyrows.errors import TidyRowsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidyrows.data.planned_rows import Factories


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 1 after an error, which is on stderr."""
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
    except TidyRowsError as error:
        print(error, file=sys.stderr)  # noqa: T201 -- a command prints
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("tidyrows", description="Test data that leaves no trace.")
    rooms = parser.add_subparsers(required=True, metavar="COMMAND")
    data = rooms.add_parser("data", help="data files of load_rows")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    factories = "the dict of factories, as in tests.factories:FACTORIES"
    check = actions.add_parser(
        "check", help="check a file and show the rows that it makes; no database is used"
    )
    check.add_argument("file")
    check.add_argument("--factories", required=True, metavar="MODULE:NAME", help=factories)
    check.set_defaults(run=_check)
    schema = actions.add_parser("schema", help="print a JSON Schema of data files for editors")
    schema.add_argument("factories", metavar="MODULE:NAME", help=factories)
    schema.set_defaults(run=_schema)
    return parser


def _check(given: argparse.Namespace) -> None:
    rows = plan_rows(given.file, _factories(given.factories))
    for row in rows:
        print(row)  # noqa: T201 -- as above
    total = sum(1 if row.count is None else row.count for row in rows)
    print(f"{total} row(s), and those of their SubFactories; nothing was written")  # noqa: T201 -- as above


def _schema(given: argparse.Namespace) -> None:
    print(json.dumps(editor_schema(_factories(given.factories)), indent=2))  # noqa: T201 -- as above


def _factories(path: str) -> Factories:
    """The factories at ``module:NAME``, found from the current directory too.

    Raises:
        TidyRowsError: there is no such module, or it has no such dict.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise TidyRowsError(f"{path} is not of the form module:NAME.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise TidyRowsError(f"There is no module {error.name}, for {path}.") from error
    if not hasattr(found, name):
        raise TidyRowsError(f"{module} has no {name}. {nearest(name, vars(found))}")
    factories = getattr(found, name)
    if not FACTORIES.fits(factories):
        raise TidyRowsError(f"{path} must be {FACTORIES.need}, as {FACTORIES.example}.")
    checked: Factories = factories
    return checked
