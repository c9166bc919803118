"""Tables in a circle of foreign keys, with names that need quotes; and processes that end."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import sqlalchemy as sa

from tidyrows.dialects import dialect_for
from tidyrows.isolation import lease, pool

METADATA = sa.MetaData()
ORGS = sa.Table(
    "orgs",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("na%me", sa.String(40), server_default="100%'", key="name"),
    sa.Column("kind", sa.Enum("big", "small", name="org_kind")),
    sa.Column("parent_id", sa.ForeignKey("orgs.id")),
    sa.Column("owner_id", sa.ForeignKey("User s.id", use_alter=True, name="fk_owner")),
)
USERS = sa.Table(
    "User s",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("org_id", sa.ForeignKey("orgs.id"), nullable=False),
)


def count(connection: sa.Connection, table: sa.Table) -> int:
    return connection.scalars(sa.select(sa.func.count()).select_from(table)).one()


def fill(engine: sa.Engine) -> None:
    """An org that is its own parent, with an owner that belongs to it."""
    with engine.begin() as connection:
        connection.execute(sa.insert(ORGS).values(id=1, kind="big", parent_id=1))
        connection.execute(sa.insert(USERS).values(id=7, org_id=1))
        connection.execute(sa.update(ORGS).values(owner_id=7))
        connection.execute(sa.text("INSERT INTO orgs (id, parent_id) VALUES (2, 1)"))


def lease_of_this_process_ends() -> None:
    """As at the end of a process."""
    for kept in lease.idle.values():
        while kept:
            kept.pop().let_go()


def members(engine: sa.Engine, level: str = "schema") -> dict[str, str | None]:
    """What was built through engines on this database, by name."""
    kind = dialect_for(engine).space_kinds[level]
    engine.connect().close()
    with kind.managing(engine).connect() as connection:
        found = kind(dialect_for(engine), engine, "tidy_x", connection).marks()
    return {name: mark for name, mark in found.items() if name.startswith(pool._prefix(engine))}


def child(url: sa.URL, work: Callable[[sa.Engine], object]) -> int:
    """Start a process that does this with an engine of its own; its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work(sa.create_engine(url))
        os._exit(0)
    except BaseException:  # noqa: BLE001 -- the parent is told
        traceback.print_exc()
    finally:
        os._exit(1)


def ended(pid: int) -> int:
    """How it ended: 0, 1 after an error, or less than 0 after a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
