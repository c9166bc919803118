"""What raw SQL strings do (``text()`` and ``exec_driver_sql``), as far as their first words tell.

The rows of a raw INSERT are not tracked, so it triggers a warning. A string may also end or begin a
transaction, empty a table, change what table names mean, or change the schema.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from functools import lru_cache, partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.engine.interfaces import ExecuteStyle

from tidyrows.capture.affected_rows import add_page, after_statement, keep_count, keep_table
from tidyrows.capture.changes import INTERNAL, Deleted, Inserted, KeysLost, Untracked
from tidyrows.capture.transactions import LOG
from tidyrows.keys import unresolved_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import sqlalchemy as sa

    from tidyrows.capture.changes import Sink
    from tidyrows.capture.ownership import EngineSinks
    from tidyrows.capture.table_resolution import RealTables
    from tidyrows.capture.transaction_log import TransactionLog
    from tidyrows.capture.transactions import Transactions
    from tidyrows.dialects import Dialect
    from tidyrows.keys import KeyedTable, TableName

EVENTS = ("do_execute", "do_executemany", "do_execute_no_params")
"""SQLAlchemy's events of the cursor; each is a method of :class:`CursorEvents`."""

_LEADING = re.compile(r"(?:\s+|--[^\n]*(?:\n|$)|/\*.*?\*/|\()*", re.DOTALL)
_NAME = r"""((?:[\w$.]+|"[^"]+"|`[^`]+`|\[[^\]]+\]|\.)+)"""
_COMMENT = re.compile(r"--[^\n]*|/\*(?!!|M!).*?\*/", re.DOTALL)  # MariaDB runs those with !
_LITERAL = re.compile(r"'(?:[^']|'')*'")
_INSERT = re.compile(
    rf"""\b(?:INSERT\s+(?:(?:LOW_PRIORITY|DELAYED|HIGH_PRIORITY|IGNORE)\s+|OR\s+\w+\s+)*(?:INTO\s+)?
    |REPLACE\s+(?:(?:LOW_PRIORITY|DELAYED)\s+)?(?:INTO\s+)?|MERGE\s+(?:INTO\s+)?(?:ONLY\s+)?
    |LOAD\s+(?:DATA|XML)\b.*?\bINTO\s+TABLE\s+){_NAME}
    |\bCOPY\s+{_NAME}\s*(?:\([^()]*\)\s*)?FROM\b""",
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
# EXPLAIN without ANALYZE runs nothing, nor does PREPARE; an INSERT in a literal may run.
_INSERTING = re.compile(
    r"""[\s(]*(?:/\*M?!\d*\s*)?(?:(?P<plain>INSERT|REPLACE|WITH|MERGE|COPY|LOAD)\b
    |(?:EXPLAIN\b(?=[^;]*?\bANALY[SZ]E\b)|ANALYZE\b|SET\s+STATEMENT\b|BEGIN\s+NOT\s+ATOMIC\b
       |DO\b|EXECUTE\s+IMMEDIATE\b))""",
    re.IGNORECASE | re.VERBOSE,
)
_ROUTINE = re.compile(
    r"\s*CREATE\b[^;(]*?\b(?:TRIGGER|PROCEDURE|FUNCTION|EVENT|PACKAGE|RULE)\b", re.IGNORECASE
)
_MOVE = re.compile(
    r"""(?P<verb>BEGIN|START\s+TRANSACTION|COMMIT|END|ROLLBACK|ABORT|SAVEPOINT|RELEASE)
    (?:\s+(?:WORK|TRANSACTION))?
    (?:(?P<to>\s+TO)?(?:\s+SAVEPOINT)?\s+(?P<name>\w+|"[^"]+"|`[^`]+`|\[[^\]]+\]))?\s*;?\s*""",
    re.IGNORECASE | re.VERBOSE,
)
# On the MySQL family nothing can be sent between XA END and the end of the transaction.
_PHASE = re.compile(
    r"""\s*(?P<verb>PREPARE\s+TRANSACTION|(?:COMMIT|ROLLBACK)\s+PREPARED
    |XA\s+(?:END|PREPARE|COMMIT|ROLLBACK))\s+'(?P<xid>[^']+)'\s*(?:ONE\s+PHASE\s*)?;?\s*""",
    re.IGNORECASE | re.VERBOSE,
)
_COUNTED = frozenset({"INSERT", "REPLACE", "MERGE", "COPY", "LOAD"})
"""First words of statements of which the driver counts the rows that were inserted."""
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
_UPDATES = re.compile(
    rf"""UPDATE\s+(?:(?:ONLY|LOW_PRIORITY|IGNORE|OR\s+\w+)\s+)*{_NAME}
    (?:\s+(?:AS\s+)?\w+)?\s+SET\b(?P<set>(?:(?!\b(?:WHERE|FROM|RETURNING)\b).)*)""",
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
_NESTED = re.compile(r"\([^()]*\)(?!\s*=)")  # brackets, save those of (a, b) = ...
# What may be written as a function of the database, and inserts nothing.
_CALL = re.compile(r"\b([a-z_][\w$]*)\s*\(", re.IGNORECASE)
_HARMLESS = re.compile(
    r"""(?:pg_|json|array_|string_|to_|regexp_|current_|st_|has_|date|time|generate_).*
    |abs|all|and|any|array|as|avg|between|by|cast|ceil|ceiling|char|char_length|coalesce|concat|count
    |connection_id|currval|database|distinct|else|exists|extract|filter|first_value|floor|from|get_lock
    |greatest|group_concat|having|hex|if|ifnull|in|index|integer|interval|is|last_insert_id|last_value
    |lateral|least|left|length|like|limit|lower|lpad|ltrim|max|md5|min|mod|nextval|not|now|nullif
    |numeric|offset|on|or|over|partition|position|power|random|release_lock|replace|returning|right
    |round|row|row_count|row_number|rows|select|set|set_config|setval|split_part|sqrt|substr|substring
    |sum|then|trim|trunc|union|unnest|upper|user|using|uuid|values|varchar|version|when|where|with""",
    re.IGNORECASE | re.VERBOSE,
)
_PART = re.compile(r"""[\w$]+|"[^"]+"|`[^`]+`|\[[^\]]+\]""")

T = TypeVar("T")
_LONGEST = 2_000
"""Characters of the longest text that is remembered: a script of INSERTs has megabytes."""


def _remembered(read: Callable[[str], T]) -> Callable[[str], T]:
    """Read a text once, since a suite sends few texts, many times."""
    known = lru_cache(maxsize=1024)(read)

    @wraps(read)
    def remembering(sql: str) -> T:
        return known(sql) if len(sql) <= _LONGEST else read(sql)

    return remembering


@_remembered
def first_word(sql: str) -> str:
    """The statement's first word, in capitals, past comments and brackets."""
    place = _LEADING.match(sql)
    rest = sql[place.end() :] if place else sql
    word = re.match(r"\w+", rest)
    return word.group().upper() if word else ""


@_remembered
def inserted_table(sql: str) -> str | None:
    """The first table that a raw text inserts into, as written there, or None.

    The text may hold several statements. A statement that only defines an INSERT, for a trigger or
    a function, inserts nothing.
    """
    if not _INSERT.search(sql):
        return None
    sql = _COMMENT.sub(" ", sql)
    if _ROUTINE.match(sql):
        return None
    for part in _LITERAL.sub(_without_semicolons, sql).split(";"):
        begin = _INSERTING.match(part)
        found = _INSERT.search(_LITERAL.sub("''", part) if begin and begin["plain"] else part)
        if begin and found:
            return found[1] or found[2]
    return None


def _inserted_count(context: Any, sql: str) -> int | None:
    """How many rows a raw INSERT has made at most; None where the driver does not tell."""
    counts: int = context.cursor.rowcount
    is_one = first_word(sql) in _COUNTED and ";" not in _LITERAL.sub("''", sql.rstrip("; \n"))
    is_sum = not context.executemany or context.dialect.supports_sane_multi_rowcount
    # while it gives its rows, sqlite3 has counted none yet
    is_over = counts > 0 or (counts == 0 and context.cursor.description is None)
    return counts if is_one and is_sum and is_over else None


def name_parts(written: str) -> list[str]:
    """The parts of a name as a statement has it, without quotes; the table's is the last."""
    return [part.strip('"`[]') for part in _PART.findall(written)]


def _without_semicolons(literal: re.Match[str]) -> str:
    return literal[0].replace(";", " ")


@_remembered
def runs_code(sql: str) -> bool:
    """Whether a statement may run a procedure or a function that nobody but the database knows."""
    word = first_word(sql)
    if inserted_table(sql) is not None:  # that is said without a question
        return False
    if word in {"CALL", "EXECUTE", "DO", "BEGIN"}:
        return word != "BEGIN" or "NOT ATOMIC" in sql.upper()
    if word not in {"SELECT", "WITH", "VALUES", "EXPLAIN", "SET", "UPDATE", "DELETE", "TABLE"}:
        return False
    return not all(map(_HARMLESS.fullmatch, _CALL.findall(_LITERAL.sub("''", sql))))


@_remembered
def emptied_tables(sql: str) -> tuple[list[list[str]], bool]:
    """The names, in parts, of tables that a raw statement empties, and whether it cascades."""
    place = _LEADING.match(sql)
    match = _EMPTIES.fullmatch(sql, place.end() if place else 0)
    if match is None:
        return [], False
    return [name_parts(name) for name in match["names"].split(",")], bool(match["kin"])


@_remembered
def updated_columns(sql: str) -> tuple[list[list[str]], set[str]]:
    """The name, in parts, of the table that a raw statement updates, and the columns it sets."""
    place = _LEADING.match(sql)
    match = _UPDATES.match(sql, place.end() if place else 0)
    if match is None:
        return [], set()
    parts = name_parts(match[1])
    written, before = _LITERAL.sub("", match["set"]), ""
    while written != before:
        before, written = written, _NESTED.sub("", written)
    columns: set[str] = set()
    for assignment in re.split(r",(?![^(]*\))", written):
        target = assignment.partition("=")[0].strip(" \t\r\n()")
        columns.update(name.split(".")[-1].strip(' "`[]').casefold() for name in target.split(","))
    return [parts], columns


def dropped_database(sql: str) -> str | None:
    """The database that a raw statement drops, or None."""
    match = _DROPS.match(sql)
    return match[1].strip('"`') if match else None


class Move(Enum):
    """What a raw statement does to the transaction behind SQLAlchemy's back."""

    BEGIN = START = auto()
    COMMIT = END = auto()
    ROLLBACK = ABORT = auto()
    SAVEPOINT = auto()
    RELEASE = auto()
    ROLLBACK_TO = auto()
    UNCLEAR = auto()


@_remembered
def transaction_move(sql: str) -> tuple[Move, str] | None:
    """What a raw statement does to the transaction, and the savepoint's name; None if nothing."""
    word = first_word(sql)
    if word not in Move.__members__ and word != "XA":
        return None
    match = _MOVE.fullmatch(sql.strip())
    if match is None:  # COMMIT PREPARED 'x', BEGIN ISOLATION LEVEL ..., a second statement
        return Move.UNCLEAR, ""
    move, name = Move[word], (match["name"] or "").strip('"`[]')
    if move is Move.ROLLBACK and match["to"]:
        move = Move.ROLLBACK_TO
    takes_name = move in {Move.SAVEPOINT, Move.RELEASE, Move.ROLLBACK_TO}
    return (move, name) if takes_name is bool(name) else (Move.UNCLEAR, "")


def is_ddl(sql: str) -> bool:
    """Whether a raw statement changes the schema."""
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


class CursorEvents:
    """Looks at each statement of one engine before the driver sends it."""

    def __init__(
        self, transactions: Transactions, sinks: EngineSinks, tables: RealTables, dialect: Dialect
    ) -> None:
        self._transactions = transactions
        self._sinks = sinks
        self._tables = tables
        self._dialect = dialect
        self._loses_count = not dialect.counts_when_closed
        self._returned_table = dialect.returned_table

    def do_execute(self, cursor: Any, sql: str, parameters: Any, context: Any) -> None:
        """Look at what only the cursor sees: raw strings, and an INSERT in the WITH of a SELECT.

        An event of the dialect, not of the connection: on every statement's way, it is cheaper.
        """
        if self._sinks.idle:
            return
        transactions, connection = self._transactions, context.root_connection
        # XA COMMIT is itself a statement: what it commits is not committed before it.
        waits = transactions.pending.all or transactions.unseen.late
        if waits and not sql.startswith("XA "):
            transactions.resolve(connection)
        internal = INTERNAL in context.execution_options
        log = getattr(connection, LOG, None)
        if log is not None and log.changed and not internal:
            fairy = context._dbapi_connection  # noqa: SLF001 -- of a connection that is not closed
            driver = getattr(fairy, "_driver", None) or fairy.dbapi_connection
            if log.mark is not None or self._dialect.in_transaction(driver) is False:
                transactions.look(connection)
            if context.isddl and self._dialect.ddl_commits:
                transactions.mark(connection)
        if transactions.unseen.uses:  # its question may begin a transaction
            transactions.unseen.statement(context, sql)
        if internal:
            return
        if context.isinsert:
            self._before_insert(connection, cursor, context, sql)
        else:
            self._look_at(connection, context, sql)

    def _before_insert(
        self, connection: sa.Connection, cursor: Any, context: Any, sql: str
    ) -> None:
        returning, tell = context.compiled.effective_returning, self._returned_table
        if returning and tell is not None:
            keep_table(tell, context)
        elif not returning:  # else its rows are counted as they are
            if context.execute_style is ExecuteStyle.INSERTMANYVALUES:
                add_page(context, cursor)
            if self._loses_count:
                keep_count(context)
        if sql[:4] == "WITH" and sql.count("INSERT INTO ") > 1:
            self._expect_insert(connection, sql, context)

    def _look_at(self, connection: sa.Connection, context: Any, sql: str) -> None:
        is_raw = context.compiled is None or context.is_text
        if self._dialect.runs_code and (is_raw or "(" in sql) and runs_code(sql):
            self._transactions.unseen.begin(connection.connection, by_driver=False)
        if is_raw:
            self._raw(connection, sql, context)
        elif sql[:4] == "WITH":
            self._expect_insert(connection, sql, context)
        elif not context.isddl and self._dialect.session_setting(sql):
            self._moved(connection)

    do_executemany = do_execute

    def do_execute_no_params(self, cursor: Any, sql: str, context: Any) -> None:
        """As ``do_execute``."""
        self.do_execute(cursor, sql, (), context)

    def _moved(self, connection: sa.Connection) -> None:
        self._transactions.log(connection).targets.clear()
        self._tables.moved(connection)

    def _raw(self, connection: sa.Connection, sql: str, context: Any) -> None:
        if self._dialect.session_setting(sql):
            self._moved(connection)
        phase = _PHASE.fullmatch(sql)
        move = transaction_move(sql)
        if phase is not None:
            self._phase(connection, context, phase["verb"].upper().split(), phase["xid"])
        elif move is not None:
            self._move(connection, context, *move)
        elif self._dialect.session_setting(sql) and (self._dialect.ddl_commits or ";" in sql):
            self._mark(connection, context)
        if is_ddl(sql):
            watcher, database = self._sinks.watcher, dropped_database(sql)
            if watcher is not None and database is not None:
                watcher.before_drop(connection.engine, database)
            self.ddl(connection)
        names, with_kin = emptied_tables(sql)
        if names:
            after_statement(context, partial(self._emptied, connection, names, with_kin=with_kin))
        names, columns = updated_columns(sql)
        if columns:
            after_statement(context, partial(self._keys_set, connection, names, columns))
        self._expect_insert(connection, sql, context)

    def _mark(self, connection: sa.Connection, context: Any) -> None:
        """A statement is about to be sent after which the transaction may be another."""
        self._transactions.mark(connection)

        def look() -> None:
            # While it gives rows, nothing else can be asked of some drivers: later then.
            if context.cursor.description is None:
                self._transactions.look(connection)

        after_statement(context, look)

    def _move(self, connection: sa.Connection, context: Any, move: Move, name: str) -> None:
        """A raw statement moves the transaction; it is about to be sent."""
        transactions = self._transactions
        transactions.log(connection).targets.clear()  # SET LOCAL ends with what it was set in
        if move is Move.COMMIT or (move is Move.BEGIN and self._dialect.ddl_commits):
            transactions.before_commit(connection)
            transactions.commit_unasked(connection)
            after_statement(context, partial(transactions.resolve, connection))
        elif move is Move.SAVEPOINT:
            transactions.savepoint(connection, name)
        elif move is Move.RELEASE:
            transactions.release_savepoint(connection, name)
            after_statement(context, partial(transactions.released, connection))
        elif move is Move.ROLLBACK_TO:
            transactions.rollback_savepoint(connection, name)
        elif move is Move.ROLLBACK:
            transactions.rollback(connection)
        elif move is Move.UNCLEAR:
            self._mark(connection, context)

    def _phase(
        self, connection: sa.Connection, context: Any, verb: Sequence[str], xid: str
    ) -> None:
        """A raw statement of a two-phase commit is about to be sent."""
        transactions = self._transactions
        transactions.log(connection).targets.clear()
        if "END" in verb:
            transactions.before_commit(connection)
        elif verb == ["XA", "PREPARE"]:
            transactions.keep_prepared(connection, xid)
        elif "TRANSACTION" in verb:
            transactions.prepare_twophase(connection, xid)
        elif "COMMIT" in verb:
            transactions.commit_twophase(connection, xid, is_prepared=True)
            after_statement(context, partial(transactions.resolve, connection))
        else:
            undo = partial(transactions.rollback_twophase, connection, xid, is_prepared=False)
            after_statement(context, undo)

    def _emptied(
        self, connection: sa.Connection, names: Iterable[Sequence[str]], *, with_kin: bool
    ) -> None:
        """A raw statement has deleted all rows of tables: tracked ones are tracked no more.

        What is inserted under their keys afterwards may be somebody else's.
        """
        self._transactions.look(connection)  # a TRUNCATE that commits
        log, rows = self._held(connection)
        gone = emptied_of([table for table, _keys in rows], names, with_kin=with_kin)
        for table, keys in rows:
            if keys and table.key_columns and table.name in gone:
                self._transactions.add(connection, log, Deleted(table, list(keys)))

    def _keys_set(
        self, connection: sa.Connection, names: Iterable[Sequence[str]], columns: set[str]
    ) -> None:
        """A raw UPDATE has set columns; if the key is one of them, its rows cannot be followed."""
        log, rows = self._held(connection)
        tables = {table.name: table for table, keys in rows if keys}
        for name in emptied_of(tables.values(), names, with_kin=False):
            if columns.intersection(key.name.casefold() for key in tables[name].key_columns):
                self._transactions.add(connection, log, KeysLost(tables[name]))

    def _held(
        self, connection: sa.Connection
    ) -> tuple[TransactionLog, list[tuple[KeyedTable, Sequence[Any]]]]:
        """The log of a connection, and the rows that are tracked, or are pending in that log."""
        log = self._transactions.log(connection)
        rows = [(c.table, c.keys) for c, _sink in log.all() if isinstance(c, Inserted)]
        for sink in self._sinks:
            rows += sink.keys_by_table()
        return log, rows

    def _expect_insert(self, connection: sa.Connection, sql: str, context: Any) -> None:
        """A raw statement that may insert is about to be sent."""
        table = inserted_table(sql)
        owner = self._sinks.owner(connection) if table is not None else None
        if table is not None and owner is not None:
            after_statement(
                context, partial(self._inserted, connection, sql, context, table, owner)
            )

    def _inserted(
        self, connection: sa.Connection, sql: str, context: Any, table: str, owner: Sink
    ) -> None:
        """A raw statement has inserted, perhaps nothing: the rows are not tracked."""
        parts = name_parts(table)
        count = _inserted_count(context, sql)
        if count == 0:
            if self._tables.counts_inserts(connection, *parts):
                return
            count = None
        stand_in = unresolved_table(self._tables.database, *parts)
        log = self._transactions.log(connection)
        self._transactions.add(connection, log, Untracked(stand_in, count=count), owner)
        owner.warn_once(
            ("raw", table),
            f"A raw SQL statement inserted into {table}: nobody can tell which rows it made, "
            f"so they are not tracked and cleanup will not delete them. Write it as "
            f"insert(table), or tell the tracker with tracker.track_query(select(...)) or "
            f"tracker.track_rows(table, keys).",
        )

    def ddl(self, connection: sa.Connection) -> None:
        """The schema was changed."""
        self._transactions.log(connection).targets.clear()
        self._tables.schema_version += 1
