"""What a user names of a tracker: rows and external resources that it shall own, and questions."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import sqlalchemy as sa

from tidyrows.arguments import SWITCH, checked, name
from tidyrows.capture.changes import Inserted
from tidyrows.capture.fingerprints import hashes_of_rows
from tidyrows.dialects import dialect_for
from tidyrows.errors import ExternalResourceError, SessionStateError, TidyRowsError
from tidyrows.external import ExternalResource, Tie
from tidyrows.key_json import to_project_values
from tidyrows.keys import KeyedTable, RowKey, TableName
from tidyrows.tracking import named_rows, tags
from tidyrows.tracking.named_rows import Found, mapper_of, parts_of, table_of
from tidyrows.tracking.preserved import Preserved
from tidyrows.tracking.sessions import refuse_keyless
from tidyrows.tracking.tracker_parts import TrackerParts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidyrows.capture.changes import Hashes
    from tidyrows.external import Item
    from tidyrows.retry import RetryPolicy
    from tidyrows.tracking.tags import TagOwner

_AT_LEAST = 0.2
"""The fewest seconds that a late query gets, also where the deadline has passed."""

Find: TypeAlias = Callable[[], Found]


class Selection(TrackerParts):
    """The methods by which a user names what the tracker owns."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._late: list[Find] = []
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.preserved = Preserved(self.sessions, self.store)
        self._lock = threading.Lock()

    def forget_parent(self) -> None:
        """In a forked child: the rows and resources are the parent's."""
        super().forget_parent()
        self._begin_anew()

    # -- rows ----------------------------------------------------------------------------------

    def track(self, *instances: Any) -> None:
        """Own these mapped objects: persistent or detached, in every table of their hierarchy.

        Raises:
            UntrackableRowError: an object is not mapped, or has no row yet.
        """
        self.sessions.refuse_blocking("track(...)")
        rows = [
            row for each in instances for row in named_rows.rows_of_instance(self.sessions, each)
        ]
        for table, key in rows:
            self._hold_committed(table, [key])

    def track_rows(self, table: Any, keys: Iterable[Any]) -> None:
        """Own the rows with these primary keys.

        Args:
            table: a mapped class or a Table.
            keys: scalars, or tuples in the order of the primary key where it has several columns.

        Raises:
            UnknownTableError: it is no table, or the database does not have it.
            NoPrimaryKeyError: it has no primary key.
            KeyShapeError: a key has another number of values, a NULL, or a value of another type;
                or its row is of another class in the same table (inheritance).
        """
        self.sessions.refuse_blocking("track_rows(...)")
        for keyed, stored in named_rows.named_rows(self.sessions, table, keys):
            self._hold_committed(keyed, stored)

    @checked(late=SWITCH)
    def track_query(self, select: sa.Select[Any], *, late: bool = False) -> int:
        """Own the rows that a query finds now, as committed.

        Args:
            select: selects one mapped class or table, or its primary key columns.
            late: run it when a cleanup begins instead, for rows that are not there yet. It is
                run again at the beginning of every later cleanup of this tracker.

        Returns:
            How many rows were found; 0 where that comes late.

        Raises:
            UnknownTableError: it selects no one model or table.
            NoPrimaryKeyError: the rows have no primary key to be named by.
        """
        self.sessions.refuse_blocking("track_query(...)")
        named_rows.selected_model(select)
        find = partial(named_rows.rows_of_query, self.sessions, select)
        return self._hold_found(find, late=late)

    @checked(template=name("user-{tag}"), late=SWITCH)
    def track_tagged(
        self, column: Any, template: str, *, whose: TagOwner | str = "test", late: bool = False
    ) -> int:
        """Own the committed rows whose text in a column was made of a tag, as ``Scoped`` makes it.

        It finds what the application made of a value that the test gave it: an account for
        ``Scoped("user-{tag}@example.test")``. Rows that another tracker of this process holds are
        left to it.

        Args:
            column: ``User.email``, or a column of a Table.
            template: what ``Scoped`` was given, literal text and ``{tag}``; a value must match it
                as a whole.
            whose: ``test``, ``worker`` or ``run``: the tags of this one, by the tracker's context.
                Or the beginning of others' tags, as values in the database show it: the first 7
                characters for a run, 9 for a worker, 11 for a test.
                ``any``: every tag of tidyrows, those of runs that are going on among them. Ask for
                it where no other run uses the database.
            late: as for :meth:`track_query`.

        Returns:
            How many rows of the column's table were found; 0 where that comes late.

        Raises:
            ScopeError: the template has no tag or does not fit the column, the column is no text,
                or nothing is known that the values begin with.
            UnknownTableError: it is no column of a mapped class or Table.
        """
        self.sessions.refuse_blocking("track_tagged(...)")
        patterns = tags.patterns_of_owner(self.context.tag, column, template, whose)
        find = partial(tags.rows_of_tag, self.sessions, column, patterns)
        return self._hold_found(find, late=late)

    def run_late_queries(self, retry: RetryPolicy) -> list[Exception]:
        """Run the queries that a cleanup begins with; returns their errors.

        One query that fails keeps no other from being run, and no row from being deleted.
        """
        errors: list[Exception] = []
        if not self._late:
            return errors
        usual, until = self.sessions.patience, retry.clock() + retry.deadline

        def run(find: Find) -> None:
            self.sessions.patience = max(until - retry.clock(), _AT_LEAST)
            self._hold_found(find)

        try:
            for find in list(self._late):
                try:
                    retry.run(partial(run, find), is_transient=self.engines.is_transient)
                except (sa.exc.SQLAlchemyError, TidyRowsError, ConnectionError) as error:
                    errors.append(error)
        finally:
            self.sessions.patience = usual
        return errors

    def _hold_found(self, find: Find, *, late: bool = False) -> int:
        if late:
            self._late.append(find)
            return 0
        found, count = find()
        for table, keys in found:
            self._hold(table, keys)
        return count

    def _hold_committed(self, table: KeyedTable, keys: list[Any]) -> None:
        """Hold rows that may be pending: such an insert counts when it is committed."""
        self.engines.resolve()  # an insert that is committed is pending no more
        pending = set(self.engines.pending_keys(table.table))
        named = [key for key in keys if key not in pending] if pending else keys
        dialect = dialect_for(self.sessions.engines.by_database[table.name.database])
        self._hold(table, named, sent=dialect.rounds_keys(table))

    def _hold(self, table: KeyedTable, keys: list[Any], *, sent: bool = False) -> None:
        """Hold rows that the user named, and record them in the ledger."""
        incarnation = self.sessions.incarnations.get(table)
        self.untracked.take(table.name, len(set(keys).difference(self.held_keys(table.name, keys))))
        hashes = self._hashes(table, keys)
        read = None if hashes is None else hashes.read
        named = Inserted(
            table, keys, named=True, sent=sent, incarnation=incarnation, read_hashes=read
        )
        self.store.apply(named)
        self.journals.add(named)

    def _hashes(self, table: KeyedTable, keys: list[Any]) -> Hashes | None:
        """What tells a sweep that rows are still these, where their keys may be given again."""
        dialect = dialect_for(self.sessions.engines.by_database[table.name.database])
        if not (dialect.reuses_keys and keys and self.journals.ledgers):
            return None
        with self.sessions.new_connection(table.table) as connection:
            return hashes_of_rows(dialect, connection, table, keys)

    def preserve(self, select: sa.Select[Any]) -> int:
        """Remember the shared rows that a query finds now, and put them back at cleanup.

        For tests that must change what others use too: settings, reference data. At cleanup a row
        that was updated gets its values back, and one that was deleted is inserted again. A row
        that somebody else changed after this tracker's own statements did stays as it is and is
        named in the CleanupError. A row that this tracker's statements never wrote was changed by
        the application under test, so it is put back; two workers in different processes that
        preserve the same row at the same time cannot be told apart.

        Args:
            select: selects one mapped class or table. Every column is remembered, as committed, in
                every table of a class's hierarchy; rows that come later are not touched.

        Returns:
            How many rows were found. Of a row that is preserved already the first memory counts,
            and a tracked row is deleted all the same.

        Raises:
            UnknownTableError: it is no such query, or the database does not have the table.
            NoPrimaryKeyError: the table has no primary key.

        Example:
            >>> tracker.preserve(select(Setting).where(Setting.name == "signup"))
            1
        """
        self.sessions.refuse_blocking("preserve(...)")
        return self.preserved.remember(select)

    # -- external resources --------------------------------------------------------------------

    def track_external(
        self, kind: str, payload: Any, *, after: Iterable[Any] = (), before: Iterable[Any] = ()
    ) -> ExternalResource:
        """Own something that is no row; the :func:`external_handler` of its kind removes it.

        Args:
            kind: which handler.
            payload: what the handler needs to find it, as JSON values.
            after: what needs it: mapped objects, RowKeys, mapped classes or Tables (all their
                tracked rows), or handles of other resources. It is removed when they are gone.
            before: what it needs, of the same kinds. They go when it has been removed.

        Returns:
            A handle, for the ``after`` and ``before`` of others.

        Raises:
            ExternalResourceError: the payload has no JSON form, an argument is no list, or a
                handle is another tracker's.
            UnknownTableError: the database does not have a table.
            UntrackableRowError: an object is not mapped, or has no row yet.
            SessionStateError: the tracker was made before a fork, in the parent.

        Example:
            >>> user = UserFactory()
            >>> tracker.track_external("auth-user", {"id": user.auth_id}, after=[user])
            <ExternalResource auth-user #1>
        """
        if self.journals.ledgers:
            self.sessions.refuse_blocking("track_external(...)")
        if self.is_foreign:
            raise SessionStateError(
                f"This tracker was made before the process forked, so the {kind} would be "
                f"forgotten. Write tracker.start() first, or make a tracker in the child."
            )
        needed_by = tuple(self._items(kind, "after", after))
        needs = tuple(self._items(kind, "before", before))
        with self._lock:
            resource = self.external_resources.new(kind, payload)
            self.external_resources.tie(resource, needed_by, needs)
        try:
            self.journals.intend(Tie(resource, needed_by, needs), self._tables)
        except BaseException:
            self.external_resources.forget(resource)
            raise
        return resource

    def externals(self) -> list[ExternalResource]:
        """Every external resource that is not known to be gone, in the order of tracking."""
        return [tie.resource for tie in self.ties()] if len(self.external_resources) else []

    def ties(self) -> list[Tie]:
        """Every such resource with its place in the order. Empty in a forked child."""
        return [] if self.is_foreign else list(self.external_resources)

    def forget_external(self, resource: ExternalResource) -> None:
        """A resource is gone."""
        self.journals.remove(resource)
        self.external_resources.forget(resource)

    def _tables(self) -> dict[TableName, KeyedTable]:
        """The tables of what is held, or may be once it is committed."""
        tables = {change.table.name: change.table for change in self.engines.pending_changes()}
        return tables | {held.table.name: held.table for held in self.store.snapshot()}

    def _items(self, kind: str, argument: str, given: Any) -> Iterable[Item]:
        """The items of one argument, each once."""
        single = isinstance(given, (str, bytes, type, sa.Table, RowKey, ExternalResource))
        if single or not isinstance(given, Iterable):
            raise ExternalResourceError(
                f"{argument}= takes a list, and {given!r} is none. Write "
                f"track_external({kind!r}, ..., {argument}=[...]).",
                kind=kind,
            )
        return dict.fromkeys(item for each in given for item in self._items_of(kind, each))

    def _items_of(self, kind: str, item: Any) -> Iterator[Item]:
        if isinstance(item, ExternalResource):
            if not self.external_resources.made(item):
                raise ExternalResourceError(
                    f"The {item} is another tracker's, so {kind!r} cannot be put in order with it. "
                    f"Track both with the same tracker.",
                    kind=kind,
                )
            yield item
        elif isinstance(item, RowKey):
            yield item
        elif isinstance(item, sa.Table) or mapper_of(item) is not None:
            for part in parts_of(item):
                yield self.sessions.real_table(part.table).name
        else:
            for table, key in named_rows.rows_of_instance(self.sessions, item):
                yield table.row(key)

    # -- questions -----------------------------------------------------------------------------

    def mine(self, model: Any) -> sa.ColumnElement[bool]:
        """A WHERE clause for the rows of this test only, uncommitted ones included.

        Example:
            >>> session.scalars(select(User).where(tracker.mine(User))).all()

        Raises:
            NoPrimaryKeyError: the model has no primary key to compare.
        """
        table = table_of(model)
        refuse_keyless(table)
        self.engines.resolve()
        keys: list[Any] = []
        for held in self.store.snapshot():
            if is_of(held.table, table):
                dialect = self.engines.by_database[held.table.name.database].dialect
                keys.extend(to_project_values(held.table, held.keys.in_order(), table, dialect))
        keys.extend(self.engines.pending_keys(table))
        columns = tuple(table.primary_key)
        if len(columns) == 1 and isinstance(columns[0].type, sa.Integer):
            # written into the statement: there may be more keys than it takes parameters
            return columns[0].in_(sa.bindparam(None, keys, expanding=True, literal_execute=True))
        if len(columns) == 1:
            return columns[0].in_(keys)
        # one OR per row: a tuple IN scans the whole table on SQLite
        return sa.or_(sa.false(), *(sa.and_(*map(operator.eq, columns, key)) for key in keys))

    def explain(self, row: Any) -> str:
        """Why a row is ours, or that it is not.

        Args:
            row: a mapped object or a :class:`RowKey`.

        Raises:
            UntrackableRowError: it is neither, or has no row yet.
        """
        if isinstance(row, RowKey):
            key = row.key[0] if len(row.key) == 1 else row.key
            return self._explain_key(row.table, key, str(row))
        return "\n".join(
            self._explain_key(table.name, key, str(table.row(key)))
            for table, key in named_rows.rows_of_instance(self.sessions, row, "explain")
        )

    def _explain_key(self, name: TableName, key: Any, label: str) -> str:
        self.engines.resolve()
        held = next((held for held in self.store.snapshot() if held.table.name == name), None)
        if held is not None and key in held.named:
            return (
                f"{label} is ours: the tracker was told of it (track, track_rows or track_query)."
            )
        if held is not None and key in held.keys:
            return (
                f"{label} is ours: its INSERT was committed while the tracker of "
                f"{self.context.tag} was listening."
            )
        if held is not None and key in held.in_doubt:
            return (
                f"{label} is in doubt: its INSERT was seen, and the answer to its COMMIT was lost, "
                f"or its transaction was ended past SQLAlchemy. "
                "It is deleted only if nobody else can hold this key."
            )
        for change in self.engines.pending_changes():
            if change.table.name == name and key in change.keys:
                return f"{label} is not ours yet: its INSERT is not committed."
        return (
            f"{label} is not ours: no committed INSERT of it was seen, and nobody told the tracker."
        )


def is_of(held: KeyedTable, table: sa.Table) -> bool:
    """Whether held rows are of this Table; ``from_json`` knows them by reflected ones."""
    if held.table.metadata is table.metadata:
        return held.table is table
    return held.table.name == table.name and table.schema in {None, held.name.schema}
