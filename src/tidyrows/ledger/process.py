"""Who this process is in a ledger, and the proof that it lives.

An owner is dead only when its lock is free *and* its heart has stopped. A connection that drops and
is taken up again is no death, since the heart goes on; a heart that stands still for a while is
none either, since the lock is held.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import weakref
from itertools import count
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.execution import INTERNAL
from tidyrows.ledger.heartbeat import Heart
from tidyrows.ledger.id_ranges import Integers
from tidyrows.ledger.process_identity import here
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from tidyrows.ledger.table import Ledger

OWNER = "owner"
"""The kind of the row that says who an owner is, and when its heart last beat."""
_KEPT, _LEFT, _HANDED = "kept", "left", "hand"
OPTIONS = {INTERNAL: True, "schema_translate_map": None}
"""Execution options of statements about a ledger: real names, and no tracker hears them."""

_owners: weakref.WeakKeyDictionary[sa.Engine, dict[Any, Owner]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def owner_of(ledger: Ledger, *, begin: bool = True) -> Owner | None:
    """This process in a ledger, the same for all trackers of an engine.

    Args:
        ledger: the ledger.
        begin: take the lock and start the heart, where that has not been done.

    Returns:
        None where it was not begun, and was not to be.
    """
    with _lock:
        owners = _owners.setdefault(ledger.engine, {})
        place = ledger.place
        owner = owners.get(place)
        if owner is None or not owner.lives:
            if not begin:
                return None
            owner = owners[place] = Owner(ledger)
        return owner


class Owner:
    """One process in one ledger.

    Attributes:
        number: its lock's; random.
        integers: those that it has taken.
        id: the same, as the ledger's columns have it.
        pid: the process; a child that is forked is nobody until it opens the ledger itself.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.number = secrets.randbits(62) + 1
        self.id = owner_id(self.number)
        self.pid = os.getpid()
        self._entries = count(1)
        self._scopes = count(1)
        self.integers = Integers()
        self._heart: Heart | None = None
        if not ledger.is_private:
            self._heart = self._started(ledger)

    @property
    def lives(self) -> bool:
        """Whether it is this very process, with its heart beating."""
        if self.pid != os.getpid():
            return False
        return self._heart is None or self._heart.is_running

    def entry(self) -> int:
        """The number of its next entry: in the order of the COMMITs that it has to do with."""
        return next(self._entries)

    def scope(self) -> int:
        """The number of its next tracker."""
        return next(self._scopes)

    def close(self) -> None:
        """Stop the heart and free the lock."""
        if self._heart is not None and self.pid == os.getpid():
            self._heart.stop()

    def _started(self, ledger: Ledger) -> Heart:
        dialect, me, number = ledger.dialect, self.id, self.number
        table: sa.Table
        # Weakly: the heart must not keep the engine, whose end is its own.
        this, begun = weakref.ref(self), weakref.ref(ledger)

        def began(connection: sa.Connection) -> None:
            nonlocal table
            owner, ledger = this(), begun()
            if owner is None or ledger is None:
                return
            ledger.check(connection)
            table = ledger.table_on(connection)
            row = ledger.row(
                owner, 0, 0, OWNER, json.dumps(here()), context=WorkerContext.current()
            )
            ledger.insert(connection, [row])

        def beat(connection: sa.Connection) -> None:
            clock: sa.ColumnElement[float] = sa.literal_column(dialect.clock)
            alive = sa.update(table).where(table.c.maker == me, table.c.seq == 0)
            connection.execute(alive.values(written=clock), execution_options=OPTIONS)

        def ended(connection: sa.Connection) -> None:
            if not forget_owner(connection, table, me):
                over = sa.update(table).where(table.c.maker == me, table.c.seq == 0)
                body = json.dumps({**here(), "ended": True})
                connection.execute(over.values(body=body), execution_options=OPTIONS)

        heart = Heart(
            ledger.engine,
            dialect.life(ledger.engine, number),
            began=began,
            beat=beat,
            ended=ended,
            every=ledger.beat,
        )
        with ledger.naming_rights():
            heart.start()
        return heart


def owner_id(number: int) -> str:
    """How the ledger's columns name the owner of a lock."""
    return f"{number:016x}"


def kept_id() -> str:
    """The owner of rows that are kept for study: nobody's process, so no lock is ever its."""
    return f"{_KEPT}{secrets.token_hex(6)}"


def left_id() -> str:
    """The owner of what a sweep could not delete: nobody, so the next sweep takes it."""
    return f"{_LEFT}{secrets.token_hex(6)}"


def handed_id() -> str:
    """The owner of rows that a worker has handed to its controller: nobody, who dies if not met."""
    return f"{_HANDED}{secrets.token_hex(6)}"


def is_handed(owner: str) -> bool:
    """Whether a worker has handed it to its controller."""
    return owner.startswith(_HANDED)


def is_left(owner: str) -> bool:
    """Whether a sweep left it."""
    return owner.startswith(_LEFT)


def is_kept(owner: str) -> bool:
    """Whether rows are kept for study."""
    return owner.startswith(_KEPT)


def forget_owner(connection: sa.Connection, table: sa.Table, owner: str) -> bool:
    """Take an owner's own row out, once no entry is its any more; whether that is so."""
    left = sa.select(sa.func.count()).where(table.c.maker == owner, table.c.seq > 0)
    if connection.execute(left, execution_options=OPTIONS).scalar_one():
        return False
    row = sa.delete(table).where(table.c.maker == owner, table.c.seq == 0)
    connection.execute(row, execution_options=OPTIONS)
    return True
