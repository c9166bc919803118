"""Which rows are entered in the ledger by other workers: only those workers delete them."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.key_json import keys_to_json
from tidyrows.ledger.entries import ROWS
from tidyrows.ledger.entry_checks import MALFORMED, bounded_body, check_keys, parsed
from tidyrows.ledger.entry_table import entry_order
from tidyrows.worker import worker_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tidyrows.keys import KeyedTable
    from tidyrows.ledger.journal import Journal

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
            changes = list(_changes(kind, read, wanted))
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
    kind: str, body: dict[str, Any], wanted: dict[Key, list[Any]]
) -> Iterator[tuple[Key, bool]]:
    """The wanted rows that an entry names, and whether they exist after it."""
    if kind == "renamed":
        for old, new in zip(body["old"], body["new"], strict=True):
            yield _comparable(old), False
            if new is not None and _comparable(new) in wanted:
                yield _comparable(new), True
    elif kind in {"rows", "gone"}:
        for key in _wanted_keys(body, wanted):
            yield key, kind == "rows"


def _wanted_keys(body: dict[str, Any], wanted: dict[Key, list[Any]]) -> list[Key]:
    if "ranges" not in body:
        return [key for key in map(_comparable, body["keys"]) if key in wanted]
    ends = body["ranges"]
    ranges = list(zip(ends[::2], ends[1::2], strict=True))
    return [
        key
        for key in wanted
        if len(key) == 1
        and isinstance(key[0], (int, Decimal))
        and any(first <= key[0] <= last for first, last in ranges)
    ]


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
