"""Small suites of users: written into a folder, run by a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa

from harness.bystanders import Snapshot, snapshot
from harness.forks import Process

TRACKED = """
import factory
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from tidyrows import Scoped, TrackedFactory


class Base(DeclarativeBase):
    pass


class Org(Base):
    __tablename__ = "orgs"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(40), unique=True)


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(sa.String(40), unique=True)
    org_id: Mapped[int] = mapped_column(sa.ForeignKey("orgs.id"))


class OrgFactory(TrackedFactory[Org]):
    class Meta:
        model = Org

    name = Scoped("org-{tag}")


class UserFactory(TrackedFactory[User]):
    class Meta:
        model = User

    email = Scoped("user-{tag}@a.test")
    org_id = factory.LazyFunction(lambda: OrgFactory().id)
"""

PLAIN = """
import os
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

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
    with Session(engine, expire_on_commit=False) as session:
        session.add(row)
        session.commit()
    return row

def count(table):
    with engine.connect() as connection:
        return connection.scalar(sa.text(f"SELECT count(*) FROM {table}"))
"""

CONFTEST = """
import os

import pytest
import sqlalchemy as sa


@pytest.fixture(scope="session")
def tidy_engine():
    engine = sa.create_engine(os.environ["SUITE_URL"])
    yield engine
    engine.dispose()
"""


_ONLY = ("-p", "no:cacheprovider", "-p", "pytest_tidyrows")
_WITHOUT = ("-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:asyncio")


def fresh_environment() -> dict[str, str]:
    """This environment, without what tells whose run it is."""
    ours = ("PYTEST_", "TIDYROWS_", "_TIDYROWS")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


class Ended(NamedTuple):
    """How a run has ended.

    Attributes:
        code: its exit code.
        text: all that it printed.
    """

    code: int
    text: str

    @property
    def outcomes(self) -> dict[str, int]:
        """How many tests passed, failed and so on, from the last line."""
        (*_, last) = re.findall(r"^=* ?((?:\d+ \w+(?:, )?)+) in [\d.]+s", self.text, re.MULTILINE)
        return {word.rstrip("s"): int(count) for count, word in re.findall(r"(\d+) (\w+)", last)}

    @property
    def summary(self) -> list[str]:
        """The lines of our own part of the summary, but for what took long."""
        found = re.search(r"^=+ tidyrows =+\n((?:(?!=).*\n)*)", self.text, re.MULTILINE)
        lines = found[1].splitlines() if found else []
        return [line for line in lines if not re.search(r" in [\d.]+s| cleanup took ", line)]


class Suite:
    """A suite of orgs and users in a folder, on a database with a stranger's org and user.

    Args:
        folder: where its own folder is made.
        engine: on the database, where its tables are made.
        models: its ``models.py``: :data:`TRACKED` has factories, and :data:`PLAIN` an engine.

    Attributes:
        before: the rows of the strangers.
    """

    def __init__(self, folder: Path, engine: sa.Engine, models: str = TRACKED) -> None:
        self.folder = folder / "suite"
        self.folder.mkdir()
        self.engine = engine
        metadata = sa.MetaData()
        unique = models is TRACKED  # whose factories promise it
        orgs = sa.Table(
            "orgs",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("name", sa.String(40), nullable=False, unique=unique),
        )
        users = sa.Table(
            "users",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("email", sa.String(40), unique=unique),
            sa.Column("org_id", sa.ForeignKey("orgs.id"), nullable=False),
        )
        metadata.create_all(engine)
        with engine.begin() as connection:
            connection.execute(orgs.insert().values(id=900_000, name="stranger"))
            connection.execute(users.insert().values(id=900_000, email="stranger", org_id=900_000))
        self.before = self.rows()
        self.write("models.py", models)
        self.write("conftest.py", CONFTEST)

    def write(self, name: str, text: str) -> None:
        """Write a file of the suite."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")

    def append(self, name: str, text: str) -> None:
        """Add to a file of the suite."""
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(textwrap.dedent(text))

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Run ``python -m`` with these arguments in the folder, and these variables set."""
        return self._start(subprocess.Popen, *arguments, **environment)

    def _start(
        self, popen: type[subprocess.Popen[str]], *arguments: str, **environment: str
    ) -> subprocess.Popen[str]:
        return popen(
            [sys.executable, "-m", *arguments],
            cwd=self.folder,
            env={**fresh_environment(), "SUITE_URL": self.url, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> Ended:
        """As :meth:`start`, to its end."""
        return self._end(Process, *arguments, **environment)

    def _end(
        self, popen: type[subprocess.Popen[str]], *arguments: str, **environment: str
    ) -> Ended:
        process = self._start(popen, *arguments, **environment)
        try:
            text, _ = process.communicate(timeout=180)
        finally:
            process.kill()
        return Ended(process.returncode, text)

    def pytest(
        self,
        *arguments: str,
        every_plugin: bool = False,
        forked: bool = True,
        **environment: str,
    ) -> Ended:
        """Run it with pytest.

        Args:
            arguments: pytest's.
            every_plugin: those too that only happen to be installed; they take most of the time.
            forked: in processes of :mod:`harness.forks`, whose parent is another than usual.
            environment: variables.
        """
        if every_plugin:
            plugins = _WITHOUT
        else:
            environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **environment}
            several = any(each.startswith("-n") for each in arguments)
            plugins = (*_ONLY, *(("-p", "xdist.plugin") if several else ()))
        # pytest warns of modules that are imported before it
        forked = forked and not every_plugin and "asyncio" not in arguments
        popen = Process if forked else subprocess.Popen
        return self._end(popen, "pytest", "-q", *plugins, *arguments, **environment)

    @property
    def url(self) -> str:
        """The database, with its password."""
        return self.engine.url.render_as_string(hide_password=False)

    def rows(self) -> Snapshot:
        """What is in the suite's tables; not in the ledger."""
        found = snapshot(self.engine)
        return Snapshot({name: rows for name, rows in found.items() if "ledger" not in name})

    def count(self, table: str) -> int:
        """How many rows a table has."""
        with self.engine.connect() as connection:
            return connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one()
