"""The rows of many objects: a few statements for each table, parents first."""

from __future__ import annotations

from functools import partial
from itertools import groupby, zip_longest
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.base import PASSIVE_NO_RESULT, PassiveFlag
from sqlalchemy.orm.exc import FlushError
from sqlalchemy.schema import sort_tables_and_constraints
from sqlalchemy.sql.compiler import InsertmanyvaluesSentinelOpts

from tidyrows.errors import BulkError
from tidyrows.factories.auto_declarations import note_constraint
from tidyrows.factories.call import innermost_call
from tidyrows.factories.call_retry import unkeyed_with
from tidyrows.factories.loading import record
from tidyrows.factories.options import watch
from tidyrows.factories.used_session import session_behind
from tidyrows.tracking.tracker import current_tracker

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tidyrows.factories.bulk_shapes import Shape
    from tidyrows.factories.call import Call
    from tidyrows.factories.options import TrackedOptions

_EVENTS = (
    "before_flush",
    "after_flush",
    "after_flush_postexec",
    "before_attach",
    "after_attach",
    "transient_to_pending",
    "pending_to_persistent",
)


class Rows:
    """Objects of one session that have no row yet.

    Attributes:
        factory: the factory of the call.
        session: None until the first factory has joined.
        call: the call that commits the rows, or None.
        commits: whether a Meta wants a commit, in a session of its own.
    """

    def __init__(self, factory: Any, call: Call | None, *, returning: bool) -> None:
        self.factory = factory
        self.session: Any = None
        self.call = call
        self.commits = False
        self._is_elsewhere = False
        self._guessed: set[Any] = set()  # models for which declarations were guessed
        self._returning = returning
        self._waiting: dict[int, tuple[Any, Shape | None]] = {}
        self._read_early: dict[type[Any], dict[str, Any]] = {}

    def join(self, options: TrackedOptions) -> None:
        """A factory takes part: all objects of a call go through one session.

        Raises:
            BulkError: this factory has another session.
            NoSessionError: it has none.
        """
        given = options.factory._session_of_call()  # noqa: SLF001 -- a factory of this package
        session = session_behind(given)
        if session is None or self.session not in {None, session}:
            raise BulkError(
                self.factory,
                options.factory,
                "Meta.sqlalchemy_session",
                f"all rows go through one session, and this one is another: {given!r}",
            )
        tracker = current_tracker()
        if options.commits_at_the_end:
            if self.call is not None:
                self.call.session = session
        else:
            self.commits = self.commits or options.sqlalchemy_session_persistence == "commit"
            self._is_elsewhere = True
            if (call := innermost_call()) is not None:
                call.is_alone = False  # as each such object makes it
            if tracker is not None:
                watch(tracker, session)
        self.session = session
        if options.auto:
            self._guessed.add(options.get_model_class())  # type: ignore[no-untyped-call]  # factory_boy's is untyped

    def knows(self, instance: Any) -> bool:
        """Whether an object has a row in this session, or will have one."""
        state = getattr(instance, "_sa_instance_state", None)
        return state is not None and (
            id(instance) in self._waiting or (state.session is self.session and not state.deleted)
        )

    def given(self, values: Iterable[Any]) -> None:
        """Remember the caller's own new objects: they are written with these."""
        if self.call is not None and self.call.began_transaction:
            for value in values:
                if hasattr(value, "_sa_instance_state") and id(value) not in self._waiting:
                    self.call.unkeyed += unkeyed_with(value)

    def add(self, instance: Any, shape: Shape | None, *, is_parent: bool) -> None:
        """An object has been made; the next :meth:`write` writes its row.

        Args:
            instance: the object.
            shape: how it was made; None if by its model.
            is_parent: a declaration may read it: where it reads what only the row has, as the key,
                the rows are written then.
        """
        self._waiting[id(instance)] = instance, shape
        if is_parent:
            state = instance_state(instance)
            state.callables = self._reads(type(instance), state.mapper)

    def write(self) -> None:
        """Write the rows of all objects that have none."""
        made = list(self._waiting.values())
        self._waiting.clear()
        if not made:
            return
        for instance, _shape in made:
            vars(instance_state(instance)).pop("callables", None)
        # A declaration may have added an object, or one that refers to it, to the session.
        waiting = [each for each in made if instance_state(each[0]).session_id is None]
        session = self.session
        transaction = session._autobegin_t()  # noqa: SLF001 -- as a flush begins it; no public name keeps its origin
        if self.call is not None:
            self.call.transaction = self.call.transaction or transaction
        noted = [] if self.call is None or self._is_elsewhere else self.call.made
        before = len(noted)
        noted += [instance for instance, _shape in made]  # also for a call that fails
        shapes = list(dict.fromkeys(shape for _instance, shape in waiting))
        rank = _ranks({instance_state(instance).mapper: None for instance, _shape in waiting})
        try:
            if self._may_insert(waiting, shapes, rank):
                session.flush()  # what the caller has added
                self._insert(waiting, sorted(shapes, key=lambda shape: rank[shape.table]))
            else:
                self._flush(waiting, rank)
        except DBAPIError as error:
            for model in self._guessed:
                note_constraint(error, model)
            raise
        if self._is_elsewhere and self._returning:
            for instance, _shape in made:
                record(instance)
        if not self._returning:
            del noted[before : before + len(made)]

    # -- by the unit of work -------------------------------------------------------------------

    def _flush(self, waiting: list[tuple[Any, Shape | None]], rank: dict[Any, int]) -> None:
        # An object that one in the session refers to must be there too when that one is flushed.
        session = self.session
        session.add_all(instance for instance, _shape in waiting if _hangs(instance))
        place = lambda each: rank[instance_state(each).mapper.local_table]  # noqa: E731 -- twice the same
        objects = sorted((instance for instance, _shape in waiting), key=place)
        for _place, group in groupby(objects, key=place):
            session.add_all(group)
            session.flush()

    # -- by INSERT alone -----------------------------------------------------------------------

    def _may_insert(
        self,
        waiting: list[tuple[Any, Shape | None]],
        shapes: list[Shape | None],
        rank: dict[Any, int],
    ) -> bool:
        """Whether nothing but the rows themselves depends on how they are written."""
        session = self.session
        if session.connection_callable or any(
            len(getattr(session.dispatch, name)) for name in _EVENTS
        ):
            return False
        for instance, shape in waiting:
            if shape is None or not vars(instance).keys() <= shape.names:
                return False  # a declaration has set what the factory does not
        for shape in shapes:
            if (
                shape is None
                or not self._connection(
                    shape
                ).dialect.insert_executemany_returning_sort_by_parameter_order
            ):
                return False
            for parent in shape.parents:
                if any(rank.get(table, -1) >= rank[shape.table] for table in parent.mapper.tables):
                    return False
        return True

    def _insert(self, waiting: list[tuple[Any, Shape | None]], shapes: list[Any]) -> None:
        objects: dict[Any, list[Any]] = {shape: [] for shape in shapes}
        for instance, shape in waiting:
            objects[shape].append(instance)
        referred = {
            table for shape in shapes for each in shape.parents for table in each.mapper.tables
        }
        session = self.session
        made: list[Any] = []
        try:
            for shape, instances in objects.items():
                pairs = [(shape.row(instance), instance) for instance in instances]
                for _columns, group in groupby(pairs, key=lambda pair: tuple(pair[0])):
                    rows, members = zip(*group, strict=True)
                    self._insert_rows(
                        shape, list(rows), members, keyed=self._returning or shape.table in referred
                    )
                if self._returning:
                    made += map(instance_state, instances)
        except BaseException:
            # as a flush that fails: the session says so until it is rolled back
            session._autobegin_t()._begin().rollback(_capture_exception=True)  # noqa: SLF001 -- as above
            raise
        for state in made:
            session._save_impl(state)  # noqa: SLF001 -- add() would look for objects to cascade to
        session._register_persistent(set(made))  # noqa: SLF001 -- what a flush does at its end

    def _insert_rows(
        self, shape: Shape, rows: list[dict[str, Any]], instances: Iterable[Any], *, keyed: bool
    ) -> None:
        statement = sa.insert(shape.table)
        if not keyed:
            self._connection(shape).execute(statement, rows)
            return
        connection = self._connection(shape)
        wanted = *shape.table.primary_key, *shape.fetched
        column = _natural_sentinel(shape.table, rows, connection.dialect)
        if column is None:
            result = connection.execute(
                statement.return_defaults(*wanted, sort_by_parameter_order=True), rows
            )
            keys: Any = result.inserted_primary_key_rows
            filled: Any = result.returned_defaults_rows or ()
        else:
            result = connection.execute(statement.returning(*wanted, column), rows)
            told = {row[-1]: row for row in result}
            filled = [told.get(row[column.key]) for row in rows]
            keys = [row and row[: len(shape.table.primary_key)] for row in filled]
        context: Any = result.context
        compiled = context.compiled
        names = {each: prop.key for prop in shape.mapper.column_attrs for each in prop.columns}
        key_names = [names[each] for each in shape.table.primary_key]
        fetched = [(names[each], each) for each in shape.fetched]
        given = [(names[each], each.key) for each in compiled.prefetch if each in names]
        expired = {names[each] for each in compiled.postfetch if each in names} | {*shape.expired}
        expired -= {*key_names, *(name for name, _column in fetched)}
        for instance, key, sent, row in zip_longest(
            instances, keys, context.compiled_parameters, filled
        ):
            if key is None:
                raise FlushError(
                    f"The database did not tell the key of each new row of {shape.table.fullname}. "
                    f"Is there a trigger that changes or drops rows?"
                )
            values = vars(instance)
            for name, value in zip(key_names, key, strict=True):
                if values.get(name) is None:
                    values[name] = value
            for name, sent_name in given:
                values[name] = sent[sent_name]
            for name, each in fetched:
                values[name] = row._mapping[each]  # noqa: SLF001 -- the public name of SQLAlchemy
            if expired:
                instance_state(instance)._expire_attributes(values, expired)  # noqa: SLF001 -- as a flush does

    def _connection(self, shape: Shape) -> sa.Connection:
        session = self.session
        before = session._flushing  # noqa: SLF001 -- what a get_bind that routes reads
        session._flushing = True  # noqa: SLF001 -- as above
        try:
            connection: sa.Connection = session.connection(bind_arguments={"mapper": shape.mapper})
        finally:
            session._flushing = before  # noqa: SLF001 -- as above
        return connection

    # -- what is read before its row is there --------------------------------------------------

    def _reads(self, kind: type[Any], mapper: orm.Mapper[Any]) -> dict[str, Any]:
        if kind not in self._read_early:
            self._read_early[kind] = {
                each.key: partial(self._read, each.key) for each in mapper.column_attrs
            }
        return self._read_early[kind]

    def _read(self, name: str, state: Any, passive: PassiveFlag) -> Any:
        """The value of an attribute that only the row has."""
        if not passive & PassiveFlag.SQL_OK:
            return PASSIVE_NO_RESULT
        before, self._returning = self._returning, True  # a later object may refer to this one
        try:
            self.write()
        finally:
            self._returning = before
        return state.manager[name].impl.get(state, state.dict, passive)


_SENTINELS = {sa.String: str, sa.Text: str, sa.Integer: int, sa.BigInteger: int}
"""Types whose values come back as they were sent."""


def _natural_sentinel(
    table: sa.Table, rows: list[dict[str, Any]], dialect: sa.Dialect
) -> sa.Column[Any] | None:
    """A column whose values tell the new rows apart, where SQLAlchemy has nothing that would.

    It would then insert one row after the other, to know the key of each.
    """
    kinds: Any = dialect.insertmanyvalues_implicit_sentinel
    if len(rows) == 1 or not kinds & InsertmanyvaluesSentinelOpts.NOT_SUPPORTED:
        return None
    if any(column.key in rows[0] for column in table.primary_key):
        return None
    for name in rows[0]:
        kind = _SENTINELS.get(type(table.c[name].type))
        values = [row[name] for row in rows]
        if {kind} == set(map(type, values)) and len(set(values)) == len(values):
            return table.c[name]
    return None


def _hangs(instance: Any) -> bool:
    """Whether a relationship leads to an object that has its row."""
    values = vars(instance)
    for relation in instance_state(instance).mapper.relationships:
        value = values.get(relation.key)
        others = value if relation.uselist and value is not None else (value,)
        if any(other is not None and instance_state(other).key for other in others):
            return True
    return False


def _ranks(mappers: Iterable[orm.Mapper[Any]]) -> dict[Any, int]:
    """The tables of these, numbered so that parents come first."""
    tables: Any = dict.fromkeys(table for mapper in mappers for table in mapper.tables)
    ordered: Any = sort_tables_and_constraints(tables)  # type: ignore[no-untyped-call]  # SQLAlchemy's is untyped
    return {table: number for number, (table, _keys) in enumerate(ordered)}
