"""What a machine of transactions works with: three tables, and lines to the database."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from hypothesis import note
from sqlalchemy.orm import Session


def tables_for(backend: str) -> dict[str, sa.Table]:
    """Generated, natural and composite keys, and a foreign key that is checked at COMMIT."""
    metadata = sa.MetaData()

    def columns() -> list[sa.Column[Any]]:
        return [sa.Column("owner", sa.String(10), nullable=False), sa.Column("note", sa.Integer)]

    deferred: dict[str, Any] = {"deferrable": True, "initially": "DEFERRED"}
    code = sa.ForeignKey("named.code", **({} if backend == "mysql" else deferred))
    number: dict[str, Any] = {"primary_key": True, "autoincrement": False}
    sa.Table("serials", metadata, sa.Column("id", sa.Integer, primary_key=True), *columns())
    sa.Table("named", metadata, sa.Column("code", sa.String(40), primary_key=True), *columns())
    sa.Table(
        "pairs",
        metadata,
        sa.Column("a", sa.Integer, **number),
        sa.Column("b", sa.Integer, **number),
        sa.Column("code", sa.String(40), code),
        *columns(),
    )
    return dict(metadata.tables)


@dataclass
class Line:
    """One connection, perhaps with a session that has joined it.

    Lines touch no row of each other, so there is nothing that they must wait for.
    """

    number: int
    autocommit: bool = False
    connection: sa.Connection | None = None
    session: Session | None = None
    savepoints: list[Any] = field(default_factory=list)

    @property
    def owner(self) -> str:
        return f"ours {self.number}"

    @property
    def is_alone(self) -> bool:
        """Whether a session may join."""
        return self.connection is not None and self.session is None and not self.autocommit

    def doer(self, engine: sa.Engine) -> Any:
        """The session, the connection, or a new connection."""
        if self.session is not None:
            return self.session
        if self.connection is None:
            self.connection = engine.connect()
            if self.autocommit:
                self.connection.execution_options(isolation_level="AUTOCOMMIT")
        return self.connection

    def close(self) -> None:
        try:
            if self.session is not None:
                self.session.close()
        except sa.exc.SQLAlchemyError as error:
            note(f"  refused: {error}")  # DDL on the MySQL family has ended its savepoint
        if self.connection is not None:
            self.connection.close()
        self.connection = self.session = None
        self.autocommit = False
        self.savepoints.clear()
