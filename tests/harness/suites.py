"""Small suites of users, run by pytest in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from harness.bystanders import Snapshot, snapshot

MODELS = """
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


@dataclass
class Ended:
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
    """A suite of orgs and users in a folder.

    Args:
        folder: an empty one.
        engine: on the database, where a stranger's org and user stand from the beginning.
    """

    def __init__(self, folder: Path, engine: sa.Engine) -> None:
        self.folder = folder
        self.engine = engine
        names: dict[str, object] = {"__name__": "models"}
        exec(compile(MODELS, "models", "exec", dont_inherit=True), names)
        base = names["Base"]
        base.metadata.create_all(engine)  # type: ignore[attr-defined]
        with engine.begin() as connection:
            connection.exec_driver_sql("INSERT INTO orgs (id, name) VALUES (900000, 'stranger')")
            connection.exec_driver_sql(
                "INSERT INTO users (id, email, org_id) VALUES (900000, 'stranger', 900000)"
            )
        self.before = self.rows()
        self.write("models.py", MODELS)
        self.write("conftest.py", CONFTEST)

    def write(self, name: str, text: str) -> None:
        """A file of it."""
        (self.folder / name).write_text(textwrap.dedent(text), encoding="utf-8")

    def run(self, *arguments: str, every_plugin: bool = False, **environment: str) -> Ended:
        """Run it with pytest.

        Args:
            arguments: pytest's.
            every_plugin: those too that only happen to be installed; they take most of the time.
            environment: variables.
        """
        if every_plugin:
            plugins = _WITHOUT
        else:
            environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **environment}
            several = any(each.startswith("-n") for each in arguments)
            plugins = (*_ONLY, *(("-p", "xdist.plugin") if several else ()))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *plugins, *arguments],
            cwd=self.folder,
            env={**fresh_environment(), "SUITE_URL": self.url, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        return Ended(done.returncode, done.stdout + done.stderr)

    @property
    def url(self) -> str:
        """The database, with its password."""
        return self.engine.url.render_as_string(hide_password=False)

    def rows(self) -> Snapshot:
        """What is in the suite's tables; not in the ledger."""
        found = snapshot(self.engine)
        return Snapshot({name: rows for name, rows in found.items() if "ledger" not in name})
