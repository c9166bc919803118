"""What docs/architecture.md names exists: modules, classes, methods, rooms and their floors."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from harness import house

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "tidyrows"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def _defined():
    """The names of all classes and functions, and of methods as ``Class.method``."""
    names = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names.add(node.name)
                names |= {
                    f"{node.name}.{getattr(each, 'name', None) or each.targets[0].id}"
                    for each in node.body
                    if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))
                    or (isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name))
                }
                names |= {
                    f"{node.name}.{each.target.id}"
                    for each in node.body
                    if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
                }
    return names


def test_every_module_that_the_page_names_exists():
    files = set(re.findall(r"\b([a-z_]+/(?:[a-z_]+/)?[a-z_]+\.py)\b", PAGE))
    assert len(files) > 15
    missing = [f for f in files if not (SOURCE / f).exists() and not (ROOT / f).exists()]
    missing = [f for f in missing if not any(ROOT.glob(f"*/{f}"))]
    assert missing == []


def test_every_class_and_method_that_the_page_names_exists():
    named = set(re.findall(r"`([A-Z]\w+(?:\.\w+)?)(?:\([^`]*\))?`", PAGE))
    ours = _defined()
    foreign = {"UserFactory", "FLOORS", "TYPE_CHECKING"}
    assert sorted(named - ours - foreign) == []


def test_the_rooms_stand_on_the_floors_that_the_page_gives():
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", PAGE, flags=re.MULTILINE)
    shown = {
        room: int(floor) for floor, rooms in rows for room in re.findall(r"`([a-z_]+)/?`", rooms)
    }
    outside = {"__init__", "__pycache__", "py"}
    real = {path.stem for path in SOURCE.iterdir()} - outside
    assert shown == {room: house.FLOORS[room] for room in real}
