"""What type checkers say of a tracked factory, of the factories room, and of the README."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

api = pytest.importorskip("mypy.api", reason="mypy is not installed")

SNIPPET = """\
from typing import Any

import factory
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from tidyrows import CleanupManager, with_retries
from tidyrows.factories import Scoped, ScopedEmail, ScopedInteger, Setup, TrackedFactory
from tidyrows.tracking.tracker import ResourceTracker


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]


class UserFactory(TrackedFactory[User]):
    class Meta:
        model = User

    id = ScopedInteger(start=100)
    email = ScopedEmail("user")
    name = Scoped("user-{tag}")


class AdminFactory(UserFactory):
    class Meta:
        strategy = "build"


class Users(Setup):
    first = Setup.one(UserFactory)
    others = Setup.many(UserFactory, 2, name=first)


def check(tracker: ResourceTracker, values: dict[str, Any]) -> None:
    reveal_type(UserFactory())
    reveal_type(UserFactory(email="x", **values))
    reveal_type(AdminFactory())
    reveal_type(UserFactory.create(email="x"))
    reveal_type(UserFactory.create_batch(3, email="x"))
    reveal_type(UserFactory.build())
    reveal_type(UserFactory.build_batch(3))
    reveal_type(UserFactory.scoped_to(tracker)())
    reveal_type(UserFactory.scoped_to(tracker).create(email="x"))
    reveal_type(UserFactory.scoped_to(tracker).create_batch(3))
    reveal_type(UserFactory.scoped_to(tracker).build())
    reveal_type(UserFactory.scoped_to(tracker).build_batch(3))
    reveal_type(UserFactory.using(Session()).create())
    with CleanupManager(tracker) as cleanup:
        pass
    reveal_type(cleanup.report)
    reveal_type(Users.create(others=3).first)
    reveal_type(Users.create().others)


def pay(session: Session) -> str:
    return "paid"


@with_retries(Session())
def pay_some(session: Session, amount: int, to: str = "") -> str:
    return "paid"


reveal_type(with_retries(Session(), pay))
reveal_type(pay_some)
with_retries(Session(), lambda session: None, retries=3)  # type: ignore[call-overload]
CleanupManager(ResourceTracker(Session()), protects=[User])  # type: ignore[call-arg]


async def check_async(tracker: ResourceTracker) -> None:
    reveal_type(await UserFactory.create_async(email="x"))
    reveal_type(await UserFactory.create_batch_async(3))
    reveal_type(await UserFactory.scoped_to(tracker).create_async())
    reveal_type(await UserFactory.scoped_to(tracker).create_batch_async(3))
    reveal_type(await tracker.run_sync(lambda tracker, number: number, 7))
"""

REPORT = "tidyrows.cleanup.report.CleanupReport"
PAY_SOME = "def (amount: int, to: str =) -> str"
ONE, MANY = "snippet.User", "list[snippet.User]"
REVEALED = [ONE, ONE, ONE, ONE, MANY, ONE, MANY, ONE, ONE, MANY, ONE, MANY, ONE]
REVEALED += [REPORT, ONE, MANY, "str", PAY_SOME, ONE, MANY, ONE, MANY, "int"]


README = (Path(__file__).parent.parent.parent / "README.md").read_text()
CALLS = """
from typing import assert_type

assert_type(UserFactory(), User)
assert_type(UserFactory.create(name="x"), User)
assert_type(UserFactory.create_batch(3), list[User])
"""


@pytest.fixture
def files(tmp_path):
    snippet, readme = tmp_path / "snippet.py", tmp_path / "readme.py"
    snippet.write_text(SNIPPET)
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    readme.write_text(block[1] + CALLS)
    return snippet, readme


def test_every_call_of_a_factory_is_typed_as_its_model_and_the_readme_has_no_error(files):
    # With mypy's own cache: CI has just filled it.
    output, errors, status = api.run(["--strict", "--no-error-summary", *map(str, files)])
    said = [line for line in output.splitlines() if "snippet.py" in line]
    assert [line.partition("is ")[2].strip('"') for line in said] == REVEALED, output
    assert not errors
    assert status == 0, output


@pytest.mark.soak
def test_pyright_agrees_on_the_readme(files):
    pyright = shutil.which("pyright")
    if pyright is None:
        pytest.skip('pyright is not at hand: `pip install "pyright[nodejs]"`')
    ended = subprocess.run(
        [pyright, "--pythonpath", sys.executable, files[1]],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.stdout.startswith("0 errors"), ended.stdout
