"""One commit per call that the test itself makes.

An application in another process must see an object whole or not at all: with the rows of its
SubFactories and with everything that its hooks added or changed. So each object is flushed when it
is made, and one commit follows when the outermost call returns.
"""

from __future__ import annotations

from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy import event, inspect
from sqlalchemy.exc import OperationalError, ProgrammingError, SQLAlchemyError
from sqlalchemy.orm import RelationshipDirection, SessionTransactionOrigin
from sqlalchemy.orm.attributes import set_committed_value

from tidyrows.dialects import dialect_for
from tidyrows.errors import add_note, text_of
from tidyrows.greenlets import in_greenlet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sqlalchemy.orm import InstanceState, RelationshipProperty, Session, SessionTransaction

    from tidyrows.keys import TableName
    from tidyrows.tracking.tracker import ResourceTracker

P = ParamSpec("P")
T = TypeVar("T")

_calls: ContextVar[tuple[Call, ...]] = ContextVar("tidyrows_calls", default=())


@dataclass(slots=True, eq=False)
class Call:
    """An outermost factory call, and the transaction that it commits.

    Calls nest only where a hook enters another tracker's block: the rows of the inner call must be
    committed before that block ends.
    """

    tracker: ResourceTracker
    commits: bool = True  # the session, at the end
    began_transaction: bool = False  # the transaction, if there is one, begins in this call
    session: Session | None = None  # the tracker's, once the call has made an object in it
    running: bool = False  # a task that a hook started may outlive the call
    # False once a part of the call went through another session, or was committed before the end
    is_alone: bool = True
    transaction: SessionTransaction | None = None  # when the call made its first object
    commit_sent: bool = False
    uncertain_before: set[tuple[TableName, Any]] = field(default_factory=set)  # before the COMMIT
    error: BaseException | None = None
    result: Any = None
    made: list[Any] = field(default_factory=list)
    unkeyed: list[Any] = field(default_factory=list)  # objects of the caller without a key yet
    expelled: list[Any] = field(default_factory=list)  # what a rollback removed from the session

    def run(self, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``make`` as part of this call; then commit, or roll back what failed."""
        try:
            self.running = True
            token = _calls.set((*_calls.get(), self))
            try:
                self.result = result = make(*args, **kwargs)
            finally:
                self.running = False
                _calls.reset(token)
            session = self.session
            if (
                session is not None
                and self.commits
                and (self.tracker.owns_session or not _is_begun_by_hand(session))
            ):
                self._commit(session)
        except BaseException as error:
            self.error = error
            if self.session is not None:
                self._roll_back(self.session, error)
            raise
        return result

    @property
    def may_run_again(self) -> bool:
        """Whether everything that was lost with the transaction belongs to this call."""
        return self.began_transaction and self.is_alone and self.session is not None

    def _commit(self, session: Session) -> None:
        session.flush()
        if self.began_transaction:
            self.uncertain_before = self.tracker.store.uncertain_keys()
        if in_greenlet():
            _load_attributes(self.made)
            changes = self.tracker.engines.pending_changes()
            _fill_relationships(session, {change.table.table for change in changes}, self.made)
            self.commit_sent = True
            _commit_unexpired(session)
        else:
            self.commit_sent = True
            session.commit()
        for outer in _calls.get():  # an outer call cannot run again: this part is committed
            outer.is_alone = False

    def _roll_back(self, session: Session, error: BaseException) -> None:
        # a hook may have committed the objects that were made before it
        self.is_alone &= session.get_transaction() is self.transaction
        is_transient = self.tracker.engines.is_transient(error)
        is_lost = self.may_run_again and is_transient
        is_of_sql = isinstance(error, (OperationalError, ProgrammingError)) and not is_transient
        if is_of_sql and self.made:
            _note_missing_tables(error, session, self.made[-1])
        if not self.tracker.owns_session and not is_lost:
            return  # the caller may want to keep the earlier part of the transaction
        on_transient = lambda _session, instance: self.expelled.append(instance)  # noqa: E731 -- to be removed again
        if is_lost:
            event.listen(session, "persistent_to_transient", on_transient)
        try:
            session.rollback()
        except Exception as failure:  # noqa: BLE001 -- the test's own error must surface
            text = text_of(failure, repr)
            add_note(error, f"Afterwards the session could not be rolled back: {text}")
        finally:
            if is_lost:
                event.remove(session, "persistent_to_transient", on_transient)


def _note_missing_tables(error: BaseException, session: Session, instance: Any) -> None:
    """Add to the error of a flush the tables of an object that the database does not have."""
    mapper = inspect(instance).mapper
    with suppress(SQLAlchemyError):
        bind = session.get_bind(mapper)
        if not isinstance(bind, sa.Engine):
            return  # a Connection is in the transaction that failed
        if not dialect_for(bind).has_answered(error):
            return  # a server that is not there would be waited for once more
        inspector = inspect(bind)
        translate = bind.get_execution_options().get("schema_translate_map") or {}
        missing = [
            table.fullname
            for table in mapper.tables
            if not inspector.has_table(table.name, translate.get(table.schema, table.schema))
        ]
        if missing:
            add_note(
                error,
                f"tidyrows: the database has no table {', '.join(missing)}. Create the tables "
                f"first, as with Base.metadata.create_all(engine), or bind the tracker to the "
                f"database that has them",
            )


def _is_begun_by_hand(session: Session) -> bool:
    """Whether the caller began the transaction, so that only the caller may commit it."""
    transaction = session.get_nested_transaction() or session.get_transaction()
    return transaction is not None and transaction.origin is not SessionTransactionOrigin.AUTOBEGIN


def innermost_call() -> Call | None:
    """The innermost running call of this context, of any tracker."""
    calls = _calls.get()
    return calls[-1] if calls and calls[-1].running else None


def running_call(tracker: ResourceTracker) -> Call | None:
    """The running call that will commit this tracker's session."""
    for call in _calls.get():
        if call.tracker is tracker and call.running:
            return call
    return None


# -- in a task, which cannot load an attribute later ----------------------------------------------


def _commit_unexpired(session: Session) -> None:
    """Commit, and keep attributes loaded."""
    usual, session.expire_on_commit = session.expire_on_commit, False
    try:
        session.commit()
    finally:
        session.expire_on_commit = usual


def _load_attributes(made: Iterable[Any]) -> None:
    """Load what the database filled in, and the relationships between these objects."""
    objects = {id(instance): instance for instance in made}
    for instance in objects.values():
        state: InstanceState[Any] = inspect(instance)
        if not state.persistent or state.session is None:
            continue
        columns = state.expired_attributes & set(state.mapper.column_attrs.keys())
        if columns:
            state.session.refresh(instance, columns)
        for relationship in state.mapper.relationships:
            for other in _values(state.dict.get(relationship.key)):
                if id(other) in objects:
                    for inverse in relationship._reverse_property:  # noqa: SLF001 -- no public name tells both of back_populates and backref
                        if inverse.lazy != "write_only":
                            getattr(other, inverse.key)


_LOADED_BY_NOBODY = {"write_only", "dynamic", "raise", "raise_on_sql", "noload"}


def _fill_relationships(session: Session, filled: set[sa.Table], made: Iterable[Any]) -> None:
    """Load each relationship of a new object, without a statement where no row can be found.

    Args:
        session: in the transaction that inserted the objects.
        filled: the tables that got rows in this transaction.
        made: new objects, and those that get_or_create found, which may have many rows.
    """
    new: Any = getattr(session.get_transaction(), "_new", ())  # no public name
    for instance in made:
        state: InstanceState[Any] = inspect(instance)
        for relationship in state.mapper.relationships if state in new else ():
            key = relationship.key
            if key in state.dict or relationship.lazy in _LOADED_BY_NOBODY:
                continue
            if _is_empty(relationship, filled):
                set_committed_value(instance, key, () if relationship.uselist else None)
            else:
                getattr(instance, key)


def _is_empty(relationship: RelationshipProperty[Any], filled: set[sa.Table]) -> bool:
    """Whether no row can refer to a new object: none before this transaction, and none in it."""
    if relationship.direction is RelationshipDirection.MANYTOONE or relationship.viewonly:
        return False
    secondary = relationship.secondary
    tables = set(relationship.mapper.tables) if secondary is None else {secondary}
    return tables.isdisjoint(filled) and all(
        any(key.column is local for key in remote.foreign_keys)
        for local, remote in relationship.synchronize_pairs
    )


def _values(value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, (list, set, tuple)):
        return list(value)
    return list(value.values()) if isinstance(value, dict) else [value]
