"""Pages that a newcomer follows: files are written, commands run, and their output is true."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from harness import forks
from harness.suites import fresh_environment

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(
    r"(?P<skip><!-- not run: .+ -->\n\n)?"
    r'^```(?P<language>\w+)(?: title="(?P<file>[^"]+)")?\n(?P<text>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)
COMMAND = re.compile(r"^\$ (?P<command>.*)\n(?P<output>(?:(?!\$ ).*\n)*)", re.MULTILINE)
SECONDS = re.compile(r"\d+\.\d+ ?s")
WALKS = [
    page for page in sorted(DOCS.glob("**/*.md")) if ' title="' in page.read_text(encoding="utf-8")
]


def walk(page, folder):
    """Do what the page says, in the folder."""
    for block in FENCE.finditer(page.read_text(encoding="utf-8")):
        if block["skip"]:
            continue
        if block["file"]:
            path = folder / block["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block["text"], encoding="utf-8")
        elif block["language"] == "console":
            for each in COMMAND.finditer(block["text"]):
                run(each["command"], each["output"].splitlines(), folder)


def run(command, shown, folder):
    """Run one command: it prints each line that is shown, and fails where they say "1 failed".

    ``...`` in a line stands for any text, and a number of seconds for any other. The lines may
    come in another order than on the page.
    """
    python, *words = shlex.split(command)
    assert python == "python", f"mark the block as not run: {command}"
    plugins = ["-p no:cacheprovider", "-p pytest_tidyrows", *["-p xdist.plugin"] * ("-n" in words)]
    done = forks.run(
        [sys.executable, *words],
        cwd=folder,
        env={
            **fresh_environment(),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_ADDOPTS": " ".join(plugins),
        },
    )
    said = done.stdout + done.stderr
    assert bool(done.returncode) == any("1 failed" in line for line in shown), (
        f"$ {command}\n{said}"
    )
    for line in shown:
        pattern = re.escape(SECONDS.sub("...", line)).replace(r"\.\.\.", ".*")
        assert re.search(pattern, said), f"{line!r} is not what it prints:\n$ {command}\n{said}"


@pytest.mark.parametrize("page", WALKS, ids=lambda page: str(page.relative_to(DOCS)))
def test_a_page_can_be_followed(page, tmp_path):
    walk(page, tmp_path)


@pytest.mark.parametrize(
    ("command", "output", "fault"),
    [
        ("python a.py", "two", "'two' is not what it prints"),
        ("python b.py", "", "No such file"),
        ("pip install a", "", "mark the block as not run"),
    ],
)
def test_what_is_not_true_is_found(command, output, fault, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        f'```python title="a.py"\nprint("one")\n```\n\n```console\n$ {command}\n{output}\n```\n'
    )
    with pytest.raises(AssertionError, match=fault):
        walk(page, tmp_path)
