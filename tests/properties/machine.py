"""A machine of transactions: everything a connection can do, in any order.

It predicts nothing. After each step the tracker must hold the rows that somebody else sees.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar

import sqlalchemy as sa
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from sqlalchemy.orm import Session

from harness.bystanders import snapshot
from harness.databases import Database
from properties.examples import THEIRS, of_strangers
from properties.lines import Line, tables_for
from tidyrows import CleanupManager, ResourceTracker

MISSING = "nobody has this code"
lines = st.integers(0, 1)
numbers = st.integers(0, 3)
few = st.integers(1, 3)
tables = st.sampled_from(("serials", "named", "pairs"))
endings = st.sampled_from((*["commit"] * 3, "rollback", "close", "lose", "autocommit"))
joining = st.sampled_from(
    ("create_savepoint", "conditional_savepoint", "rollback_only", "control_fully")
)


class TransactionMachine(RuleBasedStateMachine):
    """Give it a ``database`` by a subclass."""

    database: ClassVar[Database]

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.lines: list[Line] = []
        self.numbers = itertools.count()
        self.healthy = False

    @initialize()
    def begin(self) -> None:
        """Not in __init__, whose failure no teardown would follow."""
        database = self.database
        self.engine, self.outside = database.engine(), database.engine()
        self.stack.callback(self.engine.dispose)
        self.stack.callback(self.outside.dispose)
        self.tables = tables_for(database.backend)
        self.tables["serials"].metadata.create_all(self.outside)
        # SQLite has one writer at a time, and this test one thread; InnoDB locks gaps, so that one
        # line would have to wait for the other.
        several = database.backend == "postgresql"
        self.lines += [Line(number) for number in range(2 if several else 1)]
        self.oracle = self.stack.enter_context(
            self.outside.connect().execution_options(isolation_level="AUTOCOMMIT")
        )
        self.stack.callback(self._forget_rows)
        for name in self.tables:
            self._insert(self.oracle, name, THEIRS, [self._key(name, 9, 0)])
        self.tracker = ResourceTracker(self.engine).start()
        self.stack.callback(self.tracker.stop)

    # -- what is checked ------------------------------------------------------------------------

    @invariant()
    def the_tracker_holds_what_is_committed(self) -> None:
        self.healthy = False
        committed = {
            (name, tuple(row))
            for name, table in self.tables.items()
            for row in self.oracle.execute(
                sa.select(*table.primary_key).where(table.c.owner != THEIRS)
            )
        }
        assert {(row.table.name, row.key) for row in self.tracker.rows()} == committed
        self.healthy = True

    def teardown(self) -> None:
        with self.stack:
            for line in self.lines:
                line.close()
            for line in self.lines:
                self.oracle.exec_driver_sql(f"DROP TABLE IF EXISTS extra_{line.number}")
            if self.healthy:  # else it has been said already
                self.the_tracker_holds_what_is_committed()
                expected = of_strangers(self.outside, self.tables.values())
                self.tracker.stop()
                CleanupManager(self.tracker).cleanup()
                assert snapshot(self.outside) == expected

    def _forget_rows(self) -> None:
        for name in ("pairs", "named", "serials"):
            self.oracle.execute(sa.delete(self.tables[name]))

    # -- what happens ---------------------------------------------------------------------------

    @rule(at=lines, many=few)
    def insert_generated(self, at: int, many: int) -> None:
        self._insert_some(self._line(at), "serials", many, 0)

    @rule(at=lines, table=st.sampled_from(("named", "pairs")), many=few, start=numbers)
    def insert(self, at: int, table: str, many: int, start: int) -> None:
        """Keys from a few, so that those of rows that went come back, and some are taken."""
        self._insert_some(self._line(at), table, many, start)

    @rule(at=lines, b=numbers)
    def insert_an_orphan(self, at: int, b: int) -> None:
        """Refused at COMMIT, or at once on the MySQL family."""
        line = self._line(at)
        row = {"a": line.number, "b": 10 + b, "code": MISSING, "owner": line.owner}
        self._attempt(
            lambda: line.doer(self.engine).execute(sa.insert(self.tables["pairs"]), row),
            f"{line.owner}: insert an orphan {b}",
        )

    @precondition(lambda self: any(line.connection for line in self.lines))
    @rule(at=lines)
    def mend_the_orphans(self, at: int) -> None:
        """So that what could not be committed can."""
        line = self._line(at, lambda line: line.connection is not None)
        pairs = self.tables["pairs"]
        mend = sa.update(pairs).where(pairs.c.owner == line.owner).values(code=None)
        self._attempt(lambda: line.doer(self.engine).execute(mend), f"{line.owner}: mend")

    @rule(at=lines, table=tables, which=numbers)
    def delete(self, at: int, table: str, which: int) -> None:
        self._change_one(at, table, which, sa.delete(self.tables[table]))

    @rule(at=lines, table=tables, which=numbers, number=numbers)
    def change_key(self, at: int, table: str, which: int, number: int) -> None:
        line = self._line(at).number
        # For a generated one, a number that no other line and no sequence has.
        key = self._key(table, line, number) or {"id": 1_000_000 + 1000 * line + number}
        self._change_one(at, table, which, sa.update(self.tables[table]).values(key))

    @rule(at=lines)
    def savepoint(self, at: int) -> None:
        line = self._line(at)
        if not line.autocommit:
            self._attempt(
                lambda: line.savepoints.append(line.doer(self.engine).begin_nested()),
                f"{line.owner}: savepoint",
            )

    @precondition(lambda self: any(line.savepoints for line in self.lines))
    @rule(at=lines, around=st.integers(0, 1), end=st.sampled_from(("commit", "rollback")))
    def end_savepoint(self, at: int, around: int, end: str) -> None:
        """The innermost, or one around it."""
        line = self._line(at, lambda line: bool(line.savepoints))
        which = min(around + 1, len(line.savepoints))
        savepoint = line.savepoints[-which]
        del line.savepoints[-which:]
        self._attempt(getattr(savepoint, end), f"{line.owner}: {end} savepoint -{which}")

    @precondition(lambda self: any(line.is_alone for line in self.lines))
    @rule(at=lines, mode=joining)
    def join_a_session(self, at: int, mode: Any) -> None:
        line = self._line(at, lambda line: line.is_alone)
        note(f"{line.owner}: a session joins, {mode}")
        line.session = Session(line.connection, join_transaction_mode=mode)
        line.savepoints.clear()

    @precondition(lambda self: any(line.connection for line in self.lines))
    @rule(at=lines, end=endings)
    def end(self, at: int, end: str) -> None:
        """Of the session, where one has joined; else of the connection."""
        line = self._line(at, lambda line: line.connection is not None)
        line.savepoints.clear()
        session, line.session = line.session, None
        note(f"{line.owner}: {end} {'the session' if session else ''}")
        if end == "lose":
            line.connection.invalidate()
        if session is not None:
            self._attempt(getattr(session, end, session.close))
            self._attempt(session.close)
        elif end in {"commit", "rollback"}:
            self._attempt(getattr(line.connection, end))
        else:
            self._attempt(line.close)
            if end == "autocommit":
                line.autocommit = True  # until it is closed
                line.doer(self.engine)

    @precondition(lambda self: any(self.may_make_tables(line) for line in self.lines))
    @rule(at=lines)
    def make_a_table(self, at: int) -> None:
        """The MySQL family commits at that."""
        line = self._line(at, self.may_make_tables)
        ddl = sa.DDL(f"CREATE TABLE IF NOT EXISTS extra_{line.number} (owner CHAR(10))")
        self._attempt(lambda: line.doer(self.engine).execute(ddl), f"{line.owner}: DDL")

    def may_make_tables(self, line: Line) -> bool:
        """Not in a savepoint of the MySQL family: it would be gone, and its rows in doubt."""
        in_savepoint = line.session is not None or bool(line.savepoints)
        return line.connection is not None and not (
            in_savepoint and self.database.backend == "mysql"
        )

    @precondition(lambda self: not any(line.connection for line in self.lines))
    @rule(table=tables, number=numbers)
    def a_stranger_comes(self, table: str, number: int) -> None:
        """With a key that we may have had; while no transaction of ours is open: he would wait."""
        keys = [self._key(table, 0, number)]
        self._attempt(
            lambda: self._insert(self.oracle, table, THEIRS, keys), f"theirs: {table} {keys}"
        )

    # -- how ------------------------------------------------------------------------------------

    def _line(self, at: int, where: Callable[[Line], bool] = lambda _line: True) -> Line:
        able = [line for line in self.lines if where(line)]
        return able[at % len(able)]

    def _insert_some(self, line: Line, table: str, many: int, start: int) -> None:
        keys = [self._key(table, line.number, start + offset) for offset in range(many)]
        self._attempt(
            lambda: self._insert(line.doer(self.engine), table, line.owner, keys),
            f"{line.owner}: insert into {table} {keys}",
        )

    def _key(self, table: str, line: int, number: int) -> dict[str, Any]:
        if table == "serials":
            return {}
        return {"code": f"{line}-{number}"} if table == "named" else {"a": line, "b": number}

    def _insert(self, doer: Any, table: str, owner: str, keys: list[dict[str, Any]]) -> None:
        rows = [{**key, "owner": owner, "note": next(self.numbers)} for key in keys]
        insert = sa.insert(self.tables[table])
        taken = set(doer.execute(sa.select(*self.tables[table].primary_key)).all())
        if len(rows) == 2:
            doer.execute(insert.values(rows))
        elif any(tuple(key.values()) in taken for key in keys):
            # sqlite3 keeps what comes before the row that fails, and nobody can say how many
            for row in rows:
                doer.execute(insert.values(row))
        else:
            doer.execute(insert, rows)

    def _change_one(self, at: int, table: str, which: int, statement: Any) -> None:
        """Delete or change one of the line's own rows, if it has one."""
        line = self._line(at)
        key = list(self.tables[table].primary_key)

        def change() -> None:
            doer = line.doer(self.engine)
            mine = sa.select(*key).where(self.tables[table].c.owner == line.owner)
            rows = sorted(tuple(row) for row in doer.execute(mine))
            if rows:
                row = rows[which % len(rows)]
                where = (column == value for column, value in zip(key, row, strict=True))
                doer.execute(statement.where(*where))

        what = str(statement).split(maxsplit=1)[0]
        self._attempt(change, f"{line.owner}: {what} a row of {table}, number {which}")

    def _attempt(self, act: Callable[[], Any], what: str = "") -> None:
        """Databases and SQLAlchemy may refuse; what counts is what the tracker makes of it."""
        if what:
            note(what)
        try:
            with warnings.catch_warnings():
                # of savepoints that are ended out of order, which is meant
                warnings.simplefilter("ignore", sa.exc.SAWarning)
                act()
        except sa.exc.SQLAlchemyError as error:
            note(f"  refused: {str(error).splitlines()[0]}")
