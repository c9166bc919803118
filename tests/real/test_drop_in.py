"""The suites of factory_boy and pytest-factoryboy, on TrackedFactory: the same tests pass.

Nothing of them is here. Name checkouts of the installed versions, and run ``-m soak``::

    TIDYROWS_FACTORY_BOY=~/factory_boy TIDYROWS_PYTEST_FACTORYBOY=~/pytest-factoryboy
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak

TESTS = Path(__file__).parent.parent
SUITES = {  # a variable with the checkout, and what needs other packages
    "TIDYROWS_FACTORY_BOY": ("test_django.py", "test_mongoengine.py"),
    "TIDYROWS_PYTEST_FACTORYBOY": (),
}
OTHERWISE = {  # a tracker gives a session where Meta names none
    "tracked": {"SQLAlchemyNoSessionTestCase::test_create_raises_exception_when_no_session_was_set"}
}


def outcome(suite: Path, ignored: tuple[str, ...], swapped: str) -> tuple[int, set[str]]:
    """How many tests of a suite passed, and the names of those that failed."""
    plugins = ["pytest_factoryboy.plugin", *(["harness.swapped_base"] if swapped else [])]
    environment = os.environ | {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_PLUGINS": ",".join(plugins),
        "PYTEST_ADDOPTS": "",
        "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "TIDYROWS_SWAPPED": swapped,
    }
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "tests"),
            *(f"--ignore=tests/{name}" for name in ignored),
        ],
        cwd=suite,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = ended.stdout
    passed = re.search(r"(\d+) passed", said)
    assert passed, said + ended.stderr
    return int(passed[1]), set(re.findall(r"^(?:FAILED|ERROR) \S+?\.py::(\S+)", said, re.MULTILINE))


@pytest.mark.parametrize("variable", SUITES)
def test_the_same_tests_pass_on_the_swapped_base_class(variable):
    checkout = os.environ.get(variable)
    if checkout is None:
        pytest.skip(f"not at hand: {variable} names no checkout")
    suite = Path(checkout).expanduser()
    passed, failed = outcome(suite, SUITES[variable], "")
    assert passed > 50
    for swapped in ("plain", "tracked"):
        now, differs = outcome(suite, SUITES[variable], swapped)
        known = OTHERWISE.get(swapped, set()) if variable == "TIDYROWS_FACTORY_BOY" else set()
        assert differs - failed == known
        assert now == passed - len(known)
