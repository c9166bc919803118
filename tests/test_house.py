"""The house holds: imports point downwards, and only dialects/ asks which database it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness import house

SOURCE = Path(__file__).parent.parent / "src" / "tidyrows"


def test_the_house_holds():
    assert house.violations(SOURCE) == []


@pytest.fixture
def planted(tmp_path):
    """A house of empty rooms, and a way to add a module to it."""
    root = tmp_path / "tidyrows"
    for room in (
        "schema",
        "dialects",
        "tracking",
        "cleanup",
        "factories",
        "testing",
        "worker",
        "sweep",
    ):
        (root / room).mkdir(parents=True)
        (root / room / "__init__.py").write_text("")

    def plant(path, code):
        file = root / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
        return house.violations(root)

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
        ("sweep/planted.py", "from tidyrows import witness", "sideways on floor 8"),
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


def test_a_circle_of_modules_is_found(planted):
    planted("cleanup/first.py", "from tidyrows.cleanup import second")
    found = planted("cleanup/second.py", "import tidyrows.cleanup.first")
    assert found == [
        "import circle: tidyrows.cleanup.first -> tidyrows.cleanup.second -> tidyrows.cleanup.first"
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
