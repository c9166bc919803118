"""The whole database, row by row: what proves that nobody else's row was touched.

Read through the driver alone, with questions of our own to the catalog: no SQLAlchemy event sees
it (so no tracker does), and a mistake of the library about schemas cannot hide here too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

Row = tuple[Any, ...]
SHOWN = 20
"""Rows shown per table in a difference."""

_TABLES = {
    "postgresql": """
        SELECT n.nspname, c.relname FROM pg_catalog.pg_class c
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'r' AND c.relpersistence <> 't'
        AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
    """,
    # The extra databases of a test carry the name of its own one in front.
    "mysql": """
        SELECT table_schema, table_name FROM information_schema.tables
        WHERE table_type = 'BASE TABLE'
        AND (table_schema = database() OR left(table_schema, char_length(database()) + 1)
             = concat(database(), '_'))
    """,
}


class Snapshot(dict[str, list[Row]]):
    """Sorted rows by qualified table name; equal where every row is."""

    def difference(self, other: Mapping[str, list[Row]]) -> list[str]:
        """In words, what ``other`` has lost or gained against this one."""
        lines: list[str] = []
        for table in sorted({*self, *other}):
            if table not in other:
                lines.append(f"{table}: the table is gone")
                continue
            if table not in self:
                lines.append(f"{table}: the table is new, {len(other[table])} rows")
                continue
            before, after = Counter(map(repr, self[table])), Counter(map(repr, other[table]))
            for sign, word, rows in (
                ("-", "lost", before - after),
                ("+", "gained", after - before),
            ):
                if rows:
                    lines.append(f"{table}: {rows.total()} rows {word}")
                    listed = sorted(rows.elements())
                    lines += [f"  {sign} {row}" for row in listed[:SHOWN]]
                    lines += ["  ..."] * (len(listed) > SHOWN)
        return lines

    def plus(self, other: Mapping[str, Iterable[Row]]) -> Snapshot:
        """This one with more rows."""
        added = Snapshot({table: list(rows) for table, rows in self.items()})
        for table, rows in other.items():
            added[table] = _sorted([*added.get(table, []), *rows])
        return added

    def added_since(self, earlier: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
        """The rows that are here and were not in ``earlier``."""
        new: dict[str, list[Row]] = {}
        for table, rows in self.items():
            known = Counter(map(repr, earlier.get(table, [])))
            for row in rows:
                if known[repr(row)]:
                    known[repr(row)] -= 1
                else:
                    new.setdefault(table, []).append(row)
        return new


def snapshot(engine: sa.Engine) -> Snapshot:
    """Every row of every table, in all schemas of this database.

    PostgreSQL: all schemas but the system's; partitions count as tables. MySQL family: this
    database and those whose name starts with its name and ``_``. SQLite: main and what is
    attached. Temporary tables are left out: they are nobody else's.
    """
    only = "ONLY " if engine.dialect.name == "postgresql" else ""
    taken = Snapshot()
    with _cursor(engine) as cursor:
        names = {
            (schema, table): f"{only}{_quoted(engine, schema)}.{_quoted(engine, table)}"
            for schema, table in _table_names(engine, cursor)
        }
        filled = _filled(cursor, list(names.values()))
        for (schema, table), name in names.items():
            rows = []
            if name in filled:
                cursor.execute(f"SELECT * FROM {name}")
                rows = [tuple(map(_plain, row)) for row in cursor.fetchall()]
            if table == "tidyrows_ledger":  # a count of integers is no row of anybody
                rows = [row for row in rows if "integers" not in row]
            taken[f"{schema}.{table}"] = _sorted(rows)
    return taken


class Bystanders:
    """Strangers' rows, which must be there afterwards exactly as they were.

    They are written through an engine of their own, as another process would: a tracker on the
    test's engine does not see them.

    Example:
        >>> bystanders = Bystanders(engine)
        >>> bystanders.insert(Org, {"id": 7, "name": "theirs"})
        >>> ...  # the test makes rows of its own, and strangers go on inserting
        >>> bystanders.assert_untouched()
    """

    def __init__(self, engine: sa.Engine, outside: sa.Engine | None = None) -> None:
        """Remember the whole database as it is now.

        Args:
            engine: the test's engine.
            outside: what strangers use; a new engine on the same URL if None (give one where
                connections need preparation, as ``database.engine()`` with attached schemas).
        """
        self._engine = engine
        self._outside = outside or sa.create_engine(engine.url, poolclass=NullPool)
        self.expected = snapshot(engine)

    def insert(self, target: Any, *rows: Mapping[str, Any]) -> None:
        """Insert and commit strangers' rows, now; call it while nobody else writes.

        Args:
            target: a mapped class or a table.
            rows: values by column name.
        """
        before = snapshot(self._engine)
        with self._outside.begin() as connection:
            for row in rows:  # one by one: their columns may differ
                connection.execute(sa.insert(sa.inspect(target).selectable).values(row))
        self.expected = self.expected.plus(snapshot(self._engine).added_since(before))

    def assert_untouched(self) -> None:
        """Compare the whole database; nothing but strangers' rows may be there."""
        assert snapshot(self._engine) == self.expected


_connections: dict[sa.URL, Any] = {}
"""To servers, until the database of the test is closed: a test looks several times."""


@contextmanager
def _cursor(engine: sa.Engine) -> Iterator[Any]:
    """A driver's cursor that no engine event sees.

    On a server its connection serves nothing else, since a pooled one may have been left with a
    role or a search_path. SQLite's comes from the pool: it alone has the attached schemas.
    """
    if engine.dialect.name == "sqlite":
        pooled = engine.raw_connection()
        try:
            yield pooled.cursor()
        finally:
            pooled.close()
        return
    connection = _connections.get(engine.url)
    if connection is None or not _answers(connection):
        arguments, options = engine.dialect.create_connect_args(engine.url)
        connection = engine.dialect.connect(*arguments, **options)
        if engine.dialect.name == "postgresql":
            connection.autocommit = True
        else:
            connection.autocommit(True)  # noqa: FBT003 -- both drivers have it so
        _connections[engine.url] = connection
    cursor = connection.cursor()
    try:
        yield cursor
    finally:
        cursor.close()


def _answers(connection: Any) -> bool:
    """Whether the server has neither ended the connection nor been restarted."""
    try:
        connection.cursor().execute("SELECT 1")
    except Exception:  # noqa: BLE001 -- each driver has its own
        return False
    return True


def close_connections() -> None:
    """Close what looked at databases on servers."""
    while _connections:
        _connections.popitem()[1].close()


def _table_names(engine: sa.Engine, cursor: Any) -> list[tuple[str, str]]:
    if engine.dialect.name != "sqlite":
        cursor.execute(_TABLES[engine.dialect.name.replace("mariadb", "mysql")])
        return sorted((str(schema), str(table)) for schema, table in cursor.fetchall())
    names = []
    cursor.execute("PRAGMA database_list")
    for schema in [row[1] for row in cursor.fetchall() if row[1] != "temp"]:
        cursor.execute(f"SELECT name FROM \"{schema}\".sqlite_master WHERE type = 'table'")
        names += [(schema, row[0]) for row in cursor.fetchall() if row[0][:7] != "sqlite_"]
    return sorted(names)


def _filled(cursor: Any, names: list[str]) -> set[str]:
    """The tables that have rows: one question for all, since most have none."""
    filled = set()
    for start in range(0, len(names), 500):
        chunk = names[start : start + 500]
        cursor.execute("SELECT " + ", ".join(f"EXISTS (SELECT 1 FROM {name})" for name in chunk))
        filled |= {name for name, has in zip(chunk, cursor.fetchone(), strict=True) if has}
    return filled


def _quoted(engine: sa.Engine, name: str) -> str:
    """Not SQLAlchemy's: that doubles percent signs, which only a statement with binds needs."""
    mark = "`" if engine.dialect.name in {"mysql", "mariadb"} else '"'
    return mark + name.replace(mark, mark * 2) + mark


def _plain(value: Any) -> Any:
    """Drivers differ in what a value is; a row must compare and sort all the same."""
    if isinstance(value, (memoryview, bytearray)):
        return bytes(value)
    if isinstance(value, (list, dict)) or value != value:  # noqa: PLR0124 -- only NaN does so
        return repr(value)
    return value


def _sorted(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=repr)  # NULL and a number do not compare otherwise
