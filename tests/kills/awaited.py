"""Rounds of a worker over an asynchronous engine, with a ledger's owner of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from harness.asynchronous import DRIVERS
from kills.acts import BULK
from kills.tables import Currency, Note, Seat, Token
from storm import shop
from tidyrows import CleanupManager, Ledger, ResourceTracker
from tidyrows.dialects import Fault


def cleaned(marks: Any, ledger: Ledger, acts: Callable[..., Any], limit: int) -> None:
    """A round that cleans up."""
    asyncio.run(_round(marks, ledger.engine, acts, limit))


async def _round(marks: Any, reached: sa.Engine, acts: Callable[..., Any], limit: int) -> None:
    url = reached.url
    (driver, *_) = DRIVERS[url.get_backend_name()]
    engine = create_async_engine(url.set(drivername=driver))
    if reached.dialect.name == "sqlite":
        sa.event.listen(engine.sync_engine, "connect", _enforce)
    marks.listen(engine.sync_engine)
    ledger = Ledger(engine)
    tracker = ResourceTracker(engine, ledger=ledger)
    cleanup = CleanupManager(tracker, rows_per_transaction=limit)
    async with cleanup:
        marks.phase(b"c")
        maker = acts(tracker=tracker)
        made = await asyncio.gather(*(each(engine, maker) for each in ACTS), return_exceptions=True)
        for error in made:
            if error is not None and tracker.engines.fault(error) is not Fault.TRANSIENT:
                raise error
        marks.phase(b"k")
    maker.end()
    assert not cleanup.report.already_gone, cleanup.report
    await asyncio.to_thread(ledger.close)
    await engine.dispose()


def _enforce(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


async def attached(engine: AsyncEngine, maker: Any) -> None:
    """To a bystander's row, and some that are rolled back."""
    async with AsyncSession(engine) as session:
        user = shop.User(email=f"{maker.text()}@example.test", org_id=maker.org)
        session.add_all([user, shop.Order(user=user), Note(text=maker.text())])
        await session.commit()
        session.add_all([Note(text=maker.text()), Token(text=maker.text())])
        await session.flush()
        await session.rollback()
        session.add(Token(text=maker.text()))
        await session.commit()


async def bulk(engine: AsyncEngine, maker: Any) -> None:
    """Many rows, and natural keys."""
    async with engine.begin() as connection:
        await connection.execute(sa.insert(Note), [{"text": maker.text()} for _ in range(BULK)])
        if maker.codes:
            code = {"code": maker.codes.pop(), "text": maker.text()}
            await connection.execute(sa.insert(Currency), [code])
        if maker.seats:
            seat = {"hall": maker.prefix, "number": maker.seats.pop(), "text": maker.text()}
            await connection.execute(sa.insert(Seat), [seat])


async def deleted(engine: AsyncEngine, maker: Any) -> None:
    """Through the session: nobody's any more."""
    async with AsyncSession(engine) as session:
        notes = [Note(text=maker.text()) for _ in range(3)]
        session.add_all(notes)
        await session.commit()
        for note in notes[1:]:
            await session.refresh(note)
            await session.delete(note)
        await session.commit()


ACTS = (attached, bulk, deleted)
