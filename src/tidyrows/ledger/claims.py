"""Which rows other workers have entered into the ledger: they are theirs to delete."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.key_json import values_out
from tidyrows.ledger.entries import ROWS
from tidyrows.ledger.table import in_order

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tidyrows.keys import KeyedTable
    from tidyrows.ledger.journal import Book


def claimed_by_others(
    connection: sa.Connection, book: Book, table: KeyedTable, keys: Sequence[Any]
) -> dict[Any, str]:
    """Of these rows, those of another worker, and whose they are.

    Args:
        connection: in a transaction in which the rows were seen, and whose next statement sees
            what was committed with them.
        book: ours; what this process has entered is no claim.
        table: theirs.
        keys: theirs; ``[()]`` where the table has no primary key, so that no row can be named.
    """
    ledger = book.ledger
    entries = ledger.table_on(connection)
    asked = (
        sa.select(entries.c.owner, entries.c.kind, entries.c.body, entries.c.run, entries.c.worker)
        .where(
            entries.c.owner != book.owner.id,
            entries.c.schema_name == table.name.schema,
            entries.c.table_name == table.name.name,
            entries.c.kind.in_(ROWS),
        )
        .order_by(*in_order(entries))
    )
    found = ledger.run(connection, asked).all()
    if not found:
        return {}
    if not table.key_columns:
        return _of_nameless(found)
    wanted: dict[Any, list[Any]] = {}
    for key, sent in zip(keys, values_out(table, connection.dialect, keys), strict=True):
        wanted.setdefault(_loosely(sent), []).append(key)
    claims: dict[Any, dict[str, str]] = {}
    for owner, kind, body, run, worker in found:
        for key, is_there in _said(kind, json.loads(body), wanted):
            if is_there:
                claims.setdefault(key, {})[owner] = f"worker {worker} of run {run}"
            else:
                claims.get(key, {}).pop(owner, None)
    return {
        key: next(iter(owners.values()))
        for sent, owners in claims.items()
        if owners
        for key in wanted[sent]
    }


def _of_nameless(found: Sequence[Any]) -> dict[Any, str]:
    """Who has entered more rows of a table without a primary key than are gone."""
    counts: dict[str, int] = {}
    names: dict[str, str] = {}
    for owner, kind, body, run, worker in found:
        rows = len(json.loads(body).get("rows", ()))
        counts[owner] = counts.get(owner, 0) + (rows if kind == "whole" else -rows)
        names.setdefault(owner, f"worker {worker} of run {run}")
    others = [names[owner] for owner, count in counts.items() if count > 0]
    return {(): others[0]} if others else {}


def _said(
    kind: str, body: dict[str, Any], wanted: dict[Any, list[Any]]
) -> Iterator[tuple[Any, bool]]:
    """Of the rows asked about, those that an entry says are there, or are no more."""
    if kind == "renamed":
        for old, new in zip(body["old"], body["new"], strict=True):
            yield _loosely(old), False
            if new is not None and _loosely(new) in wanted:
                yield _loosely(new), True
    elif kind in {"rows", "gone"}:
        for key in _named(body, wanted):
            yield key, kind == "rows"


def _named(body: dict[str, Any], wanted: dict[Any, list[Any]]) -> list[Any]:
    """Which of the rows asked about an entry names."""
    if "ranges" not in body:
        return [key for key in map(_loosely, body["keys"]) if key in wanted]
    ends = body["ranges"]
    numbers = [key for key in wanted if len(key) == 1 and isinstance(key[0], (int, Decimal))]
    return [
        key
        for key in numbers
        if any(first <= key[0] <= last for first, last in zip(ends[::2], ends[1::2], strict=True))
    ]


def _loosely(sent: Sequence[Any]) -> tuple[Any, ...]:
    """A key by which equal ones are found, and maybe a few more: those are left alone too.

    Databases pad text, and some do not tell capitals; a decimal has many forms.
    """
    return tuple(_loose(value) for value in sent)


def _loose(value: Any) -> Any:
    if isinstance(value, str):
        return value.casefold().rstrip()
    if isinstance(value, dict):
        ((kind, text),) = value.items()
        if kind == "decimal":
            return Decimal(text).normalize()
        return kind, str(text).casefold()
    return value
