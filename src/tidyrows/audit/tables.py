"""The rows of one table between two looks: which are new, which are gone, which have changed.

Of a small table every row is known. Of a large one only those are that were added since the audit
began, by the index of its key: reading a million keys after each test takes too long.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.keys import TableName
from tidyrows.schema.reflect import without_reflection_warnings

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

Key = tuple[int | str, ...]
"""A key in one form, whether the ORM or a look at the table has read it: numbers and text."""

SMALL = 1000
"""Up to how many rows a table is read as a whole."""
_KEYS = 5
_LONGEST = 60
"""Characters of a key."""
TOGETHER = 50
"""How many tables one statement counts."""
_AS_WRITTEN = {"schema_translate_map": None}


@dataclass(frozen=True, slots=True)
class Difference:
    """What became of the rows of one table."""

    table: TableName
    appeared: frozenset[Key] = frozenset()
    gone: frozenset[Key] = frozenset()
    changed: frozenset[Key] = frozenset()
    more: int = 0  # new rows whose keys were not read
    dropped: bool = False  # the table itself

    def __bool__(self) -> bool:
        return bool(self.appeared or self.gone or self.changed or self.more)

    def remade(self) -> Iterator[Difference]:
        """The same for a table that was dropped and created again: a changed row is another row."""
        yield Difference(self.table, gone=self.gone | self.changed, dropped=True)
        yield Difference(self.table, appeared=self.appeared | self.changed, more=self.more)


@dataclass
class WatchedTable:
    """A table, and its rows as they were at the last look."""

    name: TableName
    columns: tuple[str, ...]  # those that are compared
    key: tuple[str, ...]  # empty where there is no primary key
    numbered: bool  # the key is one number, so new rows are found by its index
    above: int | None = None  # only rows with a higher key are looked at; None for all rows
    rows: dict[Key, int] = field(default_factory=dict)  # the hash of each row
    unseen: bool = False  # too large to be looked at, or not readable
    _counting: dict[int | None, list[str]] = field(default_factory=dict)  # the SQL, by ``above``

    def sees(self, key: Key) -> bool:
        """Whether a row of this key would be seen by a look."""
        if self.unseen:
            return False
        return self.above is None or (isinstance(key[0], int) and key[0] > self.above)

    @property
    def is_large(self) -> bool:
        """Whether not all of its rows are known."""
        return self.unseen or self.above is not None

    def count(self, connection: sa.Connection) -> int:
        """How many rows there are."""
        return int(self._scalar(connection, sa.select(sa.func.count()).select_from(self._clause)))

    def all_gone(self) -> Difference:
        """The table was dropped."""
        return Difference(self.name, gone=frozenset(self.rows), dropped=True)

    # -- looking -----------------------------------------------------------------------------------

    def counting(self, connection: sa.Connection) -> Sequence[str]:
        """Cheap questions that show whether rows came or went: the count, and the highest key.

        The SQL is kept: compiling it takes longer than running it.
        """
        if self.above not in self._counting:
            some: sa.Select[Any] = sa.select(sa.literal_column("1")).select_from(self._clause)
            looks = [sa.select(sa.func.count()).select_from(self._limited(some).subquery())]
            if self.numbered:
                looks.append(sa.select(sa.func.max(self._first)))
            self._counting = {self.above: [_compiled(look, connection) for look in looks]}
        return self._counting[self.above]

    def expected(self) -> list[Any]:
        """The answers where nothing has happened."""
        if not self.numbered:
            return [len(self.rows)]
        # SQLite may have text in such columns too; then a look follows each time.
        numbers = (key[0] for key in self.rows if isinstance(key[0], int))
        return [len(self.rows), max(numbers, default=self.above)]

    def look(self, connection: sa.Connection) -> Difference:
        """Read the rows, and compare them with the look before."""
        if self.unseen:
            return Difference(self.name)
        before = self.rows
        found = self._read(connection)
        if len(found) <= SMALL:
            self.rows = found
            return Difference(
                self.name,
                appeared=frozenset(found.keys() - before.keys()),
                gone=frozenset(before.keys() - found.keys()),
                changed=frozenset(
                    key for key in found.keys() & before.keys() if found[key] != before[key]
                ),
            )
        new = frozenset(found.keys() - before.keys())
        counted = sa.select(sa.func.count()).select_from(self._clause)
        count = int(self._scalar(connection, self._restricted(counted)))
        self._grow(connection)
        self.rows = {}
        return Difference(self.name, appeared=new, more=max(0, count - len(before) - len(new)))

    def begin(self, connection: sa.Connection) -> None:
        """The first look: all rows were there before."""
        found = self._read(connection)
        if len(found) > SMALL:
            self._grow(connection)
        else:
            self.rows = found

    def _grow(self, connection: sa.Connection) -> None:
        """From now on look only at rows with a higher number than there is now."""
        highest = (
            self._scalar(connection, sa.select(sa.func.max(self._first))) if self.numbered else None
        )
        self.unseen = not isinstance(highest, int)
        self.above = None if self.unseen else highest

    def _read(self, connection: sa.Connection) -> dict[Key, int]:
        """All rows that are looked at, at most one more than a small table has."""
        chosen = sa.select(*(self._clause.c[name] for name in self.columns))
        sql = self._limited(chosen)
        found = connection.execute(sql, execution_options=_AS_WRITTEN).all()
        places = [self.columns.index(name) for name in self.key]
        # Rows without a key are distinguished by all their values, and equal rows by a number.
        equal: Counter[str] = Counter()
        rows: dict[Key, int] = {}
        for row in found:
            text = repr([*map(_comparable, row)])
            if places:
                rows[plain_key(row[n] for n in places)] = hash(text)
            else:
                equal[text] += 1
                rows[text, equal[text]] = 0
        return rows

    def _scalar(self, connection: sa.Connection, statement: sa.Select[Any]) -> Any:
        return connection.execute(statement, execution_options=_AS_WRITTEN).scalar()

    def _limited(self, statement: sa.Select[Any]) -> sa.Select[Any]:
        """At most one row more than a small table has."""
        if self.above is not None:
            # By the index: a planner without statistics would read the whole table for a LIMIT.
            statement = self._restricted(statement).order_by(self._first)
        return statement.limit(SMALL + 1)

    def _restricted(self, statement: sa.Select[Any]) -> sa.Select[Any]:
        return statement if self.above is None else statement.where(self._first > self.above)

    @cached_property
    def _clause(self) -> sa.TableClause:
        # Without types: values are compared as the driver reads them.
        columns: list[sa.ColumnClause[Any]] = [sa.column(name) for name in self.columns]
        return sa.table(
            sa.quoted_name(self.name.name, quote=None),
            *columns,
            schema=sa.quoted_name(self.name.schema, quote=None) if self.name.schema else None,
        )

    @property
    def _first(self) -> sa.ColumnClause[Any]:
        column: sa.ColumnClause[Any] = self._clause.c[self.key[0]]
        return column


def reflected(connection: sa.Connection, database: str, schema: str) -> Iterator[WatchedTable]:
    """The tables of one schema, as the database describes them."""
    inspector = sa.inspect(connection)
    with without_reflection_warnings():
        keys = inspector.get_multi_pk_constraint(schema=schema)
        found = inspector.get_multi_columns(schema=schema)
    for (place, name), columns in found.items():
        kinds: Mapping[str, Any] = {str(column["name"]): column["type"] for column in columns}
        constraint: Mapping[str, Any] = keys.get((place, name)) or {}
        key: Sequence[str] = constraint.get("constrained_columns") or ()
        compared = tuple(  # not what may hold files, which would be read after each test
            n for n, t in kinds.items() if n in key or not isinstance(t, sa.LargeBinary)
        )
        numbered = len(key) == 1 and isinstance(kinds[key[0]], sa.Integer)
        yield WatchedTable(TableName(database, schema, name), compared, tuple(key), numbered)


def _compiled(look: sa.Select[Any], connection: sa.Connection) -> str:
    return str(look.scalar_subquery().compile(connection, compile_kwargs={"literal_binds": True}))


def first_keys(keys: Iterable[Key]) -> list[Any]:
    """The first few, for people and for JSON: bare where the key is one column."""
    few = sorted(keys, key=lambda key: tuple((isinstance(part, str), part) for part in key))[:_KEYS]
    cut = [tuple(part[:_LONGEST] if isinstance(part, str) else part for part in key) for key in few]
    return [key[0] if len(key) == 1 else list(key) for key in cut]


def listed(keys: Sequence[Any], count: int) -> str:
    """These keys of so many, in brackets."""
    if not keys:
        return ""
    more = ", ..." if count > len(keys) else ""
    return f" ({', '.join(map(_printable, keys))}{more})"


def listed_keys(keys: Collection[Key]) -> str:
    """The first few, in brackets."""
    return listed(first_keys(keys), len(keys))


def _printable(key: Any) -> str:
    """A key may contain anything: a new line, or a command for the terminal."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(key))


def plain_key(values: Iterable[Any]) -> Key:
    """A key of the values that the driver reads, or is sent."""
    return tuple(_plain(value) for value in values)


def _plain(value: Any) -> int | str:
    if isinstance(value, int):
        return int(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).hex()
    return str(value)


def _comparable(value: Any) -> Any:
    """psycopg2 reads binary values as a memoryview, whose repr is an address."""
    if isinstance(value, list):
        return [_comparable(each) for each in value]
    return bytes(value) if isinstance(value, memoryview) else value
