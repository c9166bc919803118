"""The figures of the house, counted: size, circles, calls on the hot path, causes of leftovers.

    python tests/benchmarks/house_figures.py                      # PostgreSQL and SQLite
    python tests/benchmarks/house_figures.py --url URL --url URL  # these databases
    python tests/benchmarks/house_figures.py --no-database        # what the source alone tells
    python tests/benchmarks/house_figures.py --calls              # how often a function is called
    python tests/benchmarks/house_figures.py --trace              # each call in order, indented
    python tests/benchmarks/house_figures.py --causes             # each text of a cause
    python tests/benchmarks/house_figures.py --source PATH/src    # another tree

What a call is: each entry into a frame of the package that `sys.setprofile` reports: functions,
methods, properties, lambdas, comprehensions and generator expressions, and each time a generator
is resumed. The brackets say how many of them are comprehensions, generator expressions and resumed
generators. From Python 3.12 on, a comprehension is no frame of its own: compare figures of one
Python only.

What is measured, in a process of its own for each line: the second block of a process. Each block
has a tracker of its own, and the first tracker is still alive. `UserFactory()` commits one user;
the end is the exit of the block, with verification. The two tables are dropped at the end. The
goals are those for PostgreSQL.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import factory
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import tidyrows

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from harness import house  # noqa: E402 -- a script has no other way to its neighbours
from harness.leftover_causes import leftover_causes  # noqa: E402 -- as above
from harness.servers import POSTGRESQL_DEFAULT, POSTGRESQL_VARIABLE  # noqa: E402 -- as above

SHOWN = 5
GOALS = {
    "lines": 20_000,
    "files": 95,
    "circles": 0,
    "methods": 35,
    "longest": 450,
    ("factory", False): 70,
    ("factory", True): 100,
    ("end", False): 200,
    ("end", True): 250,
    "causes": 1,
}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def main() -> None:
    options = _options()
    if options.measure:
        print(json.dumps(_measured(sys.stdin.read(), ledger=options.ledger)))
        return
    source = options.source.resolve()
    _print_source(source, causes=options.causes)
    if not options.no_database:
        with tempfile.TemporaryDirectory() as folder:
            for url in options.url or _default_urls(folder):
                _print_calls(source, url, calls=options.calls, trace=options.trace)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--url", action="append", help="a database; may be given several times")
    parser.add_argument("--source", type=Path, default=TESTS.parent / "src", help="the folder src")
    parser.add_argument("--calls", action="store_true", help="print the functions called")
    parser.add_argument("--trace", action="store_true", help="print each call in order")
    parser.add_argument("--causes", action="store_true", help="print each text of a cause")
    parser.add_argument("--no-database", action="store_true", help="count the source only")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # the child
    parser.add_argument("--ledger", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _default_urls(folder: str) -> list[str]:
    postgresql = os.environ.get(POSTGRESQL_VARIABLE, POSTGRESQL_DEFAULT)
    return [postgresql, f"sqlite:///{folder}/figures.db"]


# What the source tells


def _print_source(source: Path, *, causes: bool) -> None:
    paths = [path for path in sorted(source.rglob("*.py")) if not _is_audit(path, source)]
    files = {path: _lines(path) for path in paths}
    modules = list(house.modules_of(source / house.PACKAGE))
    without_audit = [module for module in modules if not _is_audit(module.path, source)]
    _say("lines in src/ without the audit", sum(files.values()), GOALS["lines"])
    _say("files in src/ without the audit", len(files), GOALS["files"])

    graph = house.graph_of(modules)
    for what, found in (
        ("import circles of modules, TYPE_CHECKING counted", house.circles(graph)),
        ("import circles of rooms", house.circles(house.rooms_of(modules, graph))),
    ):
        _say(what, len(found), GOALS["circles"])
        for circle in found:
            print(f"    {len(circle)}: {' '.join(n.removeprefix('tidyrows.') for n in circle)}")

    methods = Counter({
        f"{node.name} ({module.dotted})": sum(isinstance(each, _FUNCTIONS) for each in node.body)
        for module in without_audit
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    })  # fmt: skip  # one line per part
    longest = Counter({str(path.relative_to(source)): lines for path, lines in files.items()})
    for what, counted, goal in (
        ("methods of the largest class", methods, GOALS["methods"]),
        ("lines of the largest file", longest, GOALS["longest"]),
    ):
        above = sum(number > goal for number in counted.values())
        _say(what, counted.most_common(1)[0][1], goal, f"{above} above the goal")
        for name, number in counted.most_common(SHOWN):
            print(f"    {number}: {name}")

    texts = leftover_causes(without_audit)
    in_files = f"in {len({text.module for text in texts})} files"
    _say("places where the cause of a leftover is made", len(texts), GOALS["causes"], in_files)
    for text in texts if causes else []:
        print(f"    {text.module}:{text.line}: {text.text[:80]}")


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _is_audit(path: Path, source: Path) -> bool:
    return "audit" in path.relative_to(source).parts


def _say(what: str, today: int, goal: int, more: str = "") -> None:
    print(f"{what:<58} {today:>7,}   goal {goal:,}{f'   ({more})' if more else ''}")


# What runs


@dataclass(frozen=True)
class Call:
    """One entry into a frame of the package.

    Attributes:
        depth: how many frames of the package are above it on the stack.
        file: below the package.
        name: the qualified name of the function.
        resumed: whether a generator goes on, rather than a function begins.
    """

    depth: int
    file: str
    name: str
    resumed: bool

    @property
    def is_inner(self) -> bool:
        return self.resumed or self.name.endswith(("comp>", "<genexpr>"))

    def __str__(self) -> str:
        return f"{self.file}: {self.name}{' (resumed)' if self.resumed else ''}"


def _print_calls(source: Path, url: str, *, calls: bool, trace: bool) -> None:
    print(f"\n{sa.make_url(url).render_as_string(hide_password=True)}")
    for ledger in (False, True):
        measured = _in_a_process(source, url, ledger=ledger)
        for part, what in (("factory", "one warm UserFactory()"), ("end", "the end of a block")):
            found = [Call(*each) for each in measured[part]]
            files = len({call.file for call in found})
            inner = sum(call.is_inner for call in found)
            name = f"calls, {what}{', with a ledger' if ledger else ''}"
            more = f"{inner} comprehensions, generators; in {files} files"
            _say(name, len(found), GOALS[part, ledger], more)
            for text, number in Counter(map(str, found)).most_common() if calls else []:
                print(f"    {number:>4}  {text}")
            for call in found if trace else []:
                print(f"    {'  ' * call.depth}{call}")


def _in_a_process(source: Path, url: str, *, ledger: bool) -> dict[str, list[list]]:
    ended = subprocess.run(
        [sys.executable, __file__, "--measure", *(["--ledger"] if ledger else [])],
        env={**os.environ, "PYTHONPATH": str(source)},
        input=url,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        sys.exit(ended.stderr)
    return json.loads(ended.stdout)


def _measured(url: str, *, ledger: bool) -> dict[str, list[list]]:
    """The calls of a factory call and of the end of its block, as arguments of `Call`."""
    name = f"house_figures_{os.getpid()}"
    engine = sa.create_engine(url)
    book = tidyrows.Ledger(engine, name=f"{name}_ledger") if ledger else None
    user_factory = _user_factory(name)
    users = user_factory._meta.model.__table__
    try:
        users.create(engine)
        if book is not None:
            book.install()
        first = tidyrows.ResourceTracker(engine, ledger=book)
        with tidyrows.CleanupManager(first):
            user_factory()
        calls, end = [], []
        manager = tidyrows.CleanupManager(tidyrows.ResourceTracker(engine, ledger=book))
        manager.__enter__()
        with _profiled(calls):
            user_factory()
        with _profiled(end):
            manager.__exit__(None, None, None)
        assert len(first) == 0  # and the tracker is alive until here
    finally:
        users.drop(engine, checkfirst=True)
        if book is not None:
            sa.Table(book.name, sa.MetaData()).drop(engine, checkfirst=True)
    return {"factory": calls, "end": end}


def _user_factory(table: str) -> type[tidyrows.TrackedFactory]:
    class Base(DeclarativeBase):
        pass

    class User(Base):
        __tablename__ = table
        id: Mapped[int] = mapped_column(primary_key=True)
        email: Mapped[str] = mapped_column(sa.String(60))
        name: Mapped[str] = mapped_column(sa.String(60))

    class UserFactory(tidyrows.TrackedFactory[User]):
        class Meta:
            model = User

        email = tidyrows.Scoped("user-{tag}@example.test")
        name = factory.Faker("name")

    return UserFactory


@contextmanager
def _profiled(calls: list[tuple[int, str, str, bool]]) -> Iterator[None]:
    """Note the frames of the package that this thread enters."""
    package = str(Path(tidyrows.__file__).parent)

    def entered(frame, event, _argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package):
            depth, above = 0, frame.f_back
            while above is not None:
                depth += above.f_code.co_filename.startswith(package)
                above = above.f_back
            # The argument of the opcode RESUME is 0 at the start of a function, else it goes on.
            resumed = code.co_code[max(frame.f_lasti, 0) + 1] != 0
            file = code.co_filename.removeprefix(package).lstrip(os.sep)
            calls.append((depth, file, code.co_qualname, resumed))

    sys.setprofile(entered)
    try:
        yield
    finally:
        sys.setprofile(None)


if __name__ == "__main__":
    main()
