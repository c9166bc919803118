"""The external resources that a tracker owns, and what goes before and after each of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.errors import ExternalResourceError, SessionStateError
from tidyrows.external import ExternalResource, Externals, Tie
from tidyrows.keys import RowKey
from tidyrows.tracking import named_rows
from tidyrows.tracking.inheritance import mapper_of, parts_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidyrows.external import Item
    from tidyrows.keys import KeyedTable, TableName
    from tidyrows.tracking.journals import Journals
    from tidyrows.tracking.sessions import Sessions
    from tidyrows.tracking.store import Store


class TrackedResources:
    """The external resources of one tracker."""

    def __init__(
        self, sessions: Sessions, store: Store, journals: Journals, externals: Externals
    ) -> None:
        self._sessions = sessions
        self._store = store
        self._journals = journals
        self._externals = externals
        self._lock = threading.RLock()
        self._pid = os.getpid()

    def track(
        self, kind: str, payload: Any, *, after: Iterable[Any], before: Iterable[Any]
    ) -> ExternalResource:
        """See :meth:`ResourceTracker.track_external`."""
        if self._journals.has_ledgers:
            self._sessions.refuse_blocking("track_external(...)")
        if self._pid != os.getpid():
            raise SessionStateError(
                f"This tracker was made before the process forked, so the {kind} would be "
                f"forgotten. Write tracker.start() first, or make a tracker in the child."
            )
        needed_by = tuple(items(self._sessions, self._externals, kind, "after", after))
        needs = tuple(items(self._sessions, self._externals, kind, "before", before))
        with self._lock:
            resource = self._externals.new(kind, payload)
            self._externals.tie(resource, needed_by, needs)
        try:
            self._journals.intend(Tie(resource, needed_by, needs), self._tables)
        except BaseException:
            self._externals.forget(resource)
            raise
        return resource

    def forget_parent(self) -> None:
        """In a forked child: the resources are the parent's."""
        self._externals.clear()
        self._lock, self._pid = threading.RLock(), os.getpid()

    def ties(self) -> list[Tie]:
        """Every resource that is not known to be gone, in order. Empty in a forked child."""
        if self._pid != os.getpid():
            return []
        with self._lock:
            return list(self._externals)

    def forget(self, resource: ExternalResource) -> None:
        """A resource is gone."""
        self._journals.remove(resource)
        with self._lock:
            self._externals.forget(resource)

    def _tables(self) -> dict[TableName, KeyedTable]:
        """The tables of what is held, or may be once it is committed."""
        pending = self._sessions.engines.pending_changes()
        tables = {change.table.name: change.table for change in pending}
        return tables | {held.table.name: held.table for held in self._store.snapshot()}


def items(
    sessions: Sessions, externals: Externals, kind: str, argument: str, given: Any
) -> list[Item]:
    """The items of one argument."""
    single = isinstance(given, (str, bytes, type, sa.Table, RowKey, ExternalResource))
    if single or not isinstance(given, Iterable):
        raise ExternalResourceError(
            f"{argument}= takes a list, and {given!r} is none. Write "
            f"track_external({kind!r}, ..., {argument}=[...]).",
            kind=kind,
        )
    return list(
        dict.fromkeys(item for each in given for item in _items(sessions, externals, kind, each))
    )


def _items(sessions: Sessions, externals: Externals, kind: str, item: Any) -> Iterator[Item]:
    if isinstance(item, ExternalResource):
        if not externals.made(item):
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
            yield sessions.real_table(part.table).name
    else:
        for table, key in named_rows.rows_of_instance(sessions, item):
            yield table.row(key)
