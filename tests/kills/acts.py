"""Every way in which a worker makes rows, each with its COMMIT."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.pool import NullPool

from kills.files import FILE
from kills.tables import (
    OTHER,
    Currency,
    Node,
    Note,
    Pin,
    Seat,
    Token,
    free,
    log_lines,
    other_notes,
)
from storm import shop
from tidyrows import ResourceTracker, UntrackedRowsWarning
from tidyrows.dialects import Fault, dialect_for

BULK = 200


class Maker:
    """One round of one worker.

    Args:
        engine: what is tracked.
        tracker: the round's.
        rng: what it draws from.
        prefix: the worker's own, for names and natural keys.
        folder: where external files go.
        org: a bystander's.
        schema: the real name of the other schema; None where there is none.
        say: tells the parent; see ``children.MARKS``.
    """

    def __init__(
        self,
        engine: sa.Engine,
        *,
        tracker: ResourceTracker,
        rng: random.Random,
        prefix: str,
        folder: str,
        org: int,
        schema: str | None,
        say: Callable[[bytes], None],
    ) -> None:
        self.engine, self.tracker, self.rng = engine, tracker, rng
        self.prefix, self.folder, self.org, self.say = prefix, folder, org, say
        self.schema = schema
        self.session = orm.Session(engine)
        self.unheard = sa.create_engine(engine.url, poolclass=NullPool)
        with self.unheard.connect() as connection:  # kept rows have theirs
            self.codes, seats = free(connection, [prefix])
        self.seats = [number for _hall, number in seats]
        rng.shuffle(self.codes)
        self.dialect = dialect_for(engine)

    def some(self, count: int) -> None:
        """So many acts, drawn; one that falls victim to a deadlock has made nothing."""
        for act in self.rng.sample(ACTS, count):
            try:
                act(self)
            except sa.exc.DBAPIError as error:
                if self.dialect.fault(error) is not Fault.TRANSIENT:
                    raise
                self.session.rollback()
        self.session.close()

    def end(self) -> None:
        """Close what it opened."""
        self.session.close()
        self.unheard.dispose()

    def text(self) -> str:
        """Something that says whose."""
        return f"{self.prefix} {self.rng.randrange(10**6)}"


def factories(maker: Maker) -> None:
    boss = shop.UserFactory(tagged=True)
    shop.UserFactory(org=boss.org, manager=boss)


def batch(_maker: Maker) -> None:
    shop.OrderFactory.create_batch(2)


def attached(maker: Maker) -> None:
    """To a bystander's row."""
    user = shop.User(email=f"{maker.text()}@example.test", org_id=maker.org)
    maker.session.add_all([user, shop.Order(user=user)])
    maker.session.commit()


def savepoints(maker: Maker) -> None:
    session = maker.session
    session.add(Note(text=maker.text()))
    with session.begin_nested():
        session.add_all([Note(text=maker.text()), Token(text=maker.text())])
    nested = session.begin_nested()
    session.add_all([Note(text=maker.text()) for _ in range(3)])
    session.flush()
    nested.rollback()
    session.commit()


def rolled_back(maker: Maker) -> None:
    session = maker.session
    session.add_all([Note(text=maker.text()) for _ in range(3)])
    if maker.codes:
        session.add(Currency(code=maker.codes[-1], text=maker.text()))
    session.flush()
    session.rollback()


def bulk(maker: Maker) -> None:
    with maker.engine.begin() as connection:
        connection.execute(sa.insert(Note.__table__), [{"text": maker.text()} for _ in range(BULK)])


def keyed(maker: Maker) -> None:
    """Keys of every kind, and none, in one transaction; a line may equal a bystander's."""
    with maker.engine.begin() as connection:
        connection.execute(sa.insert(Token), [{"text": maker.text()} for _ in range(3)])
        if maker.seats:
            seat = {"hall": maker.prefix, "number": maker.seats.pop(), "text": maker.text()}
            connection.execute(sa.insert(Seat), [seat])
        if maker.codes:
            code = {"code": maker.codes.pop(), "text": maker.text()}
            connection.execute(sa.insert(Currency), [code])
        for number in range(3):
            connection.execute(sa.insert(log_lines).values(text="line", n=number))


def deleted(maker: Maker) -> None:
    """Through the session: nobody's any more, and a stranger may be given their keys."""
    session = maker.session
    mine: list[Any] = [Note(text=maker.text()) for _ in range(4)]
    code = maker.codes.pop() if maker.codes else None
    if code is not None:
        mine.append(Currency(code=code, text=maker.text()))
    session.add_all(mine)
    session.commit()
    session.add(Token(text=maker.text()))
    for each in mine[2:]:
        session.delete(each)
    session.commit()
    if code is not None:
        maker.codes.append(code)


def renamed(maker: Maker) -> None:
    if not (len(maker.codes) > 1 and maker.seats):
        return
    session = maker.session
    old, new = maker.codes.pop(), maker.codes.pop()
    currency = Currency(code=old, text=maker.text())
    seat = Seat(hall=maker.prefix, number=maker.seats[-1], text=maker.text())
    session.add_all([currency, seat])
    session.commit()
    seat.number = maker.rng.randrange(100, 10**9)
    session.commit()
    currency.code = new
    currency.text = maker.text()
    session.commit()
    maker.codes.append(old)


def told(maker: Maker) -> None:
    """Rows that are committed already are ours from the moment that ``track_rows`` returns."""
    name = maker.rng.randrange(10**9)
    with maker.unheard.begin() as connection:
        inserted = [
            connection.execute(
                sa.insert(Note.__table__).values(text=f"told {name}")
            ).inserted_primary_key[0]
            for _ in range(2)
        ]
    maker.tracker.track_rows(Note, inserted)
    # While somebody holds the ledger's lock they wait for the next COMMIT.
    waiting = any(
        maker.tracker.journals.of(name)._waiting for name in maker.tracker.journals.databases
    )
    if not waiting:
        maker.say(b"(%d)" % name)


def upserts(maker: Maker) -> None:
    """A bystander's row is found; one of ours is new only where the database can prove it."""
    orgs, currencies = shop.Org.__table__, Currency.__table__
    name = maker.engine.dialect.name
    found = {"name": f"bystander {maker.rng.randrange(5)}", "v": 0}
    both = [{"name": f"org {maker.text()}", "v": 0}, found]
    maker.rng.shuffle(both)
    same = {"v": orgs.c.v}
    again = {"code": "bystander", "text": "bystander"}
    if name in {"postgresql", "sqlite"}:
        made: Any = {"postgresql": postgresql, "sqlite": sqlite}[name].insert(orgs)
        update = made.on_conflict_do_update(index_elements=["name"], set_=same)
        nothing = made.on_conflict_do_nothing().values(both)
        if name == "postgresql":
            updates, replaces = update.values(both), nothing
        else:
            updates = update.values(found)
            replaces = sa.insert(currencies).prefix_with("OR REPLACE").values(again)
    else:
        nothing = sa.insert(orgs).prefix_with("IGNORE").values(both)
        updates = mysql.insert(orgs).on_duplicate_key_update(same).values(found)
        replaces = sa.text("REPLACE INTO currencies VALUES (:code, :text)").bindparams(**again)
    with maker.engine.begin() as connection, warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrackedRowsWarning)
        for each in maker.rng.sample([nothing, updates, replaces], 2):
            connection.execute(each)


def elsewhere(maker: Maker) -> None:
    """Under the same table's name, and with the same keys, as in the first schema."""
    if maker.schema is None:
        return
    there = maker.engine.execution_options(schema_translate_map={OTHER: maker.schema})
    with there.begin() as connection:
        connection.execute(sa.insert(other_notes).values(text=maker.text()))
        connection.execute(sa.insert(other_notes), [{"text": maker.text()} for _ in range(3)])
        connection.execute(sa.insert(Note).values(text=maker.text()))


def entangled(maker: Maker) -> None:
    """With whatever nodes there are, and with each other; one that has gone forbids it."""
    session = maker.session
    there = session.scalars(sa.select(Node.id)).all() or [None]
    session.rollback()
    nodes = [Node(text=maker.text(), next_id=maker.rng.choice(there)) for _ in range(2)]
    try:
        session.add_all(nodes)
        session.commit()
        pins = [node for node in there if node is not None][-2:]
        session.add_all(Pin(node_id=node) for node in [*pins, nodes[0].id])
        session.commit()
        there = session.scalars(sa.select(Node.id)).all()
        nodes[0].next_id = nodes[1].id
        nodes[1].next_id = maker.rng.choice(there)
        session.commit()
    except sa.exc.IntegrityError:
        session.rollback()


def external(maker: Maker) -> None:
    """A file: entered, then made; one goes after a row."""
    note = Note(text=maker.text())
    maker.session.add(note)
    maker.session.commit()
    for after in ([], [note]):
        path = Path(maker.folder) / f"{maker.prefix} {maker.rng.randrange(10**9)}"
        maker.tracker.track_external(FILE, {"path": str(path)}, after=after)
        path.touch()
    maker.session.rollback()


ACTS = (
    factories,
    batch,
    attached,
    savepoints,
    rolled_back,
    bulk,
    keyed,
    deleted,
    renamed,
    told,
    upserts,
    elsewhere,
    entangled,
    external,
)
