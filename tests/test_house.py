"""The house holds: imports point downwards, and only dialects/ asks which database it is."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from harness import house
from harness.leftover_causes import leftover_causes

SOURCE = Path(__file__).parent.parent / "src" / "tidyrows"
NONE_KNOWN = house.Known()
CIRCLE = (
    "import circle: tidyrows.cleanup.first -> tidyrows.cleanup.second -> tidyrows.cleanup.first"
)


def test_the_house_holds():
    assert house.violations(SOURCE) == []


@pytest.fixture
def planted(tmp_path):
    """A house of empty rooms, and a way to add a module to it."""
    root = tmp_path / "tidyrows"
    for room in ("schema", "dialects", "tracking", "cleanup", "factories", "testing", "worker"):
        (root / room).mkdir(parents=True)
        (root / room / "__init__.py").write_text("")

    def plant(path, code, known=NONE_KNOWN):
        file = root / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
        return house.violations(root, known)

    return plant


def test_a_fault_in_the_real_tree_is_found(tmp_path):
    root = tmp_path / "tidyrows"
    shutil.copytree(SOURCE, root, ignore=shutil.ignore_patterns("__pycache__"))
    with (root / "keys.py").open("a") as rows:
        rows.write("\nfrom tidyrows.schema import ForeignKeyGraph\n")
    assert any("upward, floor 0 to 1" in found for found in house.violations(root))


@pytest.mark.parametrize(
    ("path", "code", "said"),
    [
        ("schema/planted.py", "from tidyrows.tracking import capture", "upward, floor 1 to 6"),
        ("schema/planted.py", "import tidyrows.cleanup.plan", "upward, floor 1 to 7"),
        ("schema/planted.py", "from ..tracking.capture import x", "upward, floor 1 to 6"),
        ("schema/planted.py", "from .. import tracking", "upward, floor 1 to 6"),
        ("schema/planted.py", "def f():\n    import tidyrows.factories", "upward, floor 1 to 9"),
        (
            "tracking/planted.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tidyrows import cleanup",
            "upward, floor 6 to 7",
        ),
        ("schema/planted.py", "from tidyrows.dialects import base", "upward, floor 1 to 2"),
        ("schema/planted.py", "from tidyrows import retry", "upward, floor 1 to 3"),
        ("cleanup/planted.py", "import tidyrows.transaction_retry", "sideways on floor 7"),
        ("worker/planted.py", "from tidyrows import template", None),
        ("dialects/planted.py", "from tidyrows.schema import graph", None),
        ("../pytest_tidyrows.py", "import pytest\nfrom tidyrows import testing", None),
        ("../pytest_tidyrows.py", "import factory", "only factories may"),
        ("tracking/planted.py", "from tidyrows import TrackedFactory", "facade"),
        ("cleanup/planted.py", "import networkx as nx", "only schema may"),
        ("cleanup/planted.py", "import tenacity", "only retry may"),
        ("tracking/planted.py", "from factory.alchemy import x", "only factories may"),
        ("worker/planted.py", "from faker import Faker", "only factories may"),
        ("cleanup/planted.py", "import psycopg.errors", "only dialects may"),
        ("tracking/planted.py", "import pytest", "only testing may"),
        ("tracking/planted.py", "import requests", "no room has this dependency"),
        ("cleanup/planted.py", "from tidyrows.dialects import mysql as m", None),
        ("cleanup/planted.py", "from tidyrows.dialects.mysql import m", "knows the databases"),
        ("cleanup/planted.py", "import sqlalchemy.dialects.mysql as m", "knows the databases"),
        ("cleanup/planted.py", "f = lambda e: e.dialect.name", "dialect.name"),
        ("cleanup/planted.py", "f = lambda dialect: dialect.name", "dialect.name"),
        ("cleanup/planted.py", "f = lambda u: u.get_backend_name()", "get_backend_name"),
        ("cleanup/planted.py", "f = lambda name: name == 'PostgreSQL'", "names a database"),
        ("cleanup/planted.py", "f = lambda name: name in {'x', 'sqlite+aio'}", "names a database"),
        ("cleanup/planted.py", "is_mysql = True", "names a database"),
        ("utils.py", "", "says nothing"),
        ("cleanup/_helpers.py", "", "says nothing"),
        ("attic/__init__.py", "", "stands on no floor"),
        ("schema/planted.py", "from tidyrows.schema import planted", None),
    ],
)
def test_a_planted_fault_is_found(planted, path, code, said):
    found = planted(path, code)
    if said is None:
        assert not [line for line in found if "planted" not in line]
    else:
        assert len(found) == 1, found
        assert said in found[0]


@pytest.mark.parametrize(
    "code",
    [
        "import tidyrows.cleanup.first",
        "from . import first",
        "def later():\n    from tidyrows.cleanup.first import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .first import X",
    ],
)
def test_a_circle_of_modules_is_found(planted, code):
    planted("cleanup/first.py", "from tidyrows.cleanup import second")
    assert planted("cleanup/second.py", code) == [CIRCLE]


def test_a_circle_of_rooms_is_found_though_no_modules_make_one(planted):
    planted("worker/first.py", "import tidyrows.template.second")
    planted("template/__init__.py", "")
    planted("template/second.py", "")
    assert planted("template/third.py", "import tidyrows.worker.fourth\n") == []
    planted("worker/fourth.py", "")
    found = planted("template/third.py", "import tidyrows.worker.fourth")
    assert found == ["circle of rooms: template -> worker -> template"]


def test_a_known_circle_may_stay_but_not_grow(planted):
    planted("cleanup/first.py", "import tidyrows.cleanup.second")
    known = house.Known(circles=("cleanup.first cleanup.second",))
    assert planted("cleanup/second.py", "import tidyrows.cleanup.first", known) == []
    planted("cleanup/third.py", "import tidyrows.cleanup.first", known)
    code = "import tidyrows.cleanup.first\nimport tidyrows.cleanup.third"
    assert planted("cleanup/second.py", code, known) == [
        CIRCLE.replace("circle:", "circle (of 3):")
    ]


def test_a_known_import_against_the_floors_may_stay(planted):
    known = house.Known(imports=frozenset({("tracking", "cleanup")}))
    planted("cleanup/planted.py", "import tidyrows.tracking", known)
    assert planted("tracking/planted.py", "import tidyrows.cleanup", known) == []


def test_a_known_fault_that_is_mended_is_removed_from_the_list(planted):
    known = house.Known(
        rooms={"rows": 0},
        imports=frozenset({("tracking", "cleanup")}),
        circles=("cleanup.first cleanup.second",),
    )
    planted("cleanup/first.py", "")
    assert planted("cleanup/second.py", "import tidyrows.cleanup.first", known) == [
        "KNOWN.rooms: rows is gone; remove it",
        "KNOWN.imports: ('tracking', 'cleanup') is mended; remove it",
        "KNOWN.circles: in no circle any more: tidyrows.cleanup.first tidyrows.cleanup.second",
    ]


@pytest.mark.parametrize(
    "code",
    [
        '"""PostgreSQL does this, sqlite3 that."""',
        'class A:\n    x: int\n    """Not on mysql."""',
        'raise ValueError("SQLite keeps nothing in memory: use a file")',
        "from tidyrows import errors\nfrom tidyrows.dialects import dialect_for\nimport sqlalchemy",
        "from __future__ import annotations\nimport collections.abc\nfrom . import plan",
        "f = lambda table: table.name",
    ],
)
def test_what_is_allowed_is_allowed(planted, code):
    assert planted("cleanup/planted.py", code) == []


def test_the_causes_of_leftovers_are_counted_where_their_text_is_made(tmp_path):
    """Not where a text is handed on, nor a text that is the cause of nothing."""
    (tmp_path / "planted.py").write_text(
        textwrap.dedent("""
            SILENT = "nothing was raised"

            class Leftover:
                table: str
                cause: str

            class Left:
                @property
                def cause(self):
                    return "locked" if self.locked else f"kept by {self.by}"

            def tried(rows) -> str | None:
                if not rows:
                    return None
                return f"refused: {rows}"

            def left(table, cause):
                raise ValueError("another text")
                return Leftover(table, cause)

            def clean(rows, error):
                causes = dict.fromkeys(rows, SILENT)
                for key in rows:
                    causes[key] += "; seen again"
                found = tried(rows)
                left("a table", found or SILENT)
                return [Leftover("a table", cause) for cause in causes.values()]
        """)
    )
    found = leftover_causes(house.modules_of(tmp_path))
    assert [cause.text for cause in found] == [
        "'nothing was raised'",
        "where it is printed",
        "f'refused: {rows}'",
        "'; seen again'",
    ]


@pytest.mark.slow
def test_the_figures_of_the_house_are_counted_by_one_command(tmp_path):
    command = [sys.executable, "tests/benchmarks/house_figures.py", "--trace"]
    done = subprocess.run(
        [*command, "--url", f"sqlite:///{tmp_path / 'figures.db'}"],
        cwd=SOURCE.parents[1],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    for figure in ("lines in src/", "circles of rooms", "the cause of a leftover", "with a ledger"):
        assert figure in done.stdout
    assert "TrackedFactory._generate" in done.stdout
    assert "CleanupManager.__exit__" in done.stdout
