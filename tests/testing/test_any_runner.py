"""Any runner: a block, or start and finish."""

from __future__ import annotations

from harness.runners import STRANGERS, Suite


def test_a_plain_script_has_blocks_and_hooks(tmp_path, database):
    suite = Suite(tmp_path, database)
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
""",
    )
    code, said = suite.run("script")
    assert code == 0, said
    assert suite.left() == STRANGERS
