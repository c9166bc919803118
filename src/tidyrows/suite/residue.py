"""Rows that a run leaves, as far as that is known: noted after cleanups, looked for at the end.

A note is made of JSON's types, since a worker of pytest-xdist sends it to its controller.
"""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.cleanup.connection import Database
from tidyrows.cleanup.report import at_most
from tidyrows.dialects import Fault, dialect_for
from tidyrows.errors import TidyRowsError
from tidyrows.key_json import keys_to_json
from tidyrows.keys import TableName
from tidyrows.ledger.entries import EntryReader
from tidyrows.suite.spare_engine import has_vanished, run_for, usable_engine

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from tidyrows.cleanup.report import CleanupReport
    from tidyrows.keys import KeyedTable
    from tidyrows.tracking.store import TableHoldings
    from tidyrows.tracking.tracker import ResourceTracker

    Note = dict[str, Any]

DETACHED, LATE, HELD = "detached", "committed late", "held by other rows"
LEFT_OVER, KEPT, UNTRACKED = "left over", "kept for study", "not tracked"
NOT_ISOLATED = "left at level none"
_REMEDIES = {
    DETACHED: ' (own=["{}"] deletes them)',
    UNTRACKED: " (write insert({0}), or tracker.track_query(select({0})...))",
}
_MOST_KEYS = 10_000
"""The most rows of a note that are looked for by key, and the most that are counted."""
_SECONDS = 5.0


class Notes:
    """What stays after one cleanup.

    Attributes:
        found: for :meth:`RunResidue.add`.
        engines: of the databases, by name.
    """

    def __init__(
        self,
        tracker: ResourceTracker,
        report: CleanupReport | None,
        *,
        kept: Sequence[TableHoldings] = (),
        untracked_only: bool = False,
        not_isolated: bool = False,
    ) -> None:
        self.found: list[Note] = []
        self.engines: dict[str, sa.Engine] = {}
        self._tracker = tracker
        tracker.engines.resolve()
        held = {each.row: HELD for each in (report.held if report else ())}
        left = {each.row: LEFT_OVER for each in (report.leftovers if report else ())}
        late = NOT_ISOLATED if not_isolated else LATE
        holdings = tracker.store.snapshot()
        # rows with unknown new keys are untracked, and in doubt under their old keys: counted once
        doubt = {each.table.name: len(each.in_doubt) for each in holdings if untracked_only}
        stays = () if untracked_only else holdings
        for each in kept or stays:
            by_cause: dict[str, list[Any]] = defaultdict(list)
            for key in (*each.keys.in_order(), *each.in_doubt):
                row = each.table.row(key)
                why = KEPT if kept else held.get(row) or left.get(row) or late
                by_cause[why].append(key)
            for why, keys in by_cause.items():
                self._add(why, each.table.name, 0, each.table, keys)
            keyless = NOT_ISOLATED if not_isolated else LEFT_OVER
            self._add(KEPT if kept else keyless, each.table.name, each.keyless_count)
        for rows in report.detached.values() if report else ():
            self._add(DETACHED, rows.table.name, rows.unnamed, rows.table, rows.keys)
        for name, count in tracker.untracked.counts().items():
            self._add(UNTRACKED, name, count and max(count - doubt.get(name, 0), 0))
        tracker.untracked.clear()

    def _add(
        self,
        why: str,
        name: TableName,
        more: int | None,
        table: KeyedTable | None = None,
        keys: Sequence[Any] = (),
    ) -> None:
        if more == 0 and not keys:
            return
        engine = self._tracker.engine_of(name.database)
        if dialect_for(engine).is_private(engine):
            return  # it ends with the process
        self.engines[name.database] = engine
        written: list[list[Any]] = []
        if table is not None:
            with suppress(TidyRowsError):  # they have no form in JSON
                written = keys_to_json(table, engine.dialect, keys[:_MOST_KEYS])
        note: Note = {"why": why, "table": [name.database, name.schema, name.name], "keys": written}
        note["columns"] = [] if table is None else [column.name for column in table.key_columns]
        note["more"] = None if more is None else more + len(keys) - len(written)
        self.found.append(json.loads(json.dumps(note)))  # names may be of a class of SQLAlchemy's


@dataclass(slots=True)
class _Rows:
    """Rows of one table that stay for one reason.

    Attributes:
        keys: as JSON, each with its text, so that a row counts once.
        more: how many others at most; None where nobody can tell.
        tests: whose rows they are.
    """

    columns: list[str] = field(default_factory=list)
    keys: dict[str, list[Any]] = field(default_factory=dict)
    more: int | None = 0
    tests: dict[str, None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.keys) or self.more != 0

    def add(self, other: _Rows) -> None:
        """Rows of the same table, for the same reason."""
        self.columns = other.columns or self.columns
        self.keys |= other.keys
        self.more = None if self.more is None or other.more is None else self.more + other.more
        self.tests |= other.tests

    def text(self, table: TableName) -> str:
        """The table and the number."""
        if self.more == 0:
            return f"{table} {len(self.keys)}"
        return at_most(table, None if self.more is None else self.more + len(self.keys))


class RunResidue:
    """The rows that a run leaves, each counted once."""

    def __init__(self) -> None:
        self._rows: dict[tuple[TableName, str], _Rows] = {}

    def __bool__(self) -> bool:
        return any(self._rows.values())

    def add(self, test: str, notes: Iterable[Note]) -> None:
        """What stayed after the cleanup of a test."""
        for note in notes:
            keys = {json.dumps(key): key for key in note["keys"]}
            rows = _Rows(note["columns"], keys, note["more"], {test: None})
            table = TableName(*note["table"])
            for (other, _why), known in self._rows.items():  # it stays for the newest reason
                if other == table:
                    for key in keys:
                        known.keys.pop(key, None)
            self._at(table, note["why"]).add(rows)

    def _at(self, table: TableName, why: str) -> _Rows:
        return self._rows.setdefault((table, why), _Rows())

    def look(self, engines: Mapping[str, sa.Engine]) -> None:
        """Drop what is no longer there, as far as the databases can be asked."""
        for name, engine in engines.items():
            dialect = dialect_for(engine)
            tables = sorted({table for table, _why in self._rows if table.database == name})
            for table in tables:
                try:
                    gone = has_vanished(engine)
                    if not gone:
                        look = partial(self._look_at, usable_engine(engine), table)
                        run_for([engine], look)
                except (TidyRowsError, sa.exc.SQLAlchemyError, OSError) as error:
                    gone = dialect.is_database_missing(error)
                    if not gone and dialect.fault(error) is Fault.LOST:
                        break  # nor does it answer about the others
                if gone:
                    self._forget(table)

    def _look_at(self, engine: sa.Engine, table: TableName) -> None:
        database = Database(engine, lock_timeout=1.0, statement_timeout=_SECONDS)
        if not table.name:  # the database does not tell in which tables
            return
        with database.reading() as connection:
            real = _real_table(connection, table)
            if real is None:
                self._forget(table)
                return
            if real != table:
                for why in [why for other, why in self._rows if other == table]:
                    self._at(real, why).add(self._rows.pop((table, why)))
            of_table = [rows for (other, _why), rows in self._rows.items() if other == real]
            there = self._named_there(connection, real, of_table)
            self._count_others(connection, real, of_table, there)

    def _named_there(
        self, connection: sa.Connection, table: TableName, of_table: Iterable[_Rows]
    ) -> int:
        """Keep the keys that exist; how many do."""
        found, reader = 0, EntryReader(connection, table.database)
        for rows in of_table:
            if not rows.keys:
                continue
            body = {"columns": rows.columns, "keys": list(rows.keys.values())}
            change = reader.change("rows", *table.place, json.dumps(body))
            if change is None:
                rows.keys = {}
                continue
            keys = list(change.keys)
            there = set(dialect_for(connection).existing_keys(connection, change.table, keys))
            pairs = zip(rows.keys.items(), keys, strict=True)
            rows.keys = dict(written for written, key in pairs if key in there)
            found += len(rows.keys)
        return found

    def _count_others(
        self, connection: sa.Connection, table: TableName, of_table: Iterable[_Rows], known: int
    ) -> None:
        """Of rows without a known key there are no more than the table has besides."""
        for rows in of_table:
            if rows.more == 0:
                continue
            most = _MOST_KEYS if rows.more is None else min(rows.more, _MOST_KEYS)
            place = sa.table(table.name, schema=table.schema)
            some: sa.Select[Any] = sa.select(sa.literal_column("1").label(None)).select_from(place)
            few = some.limit(most + known).subquery()
            count = connection.scalars(sa.select(sa.func.count()).select_from(few)).one()
            if count < most + known or most != _MOST_KEYS:
                rows.more = max(count - known, 0)

    def _forget(self, table: TableName) -> None:
        for known in [known for known in self._rows if known[0] == table]:
            del self._rows[known]

    def texts(self) -> list[str]:
        """Each table with the number of its rows."""
        return [rows.text(table) for (table, _why), rows in sorted(self._rows.items()) if rows]

    def lines(self, *, everything: bool = False) -> Iterator[str]:
        """One line that names tables, numbers and reasons; then the tests."""
        left = [(table, why, rows) for (table, why), rows in sorted(self._rows.items()) if rows]
        if not left:
            return
        yield "rows that tests left: " + ", ".join(
            f"{rows.text(table)} {why}" for table, why, rows in left
        )
        for table, why, rows in left:
            names = list(rows.tests)
            shown = names if everything else names[:1]
            more = f" and {len(names) - 1} other test(s)" if len(names) > len(shown) else ""
            remedy = _REMEDIES.get(why, "").format(table.name) if table.name else ""
            yield f"  {str(table) or 'unknown tables'} {why}: {', '.join(shown)}{more}{remedy}"


def _real_table(connection: sa.Connection, table: TableName) -> TableName | None:
    """The table, with its schema where a statement did not name one; None where there is none."""
    dialect = dialect_for(connection)
    for name in dict.fromkeys([table.name, table.name.lower()]):
        real = dialect.resolve(connection, table.schema or None, name)
        if real is not None:
            return TableName(table.database, real.schema, name)
    inspector = sa.inspect(connection)
    found = [
        TableName(table.database, schema, table.name)
        for schema in ([] if table.schema else inspector.get_schema_names())
        if inspector.has_table(table.name, schema)
    ]
    if len(found) > 1:
        return table
    return found[0] if found else None
