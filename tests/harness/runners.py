"""Small suites that are written into a folder and run by a process of their own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import sqlalchemy as sa

from harness.databases import Database
from harness.suites import fresh_environment

MODELS = """
import os
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

class Base(DeclarativeBase):
    pass

class Org(Base):
    __tablename__ = "orgs"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(40))

class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    org_id: Mapped[int] = mapped_column(sa.ForeignKey("orgs.id"))

engine = sa.create_engine(os.environ["SUITE_URL"])

def add(row):
    from sqlalchemy.orm import Session
    with Session(engine, expire_on_commit=False) as session:
        session.add(row)
        session.commit()
    return row

def count(table):
    with engine.connect() as connection:
        return connection.scalar(sa.text(f"SELECT count(*) FROM {table}"))
"""


class Suite:
    """A folder with models, on a database that has a stranger's org and user.

    Args:
        folder: where.
        database: with the two tables, made here.
    """

    def __init__(self, folder: Path, database: Database) -> None:
        self.folder = folder / "suite"
        self.folder.mkdir()
        self.url = database.url.render_as_string(hide_password=False)
        self.outside = database.engine()
        self.write("models.py", MODELS)
        with self.outside.begin() as connection:
            for key in ("users", "orgs"):
                connection.exec_driver_sql(f"DROP TABLE IF EXISTS {key}")
        metadata = sa.MetaData()
        orgs = sa.Table(
            "orgs",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("name", sa.String(40), nullable=False),
        )
        users = sa.Table(
            "users",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("org_id", sa.ForeignKey("orgs.id"), nullable=False),
        )
        metadata.create_all(self.outside)
        with self.outside.begin() as connection:
            connection.execute(orgs.insert().values(name="a stranger's"))
            connection.execute(users.insert().values(org_id=1))

    def write(self, name: str, text: str) -> None:
        """Write a file of the suite."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Run ``python -m`` with these."""
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=self.folder,
            env={**fresh_environment(), "SUITE_URL": self.url, "PYTHONPATH": str(self.folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        """As :meth:`start`, to its end: its exit code and what it said."""
        process = self.start(*arguments)
        try:
            said, _ = process.communicate(timeout=120)
        finally:
            process.kill()
        return process.returncode, said

    def left(self) -> dict[str, list[int]]:
        """The keys in both tables."""
        with self.outside.connect() as connection:
            return {
                table: list(connection.scalars(sa.text(f"SELECT id FROM {table} ORDER BY id")))
                for table in ("orgs", "users")
            }


STRANGERS = {"orgs": [1], "users": [1]}
