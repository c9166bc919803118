"""What a raw SQL string does, as far as its first words tell.

Only strings come here: ``text()`` and ``exec_driver_sql``. Nobody can name the rows that a raw
INSERT makes, so it is noticed and said.
"""

from __future__ import annotations

import re

_LEADING = re.compile(r"(?:\s+|--[^\n]*(?:\n|$)|/\*.*?\*/|\()*", re.DOTALL)
_NAME = r"""((?:[\w$.]+|"[^"]+"|`[^`]+`|\[[^\]]+\]|\.)+)"""
_INSERT = re.compile(
    rf"\b(?:INSERT\s+(?:(?:LOW_PRIORITY|DELAYED|HIGH_PRIORITY|IGNORE)\s+|OR\s+\w+\s+)*INTO"
    rf"|INSERT\s+IGNORE|REPLACE\s+INTO|MERGE\s+INTO|COPY|LOAD\s+DATA\b.*?\bINTO\s+TABLE|INSERT)"
    rf"\s+{_NAME}",
    re.IGNORECASE | re.DOTALL,
)
_INSERTING = frozenset({"INSERT", "REPLACE", "WITH", "MERGE", "COPY", "LOAD"})
_TRANSACTION = frozenset({"BEGIN", "START", "COMMIT", "END", "ROLLBACK", "SAVEPOINT", "RELEASE"})
_DDL = frozenset({"CREATE", "ALTER", "DROP", "TRUNCATE", "RENAME", "GRANT", "REVOKE", "LOCK"})


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


def ends_or_splits_transaction(sql: str) -> bool:
    """Whether a raw statement moves the transaction behind SQLAlchemy's back."""
    return first_word(sql) in _TRANSACTION


def is_ddl(sql: str) -> bool:
    """Whether a raw statement changes the schema (on the MySQL family it commits)."""
    return first_word(sql) in _DDL
