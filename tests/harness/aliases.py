"""The names that the library's SQL gives to tables, columns and subqueries, found in its source.

A name that is not anonymous and does not begin with ``tidyrows_`` may be the name of a user's
table: :mod:`tidyrows.dialects.keys` says what to write instead.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PREFIX = "tidyrows_"
_NAMING = {
    "alias",
    "cte",
    "subquery",
    "lateral",
    "label",
    "tablesample",
    "aliased",
    "render_derived",
}
"""SQLAlchemy's methods and functions whose first or only text is a name."""
_CAST = re.compile(r"\b(?:CAST|convert)\((?:[^()]|\([^()]*\))*\)", re.IGNORECASE)
# A placeholder that stands for a table, not for the schema in front of a catalogue's table.
_TABLE = re.compile(r"(?:\b|_)(?:FROM|JOIN|USING|INTO|UPDATE)\s+\(?\{\}(?!\.\w)")
_NAMED = re.compile(r"(?:\)|\{\})\s+(?:AS\s+(?P<said>(?!SELECT\b)\w+)|(?P<bare>[a-z_]\w*))")
_WITH = re.compile(r"\bWITH\s+(?:RECURSIVE\s+)?(?P<said>\w+)\s+(?:\([^)]*\)\s+)?AS\b")


def named_aliases(root: Path) -> list[str]:
    """Every alias below ``root`` that has a name of its own, as ``file:line: name``."""
    return [
        f"{path.relative_to(root)}:{line}: {name}"
        for path in sorted(root.rglob("*.py"))
        if not path.match("testing/dialect_*.py")  # tests with tables of their own
        for line, name in _aliases(ast.parse(path.read_text(encoding="utf-8")))
        if not name.startswith((PREFIX, "{}"))
    ]


def _aliases(tree: ast.Module) -> Iterator[tuple[int, str]]:
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
             for part in node.values}  # fmt: skip  # texts that are part of a longer one
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for given in _names_in(node):
                name = _text(
                    constants.get(given.id, given) if isinstance(given, ast.Name) else given
                )
                if name:
                    yield node.lineno, name
        elif id(node) not in inner and (sql := _text(node)) is not None:
            yield from ((node.lineno, name) for name in _names_of(sql))


def _names_in(call: ast.Call) -> Iterator[ast.expr]:
    """What a call of SQLAlchemy gives for a name."""
    method = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if method in _NAMING:
        yield from call.args
    if method in {*_NAMING, "table_valued", "values"}:
        yield from (each.value for each in call.keywords if each.arg == "name")


def _text(node: ast.AST) -> str | None:
    """A string, with ``{}`` for what an f-string or ``format`` puts in; None for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "{}" for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{\w*\}", "{}", node.value)
    return None


def _names_of(sql: str) -> Iterator[str]:
    """The names that a piece of SQL gives, if it names a user's table."""
    if _TABLE.search(sql):
        plain = _CAST.sub("CAST", sql)
        for found in _NAMED.finditer(plain):
            yield found["said"] or found["bare"]
        yield from (found["said"] for found in _WITH.finditer(plain))
