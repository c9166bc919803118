"""The house as its imports build it: who may stand on whom.

Reads source only, so that it can be shown a tree with a planted fault.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx as nx

PACKAGE = "tidyrows"
FACADE = "__init__"

FLOORS = {
    room: floor
    for floor, rooms in enumerate(
        (
            "errors keys greenlets execution",
            "schema",
            "dialects",
            "worker template production external key_json retry",
            "capture locks connections",
            "ledger",
            "tracking",
            "cleanup transaction_retry",
            "sweep observe witness",
            "factories data isolation",
            "suite audit insights",
            "testing",
            "cli",
        )
    )
    for room in rooms.split()
}
"""Which floor each room stands on: imports point downwards, those below TYPE_CHECKING too."""

SHARED_FLOORS = {0, 3}
"""Floors of single modules, which may import each other as long as no circle comes of it."""

KNOWN = {("capture", "tracking"), ("capture", "ledger"), ("ledger", "tracking")}
"""Upward imports that are still to be mended."""

OUTSIDE = {
    "sqlalchemy": None,  # everywhere
    "networkx": "schema",
    "tenacity": "retry",
    "factory": "factories",
    "faker": "factories",
    "pytest": "testing",
    "pytest_asyncio": "testing",
    "_pytest": "testing",
    "xdist": "testing",
    "behave": "testing",
    "filelock": "testing",
    "sqlite3": "dialects",
    "aiosqlite": "dialects",
    "psycopg": "dialects",
    "psycopg2": "dialects",
    "asyncpg": "dialects",
    "greenlet": "greenlets",
    "tqdm": "cleanup",
    "pymysql": "dialects",
    "MySQLdb": "dialects",
}

NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc"}
DATABASES = re.compile(r"postgres|psycopg|mysql|mariadb|sqlite|oracle|mssql", re.IGNORECASE)
ASKING = {"get_backend_name", "get_driver_name", "get_dialect", "drivername"}


@dataclass(frozen=True)
class Module:
    """One file: its dotted parts below the package, and its tree."""

    path: Path
    parts: tuple[str, ...]
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.parts[0] if self.parts else FACADE

    @property
    def dotted(self) -> str:
        return ".".join((PACKAGE, *self.parts))

    @property
    def package(self) -> tuple[str, ...]:
        return self.parts if self.path.name == "__init__.py" else self.parts[:-1]

    def at(self, node: ast.AST, message: str) -> str:
        return f"{self.dotted}:{getattr(node, 'lineno', 0)}: {message}"


def violations(root: Path) -> list[str]:
    """Everything in the tree below ``root`` (the package's folder) that breaks a rule."""
    modules = list(modules_of(root))
    found = []
    for module in modules:
        found += _names(module)
        found += _imports(module)
        if module.room != "dialects":
            found += _questions(module)
    return [*found, *_cycles(modules)]


def modules_of(root: Path) -> Iterator[Module]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        yield Module(path, parts, ast.parse(path.read_text(encoding="utf-8")))


def _names(module: Module) -> Iterator[str]:
    if NAMELESS & {part.strip("_") for part in module.parts}:
        yield f"{module.dotted}: say what it is for; this name says nothing"
    elif module.room not in {*FLOORS, FACADE}:
        yield f"{module.dotted}: the room {module.room} stands on no floor"


def _imports(module: Module) -> Iterator[str]:
    for node, target in _imported(module):
        top, *rest = target.split(".")
        if top == PACKAGE:
            room = rest[0] if rest else FACADE
            reason = _forbidden(module.room, room)
            if reason:
                yield module.at(node, f"imports {target}: {reason}")
            if room == "dialects" and module.room != "dialects" and DATABASES.search(target):
                yield module.at(node, f"imports {target}: only dialects/ knows the databases")
        elif top in OUTSIDE:
            owner = OUTSIDE[top]
            if owner not in {None, module.room}:
                yield module.at(node, f"imports {target}: only {owner} may")
            if target.startswith("sqlalchemy.dialects.") and module.room != "dialects":
                yield module.at(node, f"imports {target}: only dialects/ knows the databases")
        elif top not in sys.stdlib_module_names:
            yield module.at(node, f"imports {target}: no room has this dependency")


def _forbidden(importer: str, imported: str) -> str | None:
    """Why a room may not import another, or None where it may."""
    if importer == FACADE:
        return "never by the package itself" if imported == "testing" else None
    if imported == FACADE:
        return "the facade stands above all rooms"
    above, below = FLOORS.get(importer), FLOORS.get(imported)
    if importer == imported or above is None or below is None:
        return None  # an unknown room is said once, by name
    if below > above and (importer, imported) not in KNOWN:
        return f"upward, floor {above} to {below}"
    if below == above and above not in SHARED_FLOORS:
        return f"sideways on floor {above}"
    return None


def _imported(module: Module, *, at_run_time: bool = False) -> Iterator[tuple[ast.AST, str]]:
    """The absolute names that a module imports, with those below ``if TYPE_CHECKING``."""
    skipped: set[int] = set()
    for node in ast.walk(module.tree):
        if id(node) in skipped:
            continue
        if at_run_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped |= {id(inner) for body in node.body for inner in ast.walk(body)}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = module.package[: len(module.package) - node.level + 1]
                base = ".".join((PACKAGE, *kept, *filter(None, [node.module])))
            for alias in node.names:
                # "from tidyrows import rows" names the room only in its second half
                yield node, _deepest(base, alias.name)


def _deepest(base: str, name: str) -> str:
    return f"{base}.{name}" if base == PACKAGE and name in FLOORS else base


def _questions(module: Module) -> Iterator[str]:
    """Code outside dialects/ that asks, or knows, which database it is talking to."""
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(module.tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    documentation |= {  # strings below attributes
        id(node.value) for node in ast.walk(module.tree) if isinstance(node, ast.Expr)
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = getattr(owner, "attr", getattr(owner, "id", ""))
            if node.attr == "name" and name.strip("_").endswith("dialect"):
                yield module.at(node, "asks for dialect.name: only dialects/ may")
            if node.attr in ASKING:
                yield module.at(node, f"asks for {node.attr}: only dialects/ may")
        for word in _words(node):
            if id(node) not in documentation and DATABASES.search(word):
                yield module.at(node, f"names a database ({word!r}): only dialects/ may")


def _words(node: ast.AST) -> Iterator[str]:
    """Identifiers and one-word strings; a sentence with spaces is a message to a person."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        if not re.search(r"\s", node.value.strip()):
            yield node.value
    elif isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name


def graph_of(modules: list[Module], *, at_run_time: bool = False) -> nx.DiGraph[str]:
    """The modules by dotted name, with an edge for each import of another one of them."""
    known = {module.dotted for module in modules}
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(sorted(known))
    for module in modules:
        for node, target in _imported(module, at_run_time=at_run_time):
            aliases = node.names if isinstance(node, ast.ImportFrom) else []
            for name in [f"{target}.{alias.name}" for alias in aliases] or [target]:
                found = name if name in known else target
                if found in known and found != module.dotted:
                    graph.add_edge(module.dotted, found)
    return graph


def rooms_of(modules: list[Module], graph: nx.DiGraph[str]) -> nx.DiGraph[str]:
    """The rooms, with an edge where a module of one imports a module of the other."""
    room = {module.dotted: module.room for module in modules}
    rooms: nx.DiGraph[str] = nx.DiGraph()
    rooms.add_nodes_from(sorted(set(room.values())))
    rooms.add_edges_from((room[a], room[b]) for a, b in graph.edges if room[a] != room[b])
    return rooms


def circles(graph: nx.DiGraph[str]) -> list[list[str]]:
    """The strongly connected components of more than one node, the largest first."""
    found = [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1]
    return sorted(found, key=lambda part: (-len(part), part))


def _cycles(modules: list[Module]) -> Iterator[str]:
    """Modules of one room that import each other in a circle when they run."""
    known = {module.dotted: module for module in modules}
    graph = {
        name: sorted({
            candidate
            for node, target in _imported(module, at_run_time=True)
            for candidate in (
                [f"{target}.{alias.name}" for alias in node.names]
                if isinstance(node, ast.ImportFrom)
                else [target]
            )
            for candidate in (candidate if candidate in known else target,)
            if candidate in known and candidate != name
        })
        for name, module in known.items()
    }  # fmt: skip  # a graph in one look
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> Iterator[str]:
        if name in path:
            yield f"import circle: {' -> '.join([*path[path.index(name) :], name])}"
        elif name not in done:
            for target in graph[name]:
                yield from walk(target, [*path, name])
            done.add(name)

    for name in graph:
        yield from walk(name, [])
