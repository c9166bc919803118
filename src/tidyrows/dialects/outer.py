"""Role *outer transactions*: one that is only ever rolled back, and the transactions inside it.

Level ``transaction`` of ``isolate`` lends one connection of the driver to several users. What they
begin, commit and roll back are savepoints of the one real transaction.
"""

from __future__ import annotations

import re
from contextlib import closing, contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from tidyrows.dialects.driver import DriverAccess
from tidyrows.dialects.sessions import CommitOutcome, Sessions, is_quiet

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import sqlalchemy as sa

_START = r"(?:\s|;|--[^\n]*(?:\n|$)|/\*(?!M?!).*?\*/)*"
"""What may stand before a statement."""
_CALLS = re.compile(r"(\w+|[\"`\]])\s*\(")  # or the end of a quoted name, which may be any function
_WRITES = re.compile(r"\b(?:INTO|nextval|ANALYZE)\b", re.IGNORECASE)  # EXPLAIN ANALYZE runs it
# Words before a parenthesis that change nothing in the database.
_HARMLESS = re.compile(
    r"(?:ABS|ALL|AND|ANY|ARRAY|AS|AVG|BY|CAST|CHAR|COALESCE|CONCAT|COUNT|DATE|DECIMAL|DISTINCT|EXISTS"
    r"|EXTRACT|FILTER|FROM|GREATEST|GROUP_CONCAT|HAVING|IF|IFNULL|IN|INTEGER|JOIN|LATERAL|LEAST|LEFT"
    r"|LENGTH|LIKE|LOWER|MAX|MIN|NOT|NOW|NULLIF|NUMERIC|ON|OR|OVER|PARTITION|ROUND|ROW|ROW_NUMBER"
    r"|SELECT|SOME|SUBSTR|SUBSTRING|SUM|THEN|TRIM|UNION|UPPER|USING|VALUES|VARCHAR|WHEN|WHERE|WITH)",
    re.IGNORECASE,
)


def starting(*words: str) -> re.Pattern[str]:
    """Matches a statement that starts with one of these."""
    return re.compile(_START + rf"(?:{'|'.join(words)})\b", re.IGNORECASE | re.DOTALL)


_BEGINS = starting(r"BEGIN(?!\s+NOT\b)", r"START\s+TRANSACTION")
_SAVEPOINT = re.compile(
    _START + r"(?:(SAVEPOINT)|(?:ROLLBACK(?:\s+WORK|\s+TRANSACTION)?\s+(TO)|(RELEASE))"
    r"(?:\s+SAVEPOINT)?)\s+(\S+?)[;\s]*",
    re.IGNORECASE | re.DOTALL,
)
_READS = starting("SELECT", "SHOW", "EXPLAIN", "DESC", "DESCRIBE")
ENDS = (
    "COMMIT",
    r"ROLLBACK(?!\s+(?:(?:WORK|TRANSACTION)\s+)?TO\b)",
    "END",
    "ABORT",
    r"PREPARE\s+TRANSACTION",
)
"""What ends a transaction in any database, for :func:`starting`."""


class Effect(NamedTuple):
    """What a statement does to transaction and session, by its text.

    Attributes:
        begins: it is a BEGIN.
        ends: it ends the transaction.
        reads: it certainly changes no row; an unknown function may.
        changes_session: its effect on the session survives a ROLLBACK.
        savepoint: ``SAVEPOINT``, ``TO`` (ROLLBACK TO) or ``RELEASE``, and the name; else None.
        is_quiet: it certainly does not end the transaction in another way.
    """

    begins: bool
    ends: bool
    reads: bool
    changes_session: bool
    savepoint: tuple[str, str] | None
    is_quiet: bool


@lru_cache(maxsize=4096)
def _effect(sql: str, ending: re.Pattern[str], session_changing: re.Pattern[str] | None) -> Effect:
    found = _SAVEPOINT.fullmatch(sql)
    verb = next(filter(None, found.groups()), "") if found else ""
    reads = _READS.match(sql) and not _WRITES.search(sql)
    return Effect(
        begins=_BEGINS.match(sql) is not None,
        ends=ending.match(sql) is not None,
        reads=bool(reads) and all(map(_HARMLESS.fullmatch, _CALLS.findall(sql))),
        changes_session=session_changing is not None and bool(session_changing.search(sql)),
        savepoint=(verb.upper(), found[4]) if found else None,
        is_quiet=is_quiet(sql),
    )


class OuterTransactions(DriverAccess):
    """The one real transaction. All methods get the DBAPI's own connection."""

    ending: ClassVar[re.Pattern[str]] = starting(*ENDS)
    """Statements that end the transaction."""
    session_changing: ClassVar[re.Pattern[str] | None] = None
    """Statements whose effect on the session survives a ROLLBACK."""
    transaction_options: ClassVar[frozenset[str]] = frozenset({"isolation_level"})
    """SQLAlchemy's execution options that are set before a transaction begins."""
    savepoint_gone_codes: ClassVar[frozenset[Any]] = frozenset()
    """Errors where a savepoint does not exist."""
    release_with_set: ClassVar[bool] = False
    """Whether setting a savepoint anew releases the older one of its name."""

    @property
    def close_sends(self) -> bool:
        """Whether the driver uses the connection to close a cursor."""
        return False

    def effect(self, sql: str) -> Effect:
        """What a statement does to transaction and session."""
        return _effect(sql, self.ending, self.session_changing)

    def begin_outer(self, dbapi_connection: Any) -> None:
        """Begin it, where the driver does not do so with the first statement."""

    def is_aborted(self, dbapi_connection: Any, *, after_error: bool) -> bool:
        """Whether an earlier error makes all statements fail until a rollback.

        Args:
            dbapi_connection: of the DBAPI.
            after_error: a statement has failed since the last rollback.
        """
        return False

    def deferred_before(self, dbapi_connection: Any) -> Any | None:
        """What :meth:`check_deferred` needs to know from before the first row.

        None where no constraint of the database waits for the COMMIT.
        """
        return None

    def check_deferred(self, dbapi_connection: Any, before: Any, *, at_end: bool) -> None:
        """Raise the driver's error where a COMMIT would fail by a constraint that waits for it.

        Args:
            dbapi_connection: of the DBAPI.
            before: what :meth:`deferred_before` has given.
            at_end: only a ROLLBACK of everything comes afterwards.
        """

    def send(self, dbapi_connection: Any, statements: Iterable[str]) -> None:
        """Send statements without parameters and results."""
        with closing(dbapi_connection.cursor()) as cursor:
            for each in statements:
                cursor.execute(each)

    def move_savepoint(self, name: str) -> list[str]:
        """Statements that set a savepoint anew, at the end of what was done since."""
        again = f"SAVEPOINT {name}"
        return [again] if self.release_with_set else [f"RELEASE SAVEPOINT {name}", again]


class InnerTransactions(Sessions):
    """A mixin for the dialect of an engine over an outer transaction.

    Its connections of the DBAPI are stand-ins, which know of their inner transaction: the driver
    only knows of the outer one.
    """

    release_commits = False
    reuses_keys = deletes_by_key = False  # no row needs to be known again: all are undone

    def reads_as_sent(self, column: sa.Column[Any]) -> bool:
        """As above: no column is compared."""
        return False

    def in_transaction(self, dbapi_connection: Any) -> bool | None:
        """As the stand-in has counted."""
        return bool(getattr(dbapi_connection, "in_inner_transaction", True))

    def is_begun(self, dbapi_connection: Any) -> bool:
        """As above."""
        return bool(self.in_transaction(dbapi_connection))

    def is_autocommit(self, connection: sa.Connection) -> bool:
        """Never."""
        return False

    def before_savepoint(self, connection: sa.Connection) -> None:
        """It always stands inside a transaction."""

    def guard_pool(self, engine: sa.Engine) -> None:
        """The stand-in ends what its user has left open."""

    def commit_is_void(self, connection: sa.Connection) -> bool | None:
        """Also where it is rolled back already."""
        undone = getattr(connection.connection.dbapi_connection, "is_undone", False)
        return undone or super().commit_is_void(connection)

    def commit_outcome(self, error: BaseException, connection: sa.Connection) -> CommitOutcome:
        """A COMMIT that fails is rolled back by the stand-in."""
        return CommitOutcome.GONE

    def begin_outer(self, dbapi_connection: Any) -> None:
        """A block within a block: what it writes is an inner transaction of the wider one."""
        dbapi_connection.claim()

    @contextmanager
    def looking(
        self,
        engine: sa.Engine,
        seconds: float,
        **options: Any,
    ) -> Iterator[sa.Connection]:
        """No connection sees more than another."""
        with engine.connect() as connection:
            yield connection.execution_options(**options)

    def begin_cleanup(self, connection: sa.Connection, **_limits: Any) -> None:
        """An inner transaction: nobody else has locks that it may have to wait for."""
        connection.begin()

    def begin_reading(self, connection: sa.Connection, **_limits: Any) -> None:
        """As above."""
        connection.begin()

    def end_cleanup(self, connection: sa.Connection) -> None:
        """Nothing is to be restored."""
