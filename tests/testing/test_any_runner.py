"""Any runner: a block, or start and finish."""

from __future__ import annotations

import contextvars
import re
from pathlib import Path

import pytest

from harness.suites import PLAIN, Suite
from harness.targets import mostly_on, on

PAGE = Path(__file__).parent.parent.parent / "docs" / "frameworks.md"


@pytest.fixture
def suite(tmp_path, outside):
    return Suite(tmp_path, outside, PLAIN)


def test_a_plain_script_has_blocks_and_hooks(suite):
    suite.write(
        "script.py",
        """
from models import *
from tidyrows.testing import Tidy

with Tidy(engine, test="block"):
    add(Org(name="x"))
assert count("orgs") == 1

def before(name):
    return Tidy(engine, test=name).start()

def after(tidy, failed):
    return tidy.finish(failed=failed)

tidy = before("hook")
add(Org(name="x"))
assert count("orgs") == 2
after(tidy, failed=True)

unfinished = before("interrupted")
add(User(org_id=add(Org(name="x")).id))
raise KeyboardInterrupt
""",
    )
    _, said = suite.run("script")
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert suite.rows() == suite.before


@mostly_on("sqlite")
def test_nose2_has_test_cases_and_functions_with_hooks(suite):
    suite.write(
        "test_it.py",
        """
from models import *
from nose2.tools.decorators import with_setup, with_teardown
from tidyrows.testing import Tidy, TidyTestCase

class Case(TidyTestCase):
    tidy_engine = engine

    def test_a(self):
        add(Org(name="x"))
        self.assertEqual(len(self.tidy.tracker), 1)

opened = []

@with_setup(lambda: opened.append(Tidy(engine).start()))
@with_teardown(lambda: opened.pop().finish())
def test_function():
    add(Org(name="x"))
    assert len(opened[0].tracker) == 1
""",
    )
    code, said = suite.run("nose2")
    assert code == 0, said
    assert "Ran 2 tests" in said
    assert suite.rows() == suite.before


@mostly_on("postgresql+psycopg")
def test_the_library_of_the_page_listens_to_robot_framework(suite):
    (library,) = re.findall(r"```python\n(class TidyRows:.*?)```", PAGE.read_text(), re.DOTALL)
    suite.write(
        "TidyRows.py", f"from models import *\nfrom tidyrows.testing import Tidy\n{library}"
    )
    with (suite.folder / "TidyRows.py").open("a") as file:
        file.write(
            "\n    def add_org(self):\n        add(Org(name='x'))\n"
            "\n    def orgs_should_be(self, number):\n        assert count('orgs') == int(number)\n"
        )
    suite.write(
        "it.robot",
        """
        *** Settings ***
        Library    TidyRows.py
        Suite Setup    Add Org

        *** Test Cases ***
        One
            Add Org
            Orgs Should Be    3
        Two fails
            Add Org
            Fail    on purpose
        Three
            Orgs Should Be    2
        """,
    )
    code, said = suite.run("robot", "--output=NONE", "--log=NONE", "--report=NONE", "it.robot")
    assert code == 1, said
    assert "3 tests, 2 passed, 1 failed" in said
    assert suite.rows() == suite.before


@on("sqlite")  # who runs the cells does not ask which database it is
def test_a_notebook_has_a_cell_that_starts_and_one_that_finishes(suite, monkeypatch):
    """As a kernel runs them: each in a context of its own."""
    monkeypatch.setenv("SUITE_URL", suite.url)
    cells = (
        PLAIN,
        "from tidyrows.testing import Tidy\ntidy = Tidy(engine).start()",
        "add(Org(name='x'))",
        "assert len(tidy.tracker) == 1\ntidy.finish()\nengine.dispose()",
    )
    names = {"__name__": "notebook"}
    for cell in cells:
        code = compile(cell, "a cell", "exec", dont_inherit=True)
        contextvars.copy_context().run(exec, code, names)
    assert suite.rows() == suite.before


@mostly_on("mysql+pymysql")
def test_a_process_pool_has_a_block_in_the_function_that_it_calls(suite):
    suite.write(
        "pool.py",
        """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from models import *
from tidyrows.testing import Tidy

os.register_at_fork(after_in_child=lambda: engine.dispose(close=False))

def case(number):
    with Tidy(engine, test=f"case {number}", ledger=True) as tidy:
        row = add(Org(name=tidy.context.text("org-{tag}")))
        assert len(tidy.tracker) == 1
        return row.name

if __name__ == "__main__":
    with Tidy(engine, test="the parent's") as tidy:
        add(Org(name="the parent's"))
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(2, mp_context=fork) as pool:
            assert len(set(pool.map(case, range(8)))) == 8
        assert len(tidy.tracker) == 1
        assert count("orgs") == 2
""",
    )
    code, said = suite.run("pool")
    assert code == 0, said
    assert suite.rows() == suite.before
