"""Rows of a failed test, kept for study."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from tidyrows.ledger.process import kept_id
from tidyrows.ledger.table import NAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tidyrows.tracking.tracker import ResourceTracker

_SHOWN = 20
NO_WISHES: Mapping[str, Iterable[str]] = MappingProxyType({})


def keep(tracker: ResourceTracker, wishes: Mapping[str, Iterable[str]] = NO_WISHES) -> str:
    """Leave a tracker's rows where they are.

    With a ledger they are put aside there: no sweep takes them unless it is asked to. Without one
    they stay tracked, as long as this process lives.

    Args:
        tracker: whose rows.
        wishes: tables, by the argument of ``sweep`` that they are to be given to.

    Returns:
        Which rows they are, and what deletes them.
    """
    tracker.release_session()
    tracker.settle()
    held = tracker.snapshot()
    things = [
        str(each.table.row(key)) for each in held for key in (*each.keys.in_order(), *each.doubtful)
    ]
    count = len(things) + sum(each.nameless for each in held)
    things += [f"{each.nameless} of {each.table.name}" for each in held if each.nameless]
    resources = [str(resource) for resource in tracker.externals()]
    things += resources
    count += len(resources)
    if not count:
        return "tidyrows: there are no rows to keep."
    tracker.dismiss_leak_warning()
    name = kept_id()
    aside = [each for each in tracker.journals.databases if tracker.journals.put_aside(each, name)]
    lines = [f"tidyrows: {count} row(s) and resources are kept for study:"]
    lines += [f"  {each}" for each in things[:_SHOWN]]
    if len(things) > _SHOWN:
        lines.append(f"  ... and {len(things) - _SHOWN} more")
    journals = [found for each in aside if (found := tracker.journals.of(each)) is not None]
    for ledger, schema in dict.fromkeys(journal.ledger.place for journal in journals):
        where = "" if ledger == NAME else f", ledger={ledger!r}"
        where += f", schema={schema!r}" if schema else ""
        where += "".join(f", {name}={sorted(each)}" for name, each in wishes.items() if each)
        lines.append(
            f'They are deleted by: python -c "import os, tidyrows; '
            f"print(tidyrows.sweep(os.environ['DATABASE_URL'], kept='{name}'{where}))\""
        )
    if not aside:
        lines.append(
            "They are deleted by manager.cleanup() in this process. With "
            "ResourceTracker(..., ledger=Ledger(engine)) another process can delete them too."
        )
    return "\n".join(lines)
