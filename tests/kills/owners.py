"""The owners in a ledger, seen from outside, and the end of their locks."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import sqlalchemy as sa

from kills.tables import LEDGER
from tidyrows.dialects import dialect_for
from tidyrows.dialects.mysql.locks import lock_name
from tidyrows.dialects.sqlite.locks import lock_file


def number_of(engine: sa.Engine, pid: int) -> int:
    """The number of a process's lock."""
    asked = sa.text(f"SELECT maker, body FROM {LEDGER} WHERE kind = 'owner'")
    with engine.connect() as connection:
        owners = {json.loads(body)["pid"]: maker for maker, body in connection.execute(asked)}
    return int(owners[pid], 16)


def is_alive(engine: sa.Engine, number: int) -> bool:
    """Whether somebody holds the lock."""
    with engine.connect() as connection:
        return bool(dialect_for(engine).is_alive(connection, number))


def entries(engine: sa.Engine) -> list[str]:
    """All that is entered, but for the ledger's own rows."""
    asked = sa.text(f"SELECT * FROM {LEDGER} WHERE maker <> 'tidyrows'")
    with engine.connect() as connection:
        return [str(row) for row in connection.execute(asked)]


def free_lock(engine: sa.Engine, number: int) -> None:
    """End the connection that holds a lock; on SQLite delete its file."""
    if engine.dialect.name == "sqlite":
        lock_file(str(Path(str(engine.url.database)).resolve()), number).unlink()
        return
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            high, low = divmod(number, 2**32)
            asked = (
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE locktype = 'advisory'"
                f" AND classid = {high} AND objid = {low}"
            )
            assert connection.exec_driver_sql(asked).scalar_one()
        else:
            asked = f"SELECT IS_USED_LOCK({lock_name(number)})"
            holder = connection.exec_driver_sql(asked).scalar_one()
            connection.exec_driver_sql(f"KILL {holder}")
            pause = threading.Event()
            for _ in range(1000):  # it takes effect a little later
                if connection.exec_driver_sql(asked).scalar_one() != holder:
                    break
                pause.wait(0.01)
