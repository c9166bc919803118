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
from sqlalchemy.orm import SessionTransactionOrigin

from tidyrows.dialects import dialect_for
from tidyrows.errors import add_note, text_of
from tidyrows.factories.loading import fill_relationships, is_new, load_attributes
from tidyrows.greenlets import in_greenlet

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session, SessionTransaction

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
            if session is not None and self.commits:
                if self.tracker.owns_session or not _is_begun_by_hand(session):
                    self._commit(session)
                elif in_greenlet():
                    session.flush()
                    self.load(self.made)
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

    def load(self, made: list[Any]) -> None:
        """Load the attributes of objects, before their COMMIT, for a task."""
        load_attributes(made)
        new = [each for each in made if self.session and is_new(each, self.session)]
        fill_relationships(new, self.filled)

    @property
    def filled(self) -> set[sa.Table]:
        """The tables that have got rows in the transaction."""
        return {change.table.table for change in self.tracker.engines.pending_changes()}

    def _commit(self, session: Session) -> None:
        session.flush()
        if self.began_transaction:
            self.uncertain_before = self.tracker.store.uncertain_keys()
        if in_greenlet():
            self.load(self.made)
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


def _commit_unexpired(session: Session) -> None:
    """Commit, and keep attributes loaded, for a task."""
    usual, session.expire_on_commit = session.expire_on_commit, False
    try:
        session.commit()
    finally:
        session.expire_on_commit = usual
