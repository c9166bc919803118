"""Carry out what a transaction did, in the trackers: once it is certain, or as far as it is."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from tidyrows.capture.changes import Change, Kind
from tidyrows.capture.digests import UNCOMPARED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tidyrows.capture.changes import Touch
    from tidyrows.tracking.tracker import ResourceTracker


def believe(changes: Iterable[Change], holders: Sequence[ResourceTracker]) -> None:
    """The database has committed these.

    Args:
        changes: in the order in which they were made.
        holders: the trackers that may hold rows of the engine.
    """
    said: list[Callable[[], None]] = []
    for change in changes:
        if change.touch is not None:
            _touched(change, change.touch, holders)
        elif not change.certain:
            doubt([change], holders)
        elif change.owner is not None:
            _owned(change, change.owner)
        elif change.kind in {Kind.TAKEN, Kind.DELETED}:
            _deleted(change, holders)
        elif change.kind is Kind.UPDATED:
            for holder in holders:
                holder.note_update(change.table, change.keys, change.patches)
        elif change.kind is Kind.MOVED:
            moved = [holder for holder in holders if holder.doubt_all(change.table)]
            said += [partial(holder.say_renamed, change.table) for holder in moved]
        else:
            lost = [holder for holder in holders if holder.rename(change.table, change.keys)]
            said += [partial(holder.say_renamed, change.table) for holder in lost]
    for say in said:  # last of all: where warnings are errors, no row is lost over one
        say()


def _owned(change: Change, owner: ResourceTracker) -> None:
    if change.kind is Kind.UNKEYED:
        owner.take_unkeyed(change.table, change.keys)
    elif change.told:
        owner.take_told(change.table, change.keys)
    else:
        owner.hold(change.table, change.keys, prints=change.prints, generated=change.generated)


def _touched(change: Change, touch: Touch, holders: Sequence[ResourceTracker]) -> None:
    """Tell who watches of the rows that are not its own, nor those of a block within its.

    What wider fixtures do to each other's rows, and when they are torn down, is their own affair.
    """
    name, watcher = change.table.name, touch.watcher
    own = [
        holder
        for holder in holders
        if holder is watcher or watcher.is_shared or not holder.is_shared
    ]
    keys = set(change.keys)
    for holder in own:
        keys.difference_update(holder.those_held(name, change.keys))
    if change.keys:
        count = min(touch.count, len(keys))
    else:  # the statement does not say which: as many as cannot be its own
        count = touch.count - sum(holder.count_of(name) for holder in own)
    if count > 0:
        watcher.note_touched(change.table, sorted(keys, key=repr), touch.verb, count)


def _deleted(change: Change, holders: Sequence[ResourceTracker]) -> None:
    if change.kind is Kind.TAKEN:
        _taken(change, holders, unsure=False)
    else:
        for holder in holders:
            holder.forget(change.table, change.keys)


def _taken(change: Change, holders: Sequence[ResourceTracker], *, unsure: bool) -> None:
    """Of equal rows it is all the same whose was deleted, as long as each counts once."""
    rows: Sequence[tuple[Any, ...] | None] = change.keys
    for holder in holders:
        rows = holder.drop_equal(change.table, rows, unsure=unsure)


def _doubt_table(change: Change, holders: Sequence[ResourceTracker]) -> None:
    if change.kind is Kind.TAKEN:
        _taken(change, holders, unsure=True)
    else:
        for holder in holders:
            holder.doubt_all(change.table)


def doubt(changes: Iterable[Change], holders: Sequence[ResourceTracker]) -> None:
    """Nobody knows whether the database has committed these."""
    for change in changes:
        if change.touch is not None:
            continue  # what may not have happened is not said
        if change.kind is Kind.INSERTED and change.owner is not None:
            change.owner.take_in_doubt(
                change.table, change.keys, prints=change.prints, generated=change.generated
            )
        elif change.owner is not None:
            change.owner.take_unkeyed(change.table, change.keys, certain=False)
        elif change.kind in {Kind.TAKEN, Kind.MOVED}:
            _doubt_table(change, holders)
        elif change.kind is Kind.UPDATED:
            loose = [dict.fromkeys(patch, UNCOMPARED) for patch in change.patches]
            for holder in holders:
                holder.note_update(change.table, change.keys, loose)
        else:
            keys = change.keys
            if change.kind is Kind.RENAMED:
                keys = [key for pair in keys for key in pair if key is not None]
            for holder in holders:
                holder.doubt(change.table, keys)
