"""Keys in a form that can be compared and written down, whoever has read them.

The ORM has the Python values of the project's types, a look at the table has the driver's: both are
brought to what the driver is sent, as numbers and text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import sqlalchemy as sa

Key = tuple[int | str, ...]

SHOWN = 5
"""How many keys are shown of a finding."""
_LONGEST = 60


def plain(value: Any) -> int | str:
    """One value of a key."""
    if isinstance(value, int):
        return int(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).hex()
    return str(value)


def plain_key(values: Iterable[Any]) -> Key:
    """A key as it was read by the driver."""
    return tuple(plain(value) for value in values)


def as_text(values: Iterable[Any]) -> str:
    """A row as it was read by the driver, to be compared with what it reads later."""
    return repr([_lasting(value) for value in values])


def _lasting(value: Any) -> Any:
    """Without memory's own addresses, in whose names psycopg2 gives what is binary."""
    if isinstance(value, list):
        return [_lasting(each) for each in value]
    return bytes(value) if isinstance(value, memoryview) else value


def sent_key(
    columns: Sequence[sa.Column[Any]], values: Sequence[Any], dialect: sa.Dialect
) -> Key | None:
    """A key as the project's types send it to the driver; None where one is missing or refused."""
    sent: list[int | str] = []
    for column, value in zip(columns, values, strict=True):
        if value is None:
            return None
        processor = column.type.dialect_impl(dialect).bind_processor(dialect)
        try:
            sent.append(plain(value if processor is None else processor(value)))
        except Exception:  # noqa: BLE001 -- a project's own type may not take back what it has made
            return None
    return tuple(sent)


def shown(keys: Iterable[Key]) -> list[Any]:
    """The first few, for people and for JSON: bare where the key is one column."""
    few = sorted(keys, key=lambda key: tuple((isinstance(part, str), part) for part in key))[:SHOWN]
    cut = [tuple(part[:_LONGEST] if isinstance(part, str) else part for part in key) for key in few]
    return [key[0] if len(key) == 1 else list(key) for key in cut]
