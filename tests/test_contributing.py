"""What CONTRIBUTING.md and SECURITY.md show exists: files, options, extras, variables, sections."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from harness import servers

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MARKS = {line.partition(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
EXTRAS = PROJECT["project"]["optional-dependencies"]
BLOCK = re.compile(
    r"^(?P<indent> *)```console\n(?P<lines>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\((?P<file>[^)#]*)(?:#(?P<section>[^)]*))?\)")
FILE = re.compile(r"(?:\.ci|docs|examples|src|tests)/[\w./]*")


def commands(text):
    """The lines of the console blocks, and of the code in sentences that begins with python."""
    for block in BLOCK.finditer(text):
        yield from (line.strip() for line in block["lines"].splitlines())
    yield from (span for span in SPAN.findall(text) if span.startswith("python "))


def faults(text):
    """All that the text names and that does not exist."""
    paths = (path.rstrip(".") for path in FILE.findall(text))
    found = [path for path in paths if not (ROOT / path).exists()]
    found += [name for name in re.findall(r"TIDYROWS_\w+", text) if name not in _variables()]
    for line in commands(text):
        found += [f"{line}: {what}" for what in _faults_of(shlex.split(line))]
    for link in LINK.finditer(text):
        if link["file"] and not (ROOT / link["file"]).exists():
            found.append(link["file"])
        elif link["section"] and link["section"] not in _sections(ROOT / link["file"]):
            found.append(link[0])
    return list(dict.fromkeys(found))


def _faults_of(words):
    if Path(words[0]).name not in {"python", "python3"}:
        if words[0] not in {".", *_tools_for_docs()} and importlib.util.find_spec(words[0]) is None:
            yield words[0]
        return
    if words[1] == "-m":
        program, given = words[2], words[3:]
        if importlib.util.find_spec(program) is None:
            yield program
    else:
        program, given = words[1], words[2:]
    if program == "pytest" or program.endswith(".py"):
        known = _help("-m", "pytest") if program == "pytest" else _help(program)
        options = [word for word in given if word.startswith("-")]
        yield from (each for each in options if not re.search(rf"(?<![\w-]){each}\b", known))
    if program == "pytest":
        marks = (word for option, word in pairwise(given) if option == "-m")
        yield from (mark for mark in marks if mark not in MARKS)
    for extra in re.findall(r"\[(.*)\]", " ".join(given)):
        yield from (name for name in extra.split(",") if name not in EXTRAS)


def _tools_for_docs():
    """CI has these in an environment of their own."""
    return {re.match(r"[\w-]+", each)[0] for each in EXTRAS["docs"]}


@cache
def _help(*command):
    shown = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return shown.stdout


def _variables():
    return {servers.POSTGRESQL_VARIABLE, servers.MYSQL_VARIABLE, servers.REQUIRE_VARIABLE}


def _sections(page):
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    assert faults(page.read_text(encoding="utf-8")) == []


def test_commands_are_found_in_the_contributors_page():
    shown = list(commands(PAGES[0].read_text(encoding="utf-8")))
    assert "mypy" in shown
    assert "python -m build" in shown  # in a list
    assert "python -m pytest tests/dialects" in shown  # in a sentence


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Read `src/tidyrows/nowhere.py`.", "src/tidyrows/nowhere.py"),
        ("[The guide](docs/nowhere.md)", "docs/nowhere.md"),
        ("[The guide](docs/guide.md#nowhere)", "](docs/guide.md#nowhere)"),
        ("Set TIDYROWS_NOTHING.", "TIDYROWS_NOTHING"),
        ("```console\nnosuchtool .\n```", "nosuchtool .: nosuchtool"),
        ("`python -m nosuchmodule`", "python -m nosuchmodule: nosuchmodule"),
        ("`python -m pytest --nothing`", "python -m pytest --nothing: --nothing"),
        ("`python -m pytest -m nothing`", "python -m pytest -m nothing: nothing"),
        ("`python -m pip install '.[nothing]'`", "python -m pip install '.[nothing]': nothing"),
        ("`python tests/kills/run.py --nothing`", "python tests/kills/run.py --nothing: --nothing"),
    ],
)
def test_what_does_not_exist_is_found(text, fault):
    assert faults(text) == [fault]
