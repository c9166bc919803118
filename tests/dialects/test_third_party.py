"""A dialect of another package, found by its entry point."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import sqlalchemy as sa

from tidyrows.dialects import Dialect, dialect_for
from tidyrows.dialects.base import UnknownDialect
from tidyrows.dialects.sqlite import SQLite
from tidyrows.errors import DialectError

MODULE = """
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from tidyrows.dialects import Dialect, RealTable
from tidyrows.dialects.sqlite import SQLite

class Driver(SQLiteDialect_pysqlite):
    name = "quack"
    supports_statement_cache = True

class Quack(SQLite):
    name = "quack"

class Half(Dialect):
    name = "half"
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a package with a database "quack" and this entry point for it, and its engine."""

    def make(*values):
        (tmp_path / "quack_tidyrows.py").write_text(MODULE)
        for number, value in enumerate(values):
            info = tmp_path / f"quack_tidyrows_{number}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: quack-{number}\n")
            (info / "entry_points.txt").write_text(f"[tidyrows.dialects]\nquack = {value}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "quack_tidyrows", raising=False)
        sa.dialects.registry.register("quack", "quack_tidyrows", "Driver")
        return sa.create_engine("quack://")

    yield make
    sa.dialects.registry.impls.pop("quack", None)
    sys.modules.pop("quack_tidyrows", None)


def test_the_dialect_of_another_package_is_found(package):
    dialect = dialect_for(package("quack_tidyrows:Quack"))
    assert type(dialect).__qualname__ == "Quack"
    assert isinstance(dialect, SQLite)


def test_a_database_that_no_package_knows_has_the_careful_dialect(package):
    assert isinstance(dialect_for(package()), UnknownDialect)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["quack_tidyrows:Absent"], "cannot be loaded: AttributeError.*uninstall quack-0"),
        (["absent_module:Quack"], "cannot be loaded: ModuleNotFoundError.*uninstall quack-0"),
        (["quack_tidyrows:MODULE_NAME"], "cannot be loaded"),
        (["quack_tidyrows:Driver"], "which is no dialect. Name a subclass"),
        (["quack_tidyrows:Half"], "without begin_cleanup, driver_code, in_transaction, resolve"),
        (["quack_tidyrows:Quack", "quack_tidyrows:Half"], "is there twice. Uninstall"),
    ],
)
def test_a_broken_entry_point_is_named_with_the_next_step(package, values, words):
    engine = package(*values)
    for _again in range(2):
        with pytest.raises(DialectError, match=f"tidyrows.dialects: quack = .*{words}") as caught:
            dialect_for(engine)
    assert values[0] in caught.value.entry_point


def test_built_in_databases_need_no_look_for_entry_points(monkeypatch, engine):
    monkeypatch.setattr("tidyrows.dialects.entry_points", None)
    assert dialect_for(sa.create_engine(engine.url)).name == dialect_for(engine).name


def test_another_package_runs_the_suite(package, tmp_path):
    """From a folder of its own, with nothing of these tests."""
    package("quack_tidyrows:Quack")
    (tmp_path / "test_quack.py").write_text(
        textwrap.dedent(
            """
            import pytest
            import sqlalchemy as sa
            import quack_tidyrows
            from tidyrows.testing.dialect_suite import DialectSuite

            sa.dialects.registry.register("quack", "quack_tidyrows", "Driver")

            class TestQuack(DialectSuite):
                @pytest.fixture
                def engine(self, tmp_path):
                    engine = sa.create_engine(f"quack:///{tmp_path}/quack.db")
                    yield engine
                    engine.dispose()
            """
        )
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "test_quack.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_the_page_names_everything_that_a_dialect_may_have():
    page = (Path(__file__).parents[2] / "docs" / "dialects.md").read_text()
    members = {name for name in dir(Dialect) if not name.startswith("_")}
    assert {name for name in members if not re.search(rf"\b{name}\b", page)} == set()
    listed = {
        name
        for row in re.findall(r"^\| .+\|$", page, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert {name for name in listed if not hasattr(Dialect, name)} <= {"COMMIT", "RETURNING", "IN"}


def test_what_a_dialect_must_have_is_what_the_page_shows():
    page = (Path(__file__).parents[2] / "docs" / "dialects.md").read_text()
    shown = set(re.findall(r"^    def (\w+)", page.split("```python")[1], re.MULTILINE))
    assert shown == Dialect.__abstractmethods__
