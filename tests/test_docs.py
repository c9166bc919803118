"""Documentation executes, and says something about every public name."""

from __future__ import annotations

import ast
import difflib
import os
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session

import tidyrows

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(
    r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)


def blocks(page):
    """The page's Python, each block on the lines where it stands in the page."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        yield "\n" * line + textwrap.dedent(match["code"])


def run_page(page):
    """Run the page's blocks in order in one namespace, and close what they leave open."""
    module = types.ModuleType("__page__")
    sys.modules[module.__name__] = module  # models look up their annotations there
    sys.modules["conftest"] = module  # where a page shows a suite in several files
    try:
        for code in blocks(page):
            exec(compile(code, str(page), "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__], sys.modules["conftest"]
        left = list(vars(module).values())
        for session in left:
            if isinstance(session, (Session, scoped_session)):
                session.close()
        for engine in left:
            if isinstance(engine, sa.Engine):
                engine.dispose()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_runs(example, tmp_path):
    source = Path(tidyrows.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "error", str(example)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(source)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip(), "an example shows what it does"


def test_every_public_name_is_in_the_docs():
    said = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.parent != ROOT)
    unsaid = [name for name in tidyrows.__all__ if not re.search(rf"\b{name}\b", said)]
    assert unsaid == [], "write what they are for in docs/"


def test_every_page_is_in_the_navigation_of_the_site():
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f": {page}\n" not in listed] == [], "add them to nav"


def test_public_names_are_sorted_and_there():
    assert list(tidyrows.__all__) == sorted(tidyrows.__all__)
    assert all(hasattr(tidyrows, name) for name in tidyrows.__all__)


def test_a_broken_block_fails_on_its_own_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```python\nx = 1\n```\n\n- B\n\n  ```python\n  y = x\n  1 / 0\n  ```\n")
    with pytest.raises(ZeroDivisionError) as raised:
        run_page(page)
    assert raised.traceback[-1].lineno + 1 == 11


def test_other_languages_are_not_run(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```console\n$ python\n```\n\n```python\nz = 3\n```\n\n```\nnothing\n```\n")
    assert [block.strip() for block in blocks(page)] == ["z = 3"]


# --- the texts of errors.md


OF_OTHERS = (
    "FOREIGN KEY constraint failed",
    "is still referenced from table",
    "Cannot delete or update a parent row",
    "gave up: ",  # and what the database says
    "permission denied for table",
    "Instance <User> has been deleted",
    "is not bound to a Session",
)
"""Texts of databases and of SQLAlchemy, which the page explains too."""
WORD = re.compile(r"[A-Za-z_]+")
ENOUGH = 0.5
"""How many words of a text one message must have: a text may be made of two."""
VALUES = re.compile(r"'[^']*'|\[.*?\]|\(it contains[^)]*\)|\S*[._=]\w\S*")
"""Names and values, which no message has."""


def messages_of(path):
    """The words of each text of a module that is no docstring, without what is put in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            pieces = [each.value for each in node.values if isinstance(each, ast.Constant)]
            yield WORD.findall(" ".join(map(str, pieces)))
        elif isinstance(node, ast.Constant) and id(node) not in docstrings:
            yield WORD.findall(re.sub(r"{[^}]*}", " ", str(node.value)))


def share_in_order(words, message):
    """How many of the words, from 0 to 1, a message has in the same order."""
    if len(set(words) & set(message)) < ENOUGH * len(set(words)):
        return 0.0
    matcher = difflib.SequenceMatcher(None, words, message, autojunk=False)
    blocks = [each.size for each in matcher.get_matching_blocks() if each.size > 1]
    return sum(blocks) / len(words)


def test_every_text_that_the_page_of_errors_explains_is_in_the_source():
    package = Path(tidyrows.__file__).parent
    messages = [words for path in package.rglob("*.py") for words in messages_of(path)]
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    texts = [
        text.strip(" .")
        for heading in re.findall(r"^## (.*)$", page, re.MULTILINE)
        for text in heading.split(" · ")
        if not text.startswith(OF_OTHERS)
    ]
    assert len(texts) > 100
    shares = {
        text: max(share_in_order(words, message) for message in messages)
        for text in texts
        if (words := WORD.findall(VALUES.sub(" ", text)))
    }
    assert [text for text, share in shares.items() if share < ENOUGH] == []
