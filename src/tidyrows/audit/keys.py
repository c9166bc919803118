"""Keys in one form, whether the ORM or a look at the table has read them.

The ORM has the Python values of the project's types, a look has the driver's values: both become
what the driver is sent, as numbers and text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import sqlalchemy as sa

Key = tuple[int | str, ...]

SHOWN = 5
"""How many keys a finding shows."""
_LONGEST = 60


def _plain(value: Any) -> int | str:
    if isinstance(value, int):
        return int(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).hex()
    return str(value)


def plain_key(values: Iterable[Any]) -> Key:
    """A key that the driver has read."""
    return tuple(_plain(value) for value in values)


def row_text(values: Iterable[Any]) -> str:
    """A row that the driver has read, to be compared with what it reads later."""
    return repr([_comparable(value) for value in values])


def _comparable(value: Any) -> Any:
    """psycopg2 reads binary values as a memoryview, whose repr is an address."""
    if isinstance(value, list):
        return [_comparable(each) for each in value]
    return bytes(value) if isinstance(value, memoryview) else value


def sent_key(
    columns: Sequence[sa.Column[Any]], values: Sequence[Any], dialect: sa.Dialect
) -> Key | None:
    """A key as the project's types send it to the driver; None where a type refuses it."""
    sent: list[int | str] = []
    for column, value in zip(columns, values, strict=True):
        if value is None:
            return None
        processor = column.type.dialect_impl(dialect).bind_processor(dialect)
        try:
            sent.append(_plain(value if processor is None else processor(value)))
        except Exception:  # noqa: BLE001 -- a project's own type may not take back what it has made
            return None
    return tuple(sent)


def first_keys(keys: Iterable[Key]) -> list[Any]:
    """The first few, for people and for JSON: bare where the key is one column."""
    few = sorted(keys, key=lambda key: tuple((isinstance(part, str), part) for part in key))[:SHOWN]
    cut = [tuple(part[:_LONGEST] if isinstance(part, str) else part for part in key) for key in few]
    return [key[0] if len(key) == 1 else list(key) for key in cut]
