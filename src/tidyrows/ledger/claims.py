"""Which rows are entered in the ledger by other workers: only those workers delete them."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from tidyrows.errors import TidyRowsError
from tidyrows.key_json import keys_to_json
from tidyrows.ledger.entries import ROWS
from tidyrows.ledger.entry_checks import MALFORMED, bounded_body, check_keys, parsed
from tidyrows.ledger.entry_table import entry_order
from tidyrows.worker import worker_name

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from tidyrows.keys import KeyedTable
    from tidyrows.ledger.journal import Journal
    from tidyrows.schema.graph import Place

    Key = tuple[Any, ...]


def claimed_by_others(
    connection: sa.Connection,
    journal: Journal,
    table: KeyedTable,
    keys: Sequence[Any],
    *,
    entered: bool = False,
) -> dict[Any, str]:
    """The rows among these that belong to another worker, each with the worker's name.

    ``keys`` is ``[()]`` where the table has no primary key. The transaction has read the rows, so
    its next statement reads the entries that were committed with them. ``entered`` rows are in
    entries of the tracker itself: an entry that nobody can read says nothing against those.
    """
    ledger = journal.ledger
    entries = ledger.table_on(connection)
    select = (
        sa.select(
            *(entries.c[name] for name in ("owner", "kind", "run", "worker")), bounded_body(entries)
        )
        .where(
            entries.c.owner != journal.process.id,
            entries.c.schema_name == table.name.schema,
            entries.c.table_name == table.name.name,
            entries.c.kind.in_(ROWS),
        )
        .order_by(*entry_order(entries))
    )
    found = ledger.execute(connection, select).all()
    if not found:
        return {}
    if not table.key_columns:
        return _claims_without_keys(found)
    wanted: dict[Key, list[Any]] = {}
    for key, sent in zip(keys, keys_to_json(table, connection.dialect, keys), strict=True):
        wanted.setdefault(_comparable(sent), []).append(key)
    claims: dict[Key, dict[str, str]] = {}
    for owner, kind, run, worker, body in found:
        try:
            read = parsed(body)
            if entered:
                check_keys(read, {})
            changes = list(_changes(kind, read, wanted, _comparable))
        except MALFORMED:  # nobody knows which rows it names
            changes = [] if entered else [(key, True) for key in wanted]
        for key, is_there in changes:
            if is_there:
                claims.setdefault(key, {})[owner] = worker_name(worker, run)
            else:
                claims.get(key, {}).pop(owner, None)
    return {
        key: next(iter(owners.values()))
        for sent, owners in claims.items()
        if owners
        for key in wanted[sent]
    }


class Claim(NamedTuple):
    """What another worker's entry says of a key that we have entered, too."""

    holder: str
    is_later: bool  # certainly made after our row, which was gone by then; else nobody can tell


class _Making(NamedTuple):
    """When a row was entered, by the clock of the database: between these seconds."""

    holder: str
    since: float
    until: float


def claims_on_entered(
    connection: sa.Connection,
    journal: Journal,
    rows: Mapping[Place, tuple[KeyedTable, Sequence[Any]]],
) -> dict[Place, dict[Any, Claim]]:
    """The rows among these, which the tracker has entered, that may be another worker's by now.

    An entry is written after the INSERT of its row, which waits until another row with the key is
    gone for good: of two entries that name one key, the later one has the row. Entries that were
    written anew do not tell since when their rows are there.
    """
    entries = journal.ledger.table_on(connection)
    process = journal.process.id
    found = _entries_about(connection, journal, rows, entries.c.owner != process)
    claims: dict[Place, dict[Any, Claim]] = {}
    for place, theirs in found.items():
        table, keys = rows[place]
        try:
            forms = keys_to_json(table, connection.dialect, keys)
        except TidyRowsError:  # keys that no entry can name
            continue
        exact = dict(zip(map(_exact, forms), keys, strict=True))
        similar = dict(zip(exact, map(_comparable, forms), strict=True))
        same = _makings(theirs, exact, _exact)
        alike = _makings(theirs, set(similar.values()), _comparable)
        claimed = [each for each in exact if each in same or similar[each] in alike]
        if not claimed:
            continue
        own = sa.and_(entries.c.owner == process, entries.c.scope == journal.scope)
        mine = _entries_about(connection, journal, {place: rows[place]}, own).get(place, ())
        ours = _makings(mine, set(claimed), _exact)
        for each in claimed:
            (made,) = ours.get(each) or [_Making("", -math.inf, math.inf)]
            makings = same.get(each) or alike[similar[each]]
            later = [other for other in makings if other.since > made.until]
            unsure = [other for other in makings if other.until >= made.since]
            if later or unsure:
                claim = Claim((later or unsure)[0].holder, bool(later) and each in same)
                claims.setdefault(place, {})[exact[each]] = claim
    return claims


def _entries_about(
    connection: sa.Connection,
    journal: Journal,
    places: Collection[Place],
    condition: sa.ColumnElement[bool],
) -> dict[Place, list[Any]]:
    """Entries about rows of these tables, in the order of each owner's log."""
    entries = journal.ledger.table_on(connection)
    named = ("schema_name", "table_name", "owner", "kind", "run", "worker", "written")
    select = (
        sa.select(*(entries.c[name] for name in named), bounded_body(entries))
        .where(
            condition,
            entries.c.table_name.in_([name for _schema, name in places]),
            entries.c.kind.in_(ROWS),
        )
        .order_by(*entry_order(entries))
    )
    found: dict[Place, list[Any]] = {}
    for schema, name, *entry in journal.ledger.execute(connection, select):
        if (schema, name) in places:
            found.setdefault((schema, name), []).append(entry)
    return found


def _makings(
    found: Sequence[Any], wanted: Collection[Key], form: Callable[[Sequence[Any]], Key]
) -> dict[Key, list[_Making]]:
    """When each owner of entries has made the wanted rows that it has, by key in this form."""
    makings: dict[Key, dict[str, _Making]] = {}
    for owner, kind, run, worker, written, body in found:
        try:
            read = parsed(body)
            check_keys(read, {})
            changes = list(_changes(kind, read, wanted, form))
        except MALFORMED:  # an entry that nobody can read says nothing against ours
            continue
        since = -math.inf if read.get("again") else written
        for key, is_there in changes:
            if is_there:
                making = _Making(worker_name(worker, run), since, written)
                makings.setdefault(key, {})[owner] = making
            else:
                makings.get(key, {}).pop(owner, None)
    return {key: list(owners.values()) for key, owners in makings.items() if owners}


def _claims_without_keys(found: Sequence[Any]) -> dict[Any, str]:
    """The name of a worker that has inserted more rows of the table than it has deleted."""
    counts: dict[str, float] = {}
    names: dict[str, str] = {}
    for owner, kind, run, worker, body in found:
        try:
            rows = len(parsed(body).get("rows", ()))
            count: float = rows if kind == "whole" else -rows
        except MALFORMED:  # nobody knows how many rows it names
            count = math.inf
        counts[owner] = counts.get(owner, 0) + count
        names.setdefault(owner, worker_name(worker, run))
    others = [names[owner] for owner, count in counts.items() if count > 0]
    return {(): others[0]} if others else {}


def _changes(
    kind: str, body: dict[str, Any], wanted: Collection[Key], form: Callable[[Sequence[Any]], Key]
) -> Iterator[tuple[Key, bool]]:
    """The wanted rows that an entry names, and whether they exist after it."""
    if kind == "renamed":
        for old, new in zip(body["old"], body["new"], strict=True):
            yield form(old), False
            if new is not None and form(new) in wanted:
                yield form(new), True
    elif kind in {"rows", "gone"}:
        for key in _wanted_keys(body, wanted, form):
            yield key, kind == "rows"


def _wanted_keys(
    body: dict[str, Any], wanted: Collection[Key], form: Callable[[Sequence[Any]], Key]
) -> list[Key]:
    if "ranges" not in body:
        return [key for key in map(form, body["keys"]) if key in wanted]
    ends = body["ranges"]
    ranges = list(zip(ends[::2], ends[1::2], strict=True))
    if sum(last - first + 1 for first, last in ranges) <= len(wanted):
        named = ((number,) for first, last in ranges for number in range(first, last + 1))
        return [key for key in named if key in wanted]
    return [
        key
        for key in wanted
        if len(key) == 1
        and isinstance(key[0], (int, Decimal))
        and any(first <= key[0] <= last for first, last in ranges)
    ]


def _exact(sent: Sequence[Any]) -> Key:
    """Equal for keys that are written alike: they name one row."""
    return tuple(json.dumps(value) if isinstance(value, dict) else value for value in sent)


def _comparable(sent: Sequence[Any]) -> Key:
    """Equal for equal keys, and perhaps for a few others, whose rows stay as well.

    Databases pad text, and some ignore its case; a decimal has many forms.
    """
    return tuple(_comparable_value(value) for value in sent)


def _comparable_value(value: Any) -> Any:
    if isinstance(value, str):
        return value.casefold().rstrip()
    if isinstance(value, dict):
        ((kind, text),) = value.items()
        if kind == "decimal":
            return Decimal(text).normalize()
        return kind, str(text).casefold()
    return value
