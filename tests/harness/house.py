"""The house as its imports build it: who may stand on whom.

Reads source only, so that it can be shown a tree with a planted fault.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import networkx as nx

PACKAGE = "tidyrows"
FACADE = "__init__"
PLUGIN = "pytest_tidyrows"

FLOORS = {
    room: floor
    for floor, rooms in enumerate((
        "errors keys greenlets arguments locked_files private_folder",
        "schema",
        "dialects",
        "worker template production external key_json retry",
        "capture locks connections",
        "ledger",
        "tracking",
        "cleanup transaction_retry",
        "sweep observe witness",
        "factories isolation accounts",
        "suite audit insights data",
        "testing",
        "cli pytest_tidyrows",
    ))
    for room in rooms.split()
}  # fmt: skip  # a floor a line
"""The floor of each room, as in DESIGN.md, "The house". Imports point downwards only."""

SHARED_FLOORS = frozenset({0, 3})
"""Floors of single modules: they may import each other, as long as that makes no circle."""


@dataclass(frozen=True)
class Known:
    """Faults that the tree still has. Each entry must be a fault: one that is mended is removed.

    Attributes:
        rooms: old names of rooms, with the floor of their new name.
        imports: pairs of rooms; the first imports the second, against the rule of the floors.
        circles: the modules of each import circle, as house_figures.py prints them.
    """

    rooms: Mapping[str, int] = field(default_factory=dict)
    imports: frozenset[tuple[str, str]] = frozenset()
    circles: tuple[str, ...] = ()

    def floor(self, room: str) -> int | None:
        return FLOORS.get(room, self.rooms.get(room))

    def allows(self, circle: Iterable[str]) -> bool:
        return any(set(circle) <= _full_names(listed) for listed in self.circles)


KNOWN = Known()

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
    "sqlite3": "dialects",
    "aiosqlite": "dialects",
    "psycopg": "dialects",
    "psycopg2": "dialects",
    "asyncpg": "dialects",
    "greenlet": "greenlets",
    "tqdm": "cleanup",
    "yaml": "data",
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
        return PLUGIN if self.room == PLUGIN else ".".join((PACKAGE, *self.parts))

    @property
    def package(self) -> tuple[str, ...]:
        return self.parts if self.path.name == "__init__.py" else self.parts[:-1]

    def at(self, node: ast.AST, message: str) -> str:
        return f"{self.dotted}:{getattr(node, 'lineno', 0)}: {message}"


def violations(root: Path, known: Known = KNOWN) -> list[str]:
    """Everything in the tree below ``root`` (the package's folder) that breaks a rule.

    Args:
        root: the folder of the package; ``pytest_tidyrows.py`` beside it belongs to the house.
        known: the faults that are not reported, but for those that are mended.
    """
    modules = list(modules_of(root))
    graph = graph_of(modules)
    found = []
    for module in modules:
        found += _names(module, known)
        found += _imports(module, known)
        if module.room != "dialects":
            found += _questions(module)
    return [*found, *_circles(modules, graph, known), *_mended(modules, graph, known)]


def modules_of(root: Path) -> Iterator[Module]:
    """The modules of the package, and the pytest plugin beside it."""
    for path in [*sorted(root.rglob("*.py")), *root.parent.glob(f"{PLUGIN}.py")]:
        below = root if path.is_relative_to(root) else root.parent
        parts = path.relative_to(below).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        yield Module(path, parts, ast.parse(path.read_text(encoding="utf-8")))


def _names(module: Module, known: Known) -> Iterator[str]:
    if NAMELESS & {part.strip("_") for part in module.parts}:
        yield f"{module.dotted}: say what it is for; this name says nothing"
    elif module.room != FACADE and known.floor(module.room) is None:
        yield f"{module.dotted}: the room {module.room} stands on no floor"


def _imports(module: Module, known: Known) -> Iterator[str]:
    for node, target in _imported(module):
        top, *rest = target.split(".")
        if top == PACKAGE:
            room = rest[0] if rest else FACADE
            reason = _forbidden(module.room, room, known)
            if reason and (module.room, room) not in known.imports:
                yield module.at(node, f"imports {target}: {reason}")
            if room == "dialects" and module.room != "dialects" and DATABASES.search(target):
                yield module.at(node, f"imports {target}: only dialects/ knows the databases")
        elif top in OUTSIDE:
            owner = OUTSIDE[top]
            if owner not in {None, module.room} and (owner, module.room) != ("testing", PLUGIN):
                yield module.at(node, f"imports {target}: only {owner} may")
            if target.startswith("sqlalchemy.dialects.") and module.room != "dialects":
                yield module.at(node, f"imports {target}: only dialects/ knows the databases")
        elif top not in sys.stdlib_module_names:
            yield module.at(node, f"imports {target}: no room has this dependency")


def _forbidden(importer: str, imported: str, known: Known) -> str | None:
    """Why a room may not import another, or None where it may."""
    if importer == FACADE:
        return "never by the package itself" if imported == "testing" else None
    if imported == FACADE:
        return "the facade stands above all rooms"
    above, below = known.floor(importer), known.floor(imported)
    if importer == imported or above is None or below is None:
        return None  # an unknown room is reported once, by name
    if below > above:
        return f"upward, floor {above} to {below}"
    if below == above and above not in SHARED_FLOORS:
        return f"sideways on floor {above}"
    return None


def _imported(module: Module) -> Iterator[tuple[ast.AST, str]]:
    """The absolute names that a module imports, with those below ``if TYPE_CHECKING``."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = module.package[: len(module.package) - node.level + 1]
                base = ".".join((PACKAGE, *kept, *filter(None, [node.module])))
            for alias in node.names:
                # "from tidyrows import keys" names the room only in its second half
                yield node, f"{base}.{alias.name}" if _is_room(base, alias.name) else base


def _is_room(base: str, name: str) -> bool:
    return base == PACKAGE and KNOWN.floor(name) is not None


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


def graph_of(modules: list[Module]) -> nx.DiGraph[str]:
    """The modules by dotted name, with an edge for each import of another one of them."""
    known = {module.dotted for module in modules}
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(sorted(known))
    for module in modules:
        for node, target in _imported(module):
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


def _circles(modules: list[Module], graph: nx.DiGraph[str], known: Known) -> Iterator[str]:
    rooms = rooms_of(modules, graph)
    rooms.remove_edges_from(known.imports)
    for what, among, found in (
        ("import circle", graph, [each for each in circles(graph) if not known.allows(each)]),
        ("circle of rooms", rooms, circles(rooms)),
    ):
        for circle in found:
            way = [a for a, _ in nx.find_cycle(among.subgraph(circle), circle[0])]
            more = f" (of {len(circle)})" if len(circle) > len(way) else ""
            yield f"{what}{more}: {' -> '.join([*way, way[0]])}"


def _mended(modules: list[Module], graph: nx.DiGraph[str], known: Known) -> Iterator[str]:
    """Entries of the known faults that are no faults any more."""
    rooms = {module.room for module in modules}
    edges = rooms_of(modules, graph).edges
    in_circles = set().union(*circles(graph))
    for room in sorted(known.rooms.keys() - rooms):
        yield f"KNOWN.rooms: {room} is gone; remove it"
    for pair in sorted(known.imports - set(edges)):
        yield f"KNOWN.imports: {pair} is mended; remove it"
    for listed in known.circles:
        mended = sorted(_full_names(listed) - in_circles)
        if mended:
            yield f"KNOWN.circles: in no circle any more: {' '.join(mended)}"


def _full_names(listed: str) -> set[str]:
    return {f"{PACKAGE}.{name}" for name in listed.split()}
