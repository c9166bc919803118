"""What a cleanup did, for people and for programs; and how far it is while it runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tidyrows.worker import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from tidyrows.cleanup.reasons import LeftoverKind, Reason
    from tidyrows.dialects import Blocker
    from tidyrows.external import ExternalResource
    from tidyrows.keys import KeyedTable, RowKey, TableName

_SHOWN = 20
HERE = "the tracker "
"""The name of a holder in this process begins with this."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """Rows of ours that are still there, or an external resource that is.

    Attributes:
        table: the table; None for an external resource.
        row: the row; None for rows of a table without a primary key, which have no name.
        reason: why it is still there.
        count: how many rows; more than one only where ``row`` is None.
        resource: the external resource; None for rows.
        owner: of a sweep, an owner in the ledger whose entries it left, with worker and run; the
            number of its rows is not known, and ``count`` is 0.
    """

    table: TableName | None
    row: RowKey | None
    reason: Reason
    count: int = 1
    resource: ExternalResource | None = None
    owner: str | None = None

    @property
    def kind(self) -> LeftoverKind:
        """What kind of reason it is."""
        return self.reason.kind

    @property
    def error(self) -> BaseException | None:
        """The exception that kept it, chained to what caused that; None where nothing raised."""
        return self.reason.error

    @property
    def cause(self) -> str:
        """Why it is still there, and what to do, as text."""
        return str(self.reason)

    def __str__(self) -> str:
        name = self.owner or self.resource or self.row or f"{self.table}: {self.count} row(s)"
        return f"{name}: {self.cause}"


@dataclass(frozen=True, slots=True)
class Held:
    """A row of ours that stays because a row needs it that another tracker will delete.

    Attributes:
        row: the row; None for an external resource.
        by: the worker, run or tracker that holds the other row.
        resource: an external resource that such a row needs; None for a row.
    """

    row: RowKey | None
    by: str
    resource: ExternalResource | None = None

    def __str__(self) -> str:
        return f"{self.resource or self.row}: held by {self.by}"


class TableRows:
    """Rows of one table: ``len()`` counts them, iterating yields their :class:`RowKey`.

    Rows of a table without a primary key are counted, and have no name to be yielded.

    Attributes:
        table: the table, with the types of its columns.
        unnamed: how many rows have no name.
    """

    def __init__(self, table: KeyedTable, keys: Sequence[Any] = (), unnamed: int = 0) -> None:
        self.table = table
        self._keys: dict[Any, None] = dict.fromkeys(keys)
        self.unnamed = unnamed

    def merged(self, other: TableRows) -> TableRows:
        """These rows and those."""
        keys = [*self._keys, *other._keys]
        return TableRows(self.table, keys, self.unnamed + other.unnamed)

    def without(self, rows: TableRows) -> TableRows:
        """These rows but for those."""
        keys = [key for key in self._keys if key not in rows._keys]
        return TableRows(self.table, keys, self.unnamed)

    @property
    def keys(self) -> list[Any]:
        """The keys of the rows that have a name, as stores hold them."""
        return list(self._keys)

    def __len__(self) -> int:
        return len(self._keys) + self.unnamed

    def __iter__(self) -> Iterator[RowKey]:
        return map(self.table.row, self._keys)

    def __repr__(self) -> str:
        return f"<{len(self)} rows of {self.table.name}>"


def add_rows(into: dict[TableName, TableRows], rows: TableRows) -> None:
    """Add rows to those of their table."""
    name = rows.table.name
    into[name] = into[name].merged(rows) if name in into else rows


@dataclass(slots=True)
class CleanupReport:
    """What one cleanup did.

    Attributes:
        deleted: tracked rows deleted, by table.
        dependents: rows deleted with them that nobody tracked: they referenced tracked rows, and
            the schema or ``own=`` says that they go.
        detached: rows of others whose foreign key to a deleted row became NULL or its default.
        untracked: rows that were inserted and could not be tracked, by raw SQL and the like: so
            many at most, or None where nobody can tell. They stay, except as dependents.
        held: rows of ours that a row of another tracker needs. They stay tracked and are no
            error: a cleanup after that tracker's own deletes them.
        already_gone: tracked rows that somebody else had deleted before, by table.
        reappeared: rows that were deleted, and whose key is there again: a row of somebody else,
            or put back by a trigger. tidyrows forgets them.
        untouched: rows with keys that a dead worker entered before their table was emptied or
            rebuilt, by table: what a sweep cannot tell from rows of others.
        external: external resources removed, by kind.
        restored: preserved rows put back as they were, by table.
        leftovers: rows and external resources of ours that are still there; they stay tracked.
            Of a sweep also the owners in the ledger whose entries it left.
        forgotten: how many entries ``sweep(forget=...)`` forgot, by owner.
        prepared: of a sweep, ids of transactions that are prepared (two-phase commit) and may have
            rows of dead workers, with their entries: PostgreSQL tells which have written to the
            ledger; elsewhere these are all of the server's.
        advice: what would have made slow deletes fast.
        blockers: who held locks that the cleanup waited for, as far as it looked.
        retries: how often a transaction was run again, after deadlocks and the like.
        seconds: how long it took.
    """

    deleted: dict[TableName, int] = field(default_factory=dict)
    dependents: dict[TableName, TableRows] = field(default_factory=dict)
    detached: dict[TableName, TableRows] = field(default_factory=dict)
    untracked: dict[TableName, int | None] = field(default_factory=dict)
    held: tuple[Held, ...] = ()
    already_gone: dict[TableName, int] = field(default_factory=dict)
    reappeared: dict[TableName, int] = field(default_factory=dict)
    untouched: dict[TableName, int] = field(default_factory=dict)
    external: dict[str, int] = field(default_factory=dict)
    restored: dict[TableName, int] = field(default_factory=dict)
    leftovers: tuple[Leftover, ...] = ()
    forgotten: dict[str, int] = field(default_factory=dict)
    prepared: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    blockers: tuple[Blocker, ...] = ()
    retries: int = 0
    seconds: float = 0.0

    @property
    def total_deleted(self) -> int:
        """Tracked rows deleted, in all tables."""
        return sum(self.deleted.values())

    def __str__(self) -> str:
        parts = [f"{table} {count} deleted" for table, count in self.deleted.items() if count]
        parts += [f"{t} {len(rows)} deleted (not tracked)" for t, rows in self.dependents.items()]
        parts += [f"{table} {len(rows)} detached" for table, rows in self.detached.items()]
        parts += [f"{table} {count} already gone" for table, count in self.already_gone.items()]
        parts += [f"{table} {count} there again" for table, count in self.reappeared.items()]
        parts += [
            f"{table} {count} untouched, since the table was emptied or rebuilt after the entry"
            for table, count in self.untouched.items()
        ]
        parts += [f"{kind} {count} removed" for kind, count in self.external.items()]
        parts += [f"{table} {count} restored" for table, count in self.restored.items()]
        held = Counter(each.row.table if each.row else "resources" for each in self.held)
        parts += [f"{table} {count} held" for table, count in held.items()]
        left: Counter[Any] = Counter()
        for leftover in self.leftovers:
            left[leftover.table or "resources"] += leftover.count
        owners = sum(leftover.owner is not None for leftover in self.leftovers)
        parts += [f"{table} {count} left over" for table, count in left.items() if count]
        parts += [f"{at_most(table, count)} not tracked" for table, count in self.untracked.items()]
        parts += [f"{owners} owner(s) left in the ledger"] if owners else []
        parts += [f"{printable(o)} {n} entries forgotten" for o, n in self.forgotten.items()]
        if self.retries:
            parts.append(f"{self.retries} retries")
        text = f"{', '.join(parts) or 'nothing to delete'} ({self.seconds:.3f} s)"
        slow = [f"slow: {advice}" for advice in self.advice]
        waiting = [
            f"prepared, may have rows: transaction {printable(each)!r}; end it, then sweep again"
            for each in self.prepared
        ]
        return "\n".join([text, *waiting, *slow, *(f"waited for {each}" for each in self.blockers)])


def at_most(table: TableName, count: int | None) -> str:
    """A table and a number of its rows of which only the upper limit is known, if that."""
    name = str(table) or "unknown tables"
    return f"{name} an unknown number" if count is None else f"{name} up to {count}"


def count_in(into: dict[Any, int], name: Any, count: int) -> None:
    """Add to one of the report's counts; nothing where there is nothing to count."""
    if count > 0:
        into[name] = into.get(name, 0) + count


def describe_leftovers(leftovers: Iterable[Leftover], *, swept: bool = False) -> str:
    """The message of a CleanupError: every row with its cause, up to a screen of them."""
    leftovers = list(leftovers)
    count = sum(leftover.count for leftover in leftovers)
    things = "row(s) and resources" if any(each.resource for each in leftovers) else "row(s)"
    start, where, again = (
        ("", "in the ledger", "run sweep()") if swept else ("tracked ", "tracked", "call cleanup()")
    )
    lines = [f"{count} {start}{things} are still there; they stay {where}:"]
    if not count:
        lines = ["Owners in the ledger were left alone, and all rows that they name:"]
    lines += [f"  {leftover}" for leftover in leftovers[:_SHOWN]]
    if len(leftovers) > _SHOWN:
        lines.append(f"  ... and {len(leftovers) - _SHOWN} more in error.leftovers")
    lines.append(f"Remove the cause, then {again} again.")
    return "\n".join(lines)


# -- while it runs ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a cleanup is, or a ``create_bulk``.

    Attributes:
        done: rows that are deleted, or given up as leftovers; or objects whose rows are written.
        total: all rows that the cleanup is about, or all objects; dependents are not among them,
            since nobody knows them before.
        finished: whether this is the last call.
    """

    done: int
    total: int
    finished: bool = False


class ProgressListener:
    """Calls the function that the user gave as ``on_progress``, until it raises."""

    def __init__(self, listener: Callable[[Progress], None], total: int) -> None:
        self._listener = listener
        self._total = total
        self._done = 0
        self.failures: list[Exception] = []
        self._call(finished=False)

    def add(self, rows: int) -> None:
        """So many rows are done."""
        self._done += rows
        self._total = max(self._total, self._done)  # rows in doubt may have turned out to be ours
        self._call(finished=False)

    def finish(self) -> None:
        """All is done."""
        self._total = self._done = max(self._total, self._done)
        self._call(finished=True)

    def _call(self, *, finished: bool) -> None:
        if self.failures:
            return
        try:
            self._listener(Progress(self._done, self._total, finished))
        except Exception as error:  # noqa: BLE001 -- rows are still to be deleted; it is raised when they are
            self.failures.append(error)


def progress_bar(**options: Any) -> Callable[[Progress], None]:
    """A bar of tqdm's, for ``CleanupManager(tracker, on_progress=progress_bar())``.

    It appears only in cleanups of more than one transaction, and goes when they end.

    Args:
        options: what ``tqdm`` takes, as ``desc="cleanup"`` or ``leave=True``.

    Raises:
        ModuleNotFoundError: tqdm is not installed; the message says how to.
    """
    try:
        from tqdm.auto import tqdm  # noqa: PLC0415 -- an extra, which not everybody has
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'progress_bar() draws with tqdm, which is not installed: pip install "tidyrows'
            '[progress]".',
            name=error.name,
        ) from error
    chosen = {"desc": "cleanup", "unit": " rows", "leave": False, **options}
    bar: Any = None

    def show(progress: Progress) -> None:
        nonlocal bar
        if bar is None and 0 < progress.done < progress.total:
            bar = tqdm(total=progress.total, **chosen)
        if bar is None:
            return
        bar.total = progress.total
        bar.update(progress.done - bar.n)
        if progress.finished:
            bar.close()
            bar = None

    return show
