"""What ``after=`` and ``before=`` name: rows, tables and other external resources."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.errors import ExternalResourceError
from tidyrows.external import ExternalResource
from tidyrows.keys import RowKey
from tidyrows.tracking import selection
from tidyrows.tracking.inheritance import mapper_of, parts_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidyrows.external import Item
    from tidyrows.tracking.tracker import ResourceTracker


def items(tracker: ResourceTracker, kind: str, argument: str, given: Any) -> list[Item]:
    """The items of one argument.

    Raises:
        ExternalResourceError: it is no list, or a handle of another tracker is in it.
        UnknownTableError: the database has no such table.
        UntrackableRowError: an object is not mapped, or has no row yet.
    """
    single = isinstance(given, (str, bytes, type, sa.Table, RowKey, ExternalResource))
    if single or not isinstance(given, Iterable):
        raise ExternalResourceError(
            f"{argument}= takes a list, and {given!r} is none. Write "
            f"track_external({kind!r}, ..., {argument}=[...]).",
            kind=kind,
        )
    return list(dict.fromkeys(item for each in given for item in _items(tracker, kind, each)))


def _items(tracker: ResourceTracker, kind: str, item: Any) -> Iterator[Item]:
    if isinstance(item, ExternalResource):
        if not tracker.external_resources.made(item):
            raise ExternalResourceError(
                f"The {item} is another tracker's, so {kind!r} cannot be put in order with it. "
                f"Track both with the same tracker.",
                kind=kind,
            )
        yield item
    elif isinstance(item, RowKey):
        yield item
    elif isinstance(item, sa.Table) or mapper_of(item) is not None:
        for part in parts_of(item):
            yield selection.keyed_table(tracker, part.table).name
    else:
        for table, key in selection.rows_of_instance(tracker, item):
            yield table.row(key)
