"""The proof that no row of ours is still there: for the last step of a CI job."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, TypeAlias

import sqlalchemy as sa

from tidyrows.arguments import Kind, checked, kinds_of
from tidyrows.cleanup.identity import uncertain_keys
from tidyrows.dialects import was_dropped
from tidyrows.errors import LeakedRowsError, LedgerError, ScopeError
from tidyrows.greenlets import spawn
from tidyrows.ledger.table import NAME
from tidyrows.sweep.dead_workers import SweepArguments, all_entries
from tidyrows.sweep.owners import OwnerLeftError
from tidyrows.sweep.recovery import read_owner
from tidyrows.sweep.sweep import find_orphans, opened_ledger
from tidyrows.tracking import tags
from tidyrows.tracking.tracker import ResourceTracker, trackers_of
from tidyrows.worker import printable, run_parts, worker_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from tidyrows.keys import KeyedTable, TableName
    from tidyrows.ledger.table import Ledger
    from tidyrows.sweep.sweep import Place
    from tidyrows.tracking.store import TableHoldings

_SHOWN = 10
Told: TypeAlias = "Counter[tuple[TableName, Any]]"
"""How often a key, or a row without one, has been told: ledger, trackers and tags may name it."""


@dataclass(frozen=True, slots=True)
class LeakedRows:
    """Rows of ours in one table that are still there.

    Attributes:
        table: the table; None for external resources.
        keys: their primary keys, scalars where it is one column; whole rows in a table without one,
            ``"?"`` where their values are not known;
            the payloads' kinds of external resources.
        run: the run that made them; None where it is not known, as the next two.
        worker: the worker.
        test: the test; None also for rows that were made outside of one.
        certain: False where a row may be somebody else's: the answer to the COMMIT was lost, or
            the row does not look as it was inserted, or its table was emptied or rebuilt meanwhile.
    """

    table: TableName | None
    keys: tuple[Any, ...]
    run: str | None = None
    worker: str | None = None
    test: str | None = None
    certain: bool = True

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.keys[:_SHOWN]))
        if len(self.keys) > _SHOWN:
            shown += f" and {len(self.keys) - _SHOWN} more"
        what = "external resources" if self.table is None else str(self.table)
        perhaps = "" if self.certain else ", perhaps somebody else's"
        maker = [printable(self.test)] if self.test else []
        maker += [worker_name(self.worker, self.run)] if self.worker else []
        maker += [f"run {printable(self.run)}"] if self.run and not self.worker else []
        return f"{what} {shown} (made by {', '.join(maker) or 'an unknown worker'}{perhaps})"


@checked(
    tagged=Kind(
        lambda given: given is None or hasattr(given, "items"),
        "a dict of columns and their templates",
        '{User.email: "user-{tag}@example.test"}',
    ),
    **{
        name: kind
        for name, kind in kinds_of(find_orphans).items()
        if name in {"place", "run", "worker", "test", "ledger", "schema", "allow_production"}
    },
)
def assert_no_leaks(
    place: Place,
    *,
    run: str | None = None,
    worker: str | None = None,
    test: str | None = None,
    tagged: Mapping[Any, str] | None = None,
    ledger: str = NAME,
    schema: str | None = None,
    allow_production: bool | Collection[str] = False,
) -> None:
    """Raise if a row of ours is still there: what CI calls last, in any process.

    It looks for the rows that the ledger names, those of live workers too, for rows that trackers
    of this process hold (of commits after their block, say), and for values in ``tagged`` columns.
    It changes nothing.

    Args:
        place: an engine, a URL, or a :class:`Ledger`.
        run: only what this run made.
        worker: only what workers with this id made.
        test: only what this test made.
        tagged: columns of mapped classes or Tables, each with the template that ``Scoped`` was
            given. A tag tells the run, to others neither the worker's name nor the test.
        ledger: the name of the ledger's table.
        schema: the schema of that table.
        allow_production: as for :class:`ResourceTracker`.

    Raises:
        LeakedRowsError: rows are there; it names table, keys and maker.
        LedgerError: there is no ledger and nothing is ``tagged``, so nothing is proved; or entries
            cannot be read.
        ScopeError: ``tagged`` with ``test`` or ``worker``.
        ProductionDatabaseError: the database looks like production.
        ArgumentError: an argument has a value that it does not take.

    Example:
        >>> assert_no_leaks(engine, run="nightly-17")
    """
    arguments = SweepArguments(run, worker, test=test, kept=True)
    whose = _whose(arguments) if tagged else []
    told: Told = Counter()
    with opened_ledger(place, ledger, schema, allow_production) as opened:
        leaks: list[LeakedRows] = []
        with opened.looking() as connection:
            has_ledger = not opened.is_private and opened.version(connection) is not None
            if has_ledger or not (tagged or opened.is_private):
                opened.check(connection)
                leaks += _of_ledger(opened, connection, arguments, told)
            leaks += _of_trackers(opened, connection, arguments, told, has_ledger=has_ledger)
        if tagged:
            leaks += _of_tags(opened, tagged, whose, arguments, told)
    if leaks:
        count = sum(len(leak.keys) for leak in leaks)
        raise LeakedRowsError(
            f"{count} row(s) or resources of ours are still there:\n"
            + "".join(f"  {leak}\n" for leak in leaks)
            + "Rows in the ledger are deleted by sweep(engine) when their workers have ended, kept "
            "rows by sweep(engine, kept=True), tagged rows by "
            "tracker.track_tagged(column, template).",
            leaks=tuple(leaks),
        )


async def assert_no_leaks_async(place: Place, **options: Any) -> None:
    """As :func:`assert_no_leaks`, for an AsyncEngine."""
    await spawn(assert_no_leaks, place, **options)


def _of_ledger(
    ledger: Ledger, connection: sa.Connection, arguments: SweepArguments, told: Told
) -> Iterator[LeakedRows]:
    """What the ledger names, as far as it is there."""
    wanted: dict[str, set[int]] = {}
    for candidate in all_entries(ledger, connection, arguments):
        wanted.setdefault(candidate.owner, set()).add(candidate.scope)
    for owner, scopes in wanted.items():
        try:
            of_tracker = read_owner(ledger, connection, owner)
        except OwnerLeftError as why:
            raise LedgerError(
                f"The entries of owner {printable(owner)} in {ledger!r} cannot be read, so nothing "
                f"is proved: {why.args[0]} See find_orphans(engine)."
            ) from why
        for scope in sorted(scopes & of_tracker.keys()):
            entries = of_tracker[scope]
            maker: dict[str, Any] = {
                name: entries.columns.get(name) for name in ("run", "worker", "test")
            }
            for held in entries.store.snapshot():
                yield from _there(ledger, connection, held, maker, told)
            for table, former in entries.former.items():
                now = _incarnation(ledger, connection, table)
                asked = [key for key, before in former.items() if not was_dropped(before, now)]
                keys = _existing(ledger, connection, table, asked, told)
                if keys:
                    yield LeakedRows(table.name, keys, **maker, certain=False)
            if entries.externals:
                kinds = tuple(body["kind"] for body in entries.externals.values())
                yield LeakedRows(None, kinds, **maker)


def _of_trackers(
    ledger: Ledger,
    connection: sa.Connection,
    arguments: SweepArguments,
    told: Told,
    *,
    has_ledger: bool,
) -> Iterator[LeakedRows]:
    """What trackers of this process hold and the ledger does not name.

    A tracker may have another ledger, or rows of the time before it had one.
    """
    asked = {"run": arguments.run, "worker": arguments.worker, "test": arguments.test}
    for tracker in trackers_of(ledger.database):
        context = tracker.context
        maker = {"run": context.run_id, "worker": context.worker_id, "test": context.test_id}
        is_asked = all(asked[name] in {None, own} for name, own in maker.items())
        tracker.engines.resolve()
        journal = tracker.journals.of(ledger.database)
        is_entered = has_ledger and journal is not None and journal.ledger.is_same(ledger)
        for held in tracker.store.snapshot() if is_asked else ():
            # rows without a key cannot be told from those of the ledger
            is_new = held.table.key_columns or not is_entered
            if is_new and held.table.name.database == ledger.database:
                yield from _there(ledger, connection, held, maker, told)


def _of_tags(
    ledger: Ledger,
    tagged: Mapping[Any, str],
    whose: Iterable[str],
    arguments: SweepArguments,
    told: Told,
) -> Iterator[LeakedRows]:
    tracker = ResourceTracker(ledger.engine, allow_production=True)
    for (column, template), each in product(tagged.items(), whose):
        wanted = tags.patterns_of_owner(tracker.context.tag, column, template, each)
        for table, found in tags.rows_of_tag(tracker.sessions, column, wanted)[0]:
            keys = tuple(key for key in found if not told[table.name, key])
            told.update((table.name, key) for key in keys)
            if keys:
                yield LeakedRows(table.name, keys, arguments.run)


def _whose(arguments: SweepArguments) -> list[str]:
    """Of which tags the values are to be looked for."""
    if arguments.test is not None or arguments.worker is not None:
        raise ScopeError(
            "A tag tells to another process neither its test nor the name of its worker, so "
            "tagged= cannot be asked for them. Write assert_no_leaks(engine, run=..., tagged=...)."
        )
    return ["any"] if arguments.run is None else sorted(run_parts(arguments.run))


def _there(
    ledger: Ledger,
    connection: sa.Connection,
    held: TableHoldings,
    maker: Mapping[str, Any],
    told: Told,
) -> Iterator[LeakedRows]:
    """Which of these rows are in the database and not told yet."""
    table, dialect = held.table, ledger.dialect
    if not sa.inspect(connection).has_table(table.name.name, schema=table.name.schema):
        return
    now = _incarnation(ledger, connection, table)
    if not table.key_columns:
        before = held.incarnation or now
        if now and was_dropped(before, now):
            return
        equal = partial(dialect.count_equal_rows, connection, table)
        rows = [
            row
            for row, count in Counter(held.keyless_rows).items()
            for _ in range(min(count, equal(row) - told[table.name, row]))
        ]
        told.update((table.name, row) for row in rows)
        if rows:
            yield LeakedRows(table.name, tuple(rows), **maker, certain=before == now)
        unknown = held.keyless_unknown + held.keyless_in_doubt
        if unknown:
            yield LeakedRows(table.name, ("?",) * unknown, **maker, certain=False)
        return
    former = held.of_another(now) if now else {}
    asked = (key for key in (*held.keys.in_order(), *held.in_doubt))
    asked = (key for key in asked if key not in former or not was_dropped(former[key], now))
    there = _existing(ledger, connection, table, asked, told)
    doubtful = {key for key in there if key not in held.keys or key in former}
    doubtful |= _changed(connection, held, there)
    for certain in (True, False):
        some = tuple(key for key in there if (key not in doubtful) is certain)
        if some:
            yield LeakedRows(table.name, some, **maker, certain=certain)


def _incarnation(ledger: Ledger, connection: sa.Connection, table: KeyedTable) -> str:
    return ledger.dialect.incarnations(connection, [table.place]).get(table.place, "")


def _existing(
    ledger: Ledger, connection: sa.Connection, table: KeyedTable, keys: Iterable[Any], told: Told
) -> tuple[Any, ...]:
    """Which of these keys name a row and are not told yet; now they are."""
    if not table.key_columns:
        return ()
    new = [key for key in keys if not told[table.name, key]]
    there = tuple(ledger.dialect.existing_keys(connection, table, new))
    told.update((table.name, key) for key in there)
    return there


def _changed(connection: sa.Connection, held: TableHoldings, keys: Sequence[Any]) -> set[Any]:
    """Rows that do not look as they were inserted, where the database gives keys again."""
    changed: set[Any] = set()
    for shape, hashes in () if held.hashes is None else held.hashes.by_shape():
        known = [key for key in keys if key in hashes]
        changed.update(uncertain_keys(connection, held.table, known, shape, hashes))
    return changed
