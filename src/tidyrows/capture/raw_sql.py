"""What a raw SQL string does, as far as its first words tell.

Only strings come here: ``text()`` and ``exec_driver_sql``. Nobody can name the rows that a raw
INSERT makes, so it is noticed and said.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tidyrows.keys import KeyedTable, TableName

_LEADING = re.compile(r"(?:\s+|--[^\n]*(?:\n|$)|/\*.*?\*/|\()*", re.DOTALL)
_NAME = r"""((?:[\w$.]+|"[^"]+"|`[^`]+`|\[[^\]]+\]|\.)+)"""
_INSERT = re.compile(
    rf"\b(?:INSERT\s+(?:(?:LOW_PRIORITY|DELAYED|HIGH_PRIORITY|IGNORE)\s+|OR\s+\w+\s+)*INTO"
    rf"|INSERT\s+IGNORE|REPLACE\s+INTO|MERGE\s+INTO|COPY|LOAD\s+DATA\b.*?\bINTO\s+TABLE|INSERT)"
    rf"\s+{_NAME}",
    re.IGNORECASE | re.DOTALL,
)
_INSERTING = frozenset({"INSERT", "REPLACE", "WITH", "MERGE", "COPY", "LOAD"})
_TRANSACTION = frozenset(
    {"BEGIN", "START", "COMMIT", "END", "ROLLBACK", "ABORT", "SAVEPOINT", "RELEASE", "XA"}
)
_MOVE = re.compile(
    r"""(?P<verb>BEGIN|START\s+TRANSACTION|COMMIT|END|ROLLBACK|ABORT|SAVEPOINT|RELEASE)
    (?:\s+(?:WORK|TRANSACTION))?
    (?:(?P<to>\s+TO)?(?:\s+SAVEPOINT)?\s+(?P<name>\w+|"[^"]+"|`[^`]+`|\[[^\]]+\]))?\s*;?\s*""",
    re.IGNORECASE | re.VERBOSE,
)
_DDL = frozenset({"CREATE", "ALTER", "DROP", "TRUNCATE", "RENAME", "GRANT", "REVOKE", "LOCK"})

_EMPTIES = re.compile(
    rf"""(?:DELETE\s+FROM|TRUNCATE(?:\s+TABLE)?)\s+(?:ONLY\s+)?
    (?P<names>{_NAME[1:-1]}(?:\s*,\s*{_NAME[1:-1]})*)
    (?:\s+(?:RESTART|CONTINUE)\s+IDENTITY)?(?:\s+(?P<kin>CASCADE)|\s+RESTRICT)?\s*;?\s*""",
    re.IGNORECASE | re.VERBOSE,
)
_DROPS = re.compile(
    r"""\s*DROP\s+(?:DATABASE|SCHEMA)\s+(?:IF\s+EXISTS\s+)?([\w$-]+|"[^"]+"|`[^`]+`)""",
    re.IGNORECASE,
)
_PART = re.compile(r"""[\w$]+|"[^"]+"|`[^`]+`|\[[^\]]+\]""")


def first_word(sql: str) -> str:
    """The statement's first word, in capitals, past comments and brackets."""
    place = _LEADING.match(sql)
    rest = sql[place.end() :] if place else sql
    word = re.match(r"\w+", rest)
    return word.group().upper() if word else ""


def inserted_table(sql: str) -> str | None:
    """The table that a raw statement inserts into, as written there, or None."""
    if first_word(sql) not in _INSERTING:
        return None
    match = _INSERT.search(sql)
    return match.group(1) if match else None


def emptied_tables(sql: str) -> tuple[list[list[str]], bool]:
    """The tables that a raw DELETE without WHERE, or a TRUNCATE, empties.

    Returns:
        The parts of each name, the table's last; and whether what references them goes too.
    """
    place = _LEADING.match(sql)
    match = _EMPTIES.fullmatch(sql, place.end() if place else 0)
    if match is None:
        return [], False
    names = [_PART.findall(name) for name in match["names"].split(",")]
    return [[part.strip('"`[]') for part in name] for name in names], bool(match["kin"])


def dropped_database(sql: str) -> str | None:
    """The database that a raw statement drops, or None."""
    match = _DROPS.match(sql)
    return match[1].strip('"`') if match else None


class Move(Enum):
    """What a raw statement does to the transaction behind SQLAlchemy's back."""

    BEGIN = auto()
    COMMIT = auto()
    ROLLBACK = auto()
    SAVEPOINT = auto()
    RELEASE = auto()
    ROLLBACK_TO = auto()
    UNCLEAR = auto()


_MOVES = {
    "BEGIN": Move.BEGIN,
    "START": Move.BEGIN,
    "COMMIT": Move.COMMIT,
    "END": Move.COMMIT,
    "ROLLBACK": Move.ROLLBACK,
    "ABORT": Move.ROLLBACK,
    "SAVEPOINT": Move.SAVEPOINT,
    "RELEASE": Move.RELEASE,
}


def transaction_move(sql: str) -> tuple[Move, str] | None:
    """What a raw statement does to the transaction, and the savepoint's name; None if nothing."""
    word = first_word(sql)
    if word not in _TRANSACTION:
        return None
    match = _MOVE.fullmatch(sql.strip())
    if match is None:  # COMMIT PREPARED 'x', BEGIN ISOLATION LEVEL ..., a second statement
        return Move.UNCLEAR, ""
    move, name = _MOVES[word], (match["name"] or "").strip('"`[]')
    if move is Move.ROLLBACK and match["to"]:
        move = Move.ROLLBACK_TO
    takes_name = move in {Move.SAVEPOINT, Move.RELEASE, Move.ROLLBACK_TO}
    if takes_name is not bool(name):
        return (
            Move.UNCLEAR,
            "",
        )  # COMMIT PREPARED 'x', BEGIN ISOLATION LEVEL ..., a second statement
    return move, name


def is_ddl(sql: str) -> bool:
    """Whether a raw statement changes the schema (on the MySQL family it commits)."""
    return first_word(sql) in _DDL


def emptied_of(
    tables: Iterable[KeyedTable], names: Iterable[Sequence[str]], *, with_kin: bool
) -> set[TableName]:
    """Of these tables, those that are empty afterwards.

    A name without a schema that fits tables of several schemas says nothing.
    """
    known = {table.name: table for table in tables}
    found: set[TableName] = set()
    for parts in names:
        fits = {name for name in known if _fits(name, [part.casefold() for part in parts])}
        found |= fits if len(fits) == 1 else set()
    while with_kin:
        kin = {name for name in known.keys() - found if _references(known[name], found)}
        if not kin:
            break
        found |= kin
    return found


def _fits(name: TableName, parts: Sequence[str]) -> bool:
    own = [name.name.casefold(), (name.schema or "").casefold()]
    return list(reversed(parts))[:2] == own[: min(len(parts), 2)]


def _references(table: KeyedTable, others: Iterable[TableName]) -> bool:
    targets = {key.target_fullname.split(".")[-2].casefold() for key in table.table.foreign_keys}
    return any(other.name.casefold() in targets for other in others)
