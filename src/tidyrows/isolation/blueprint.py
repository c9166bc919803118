"""What a schema or a database is built from, and the fingerprint of it."""

from __future__ import annotations

import hashlib
from copy import copy
from functools import partial
from pathlib import Path
from types import CellType, CodeType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy.engine.mock import MockConnection

from tidyrows.arguments import Kind, optional
from tidyrows.errors import ArgumentError, IsolationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import sqlalchemy as sa

    from tidyrows.isolation.levels import Wanted

_FORMAT = b"2"
"""Another number for each release that builds otherwise from the same."""

_SIMPLE = (bool, int, float, str, bytes)
BUILDER = optional(
    Kind(lambda value: isinstance(value, str) or callable(value), "SQL or a function", "upgrade")
)
"""What ``migrate=`` and ``seed=`` take."""
POOL = Kind(
    lambda value: isinstance(value, (bool, str, Path, list, tuple)),
    "True, False, or paths of files that decide",
    "'migrations/'",
)


class Blueprint:
    """The statements and functions that build a space, read from the arguments of ``isolate``.

    Attributes:
        statements: SQL, run first: the tables of the metadata, or the text ``migrate``.
        migrate: called with an engine on the space, after that.
        seed_statements: SQL that writes reference data.
        seed: called with a connection, after that.
        pooled: whether the space is kept.
    """

    def __init__(self, engine: sa.Engine, wanted: Wanted) -> None:
        self._refuse(wanted)
        self.migrate: Callable[[sa.Engine], object] | None = None
        self.seed: Callable[[sa.Connection], object] | None = None
        self.statements: list[str] = []
        self.seed_statements: list[str] = []
        if wanted.metadata is not None:
            self.statements = _known_ddl(wanted.metadata, engine)
        elif isinstance(wanted.migrate, str):
            self.statements = [wanted.migrate]
        else:
            self.migrate = wanted.migrate
        if isinstance(wanted.seed, str):
            self.seed_statements = [wanted.seed]
        else:
            self.seed = wanted.seed
        self.pooled = wanted.pool is not False
        self._paths = () if isinstance(wanted.pool, bool) else _paths(wanted.pool)

    def fingerprint(self) -> str:
        """Twelve characters for what it builds."""
        digest = hashlib.blake2b(_FORMAT, digest_size=6)
        parts = [*self.statements, "", *self.seed_statements, ""]
        parts += [_of_function(each) for each in (self.migrate, self.seed)]
        for part in [*map(str.encode, parts), *_contents(self._paths)]:
            digest.update(f"{len(part)} ".encode() + part)
        return digest.hexdigest()

    def _refuse(self, wanted: Wanted) -> None:
        if (wanted.metadata is None) == (wanted.migrate is None):
            both = wanted.metadata is not None
            raise ArgumentError(
                f"isolate() was given {'both' if both else 'neither'} metadata= "
                f"{'and' if both else 'nor'} migrate=, and one of them says which tables to make. "
                f"Write isolate(engine, 'schema', metadata=Base.metadata).",
                argument="metadata",
            )
        for name, value in (("migrate", wanted.migrate), ("seed", wanted.seed)):
            if wanted.pool is True and callable(value):
                raise ArgumentError(
                    f"{name}= is a function, and nobody can tell when it does something else, so "
                    f"that its schema has to be built anew. Write pool='migrations/' with the "
                    f"folder or the files that decide, or pool=False to build it for each test.",
                    argument="pool",
                    value=wanted.pool,
                )


_ddl: WeakKeyDictionary[sa.MetaData, tuple[object, list[str]]] = WeakKeyDictionary()


def _known_ddl(metadata: sa.MetaData, engine: sa.Engine) -> list[str]:
    """Compiled again only where the metadata has grown, or another database is meant."""
    tables = metadata.tables.values()
    sizes = [(len(t.columns), len(t.constraints), len(t.indexes)) for t in tables]
    state = (type(engine.dialect), engine.dialect.server_version_info, sizes)
    known = _ddl.get(metadata)
    if known is None or known[0] != state:
        known = _ddl[metadata] = (state, ddl_of(metadata, engine))
    return known[1]


def ddl_of(metadata: sa.MetaData, engine: sa.Engine) -> list[str]:
    """The statements of ``create_all``, with the literal values in them.

    Raises:
        IsolationError: a table has a schema of its own, or an event of the metadata needs a
            connection.
    """
    elsewhere = sorted({str(t.fullname) for t in metadata.tables.values() if t.schema})
    if elsewhere:
        raise IsolationError(
            f"{', '.join(elsewhere)} of the metadata has a schema of its own, so it would not be "
            f"made in the schema of the test. Leave out schema= in its Table."
        )
    dialect: Any = copy(engine.dialect)
    dialect.paramstyle = "named"  # in which % is not doubled
    dialect.positional = False
    dialect.identifier_preparer = dialect.preparer(dialect)
    statements = []

    def collect(element: Any, *_args: object, **_options: object) -> None:
        compiled = element.compile(dialect=dialect, compile_kwargs={"literal_binds": True})
        statements.append(str(compiled).strip())

    try:
        metadata.create_all(MockConnection(dialect, collect), checkfirst=False)
    except (AttributeError, NotImplementedError) as error:
        raise IsolationError(
            f"The tables of the metadata cannot be made without a connection ({error}). Write "
            f"migrate=metadata.create_all, with pool='models.py' for the files that define them."
        ) from error
    return statements


def _of_function(function: Any) -> str:
    """What tells a function from others: its name, its code, and simple values that it has.

    Not what it calls: the files of ``pool`` decide about that.
    """
    if isinstance(function, partial):
        return f"{_of_function(function.func)}{_simple((function.args, function.keywords))}"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    closure = getattr(function, "__closure__", None) or ()
    cells = tuple(cell.cell_contents for cell in closure if cell != CellType())
    held = getattr(function, "__code__", None), cells, getattr(function, "__defaults__", None)
    return f"{getattr(function, '__module__', '')}.{name}{_simple(held)}"


def _simple(value: Any) -> str:
    """The same in every process; other objects count by their class.

    Of a list, set or dict only the texts and numbers in it count: it may collect objects.
    """
    if isinstance(value, CodeType):
        return _simple((value.co_code, value.co_names, value.co_consts))
    if isinstance(value, tuple):
        return f"({','.join(map(_simple, value))})"
    if isinstance(value, dict):
        value = [each for pair in value.items() for each in pair]
    if isinstance(value, (list, set, frozenset)):
        texts = [repr(each) for each in value if isinstance(each, _SIMPLE)]
        return f"[{','.join(texts if isinstance(value, list) else sorted(texts))}]"
    if value is None or isinstance(value, _SIMPLE):
        return repr(value)
    return type(value).__qualname__


def _paths(pool: str | Path | Iterable[str | Path]) -> tuple[Path, ...]:
    given = [pool] if isinstance(pool, (str, Path)) else list(pool)
    paths = tuple(Path(each) for each in given)
    missing = [str(path) for path in paths if not path.exists()]
    if missing or not paths:
        raise ArgumentError(
            f"pool= names {', '.join(missing) or 'no path'}, which does not exist. Its content "
            f"tells when a schema has to be built anew: write pool='migrations/'.",
            argument="pool",
            value=pool,
        )
    return paths


def _contents(paths: Iterable[Path]) -> Iterator[bytes]:
    """The names and contents of all files, but what Python compiles."""
    for path in paths:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            if "__pycache__" not in file.parts:
                yield str(file.relative_to(path)).encode()
                yield file.read_bytes()
