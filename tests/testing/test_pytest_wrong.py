"""Wrong uses of the plugin: each is told what is wrong with what, and what to write.

The tests of one suite are all wrong, so one run shows all; what ends a run has a run of its own.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from harness.suites import CONFTEST, Suite
from harness.targets import on

pytestmark = pytest.mark.slow

TESTS = """
import unittest

import pytest
import sqlalchemy as sa
from models import Base, OrgFactory, UserFactory
from tidyrows import CleanupManager, Dependents
from tidyrows.testing import TidyTestCase


class Elsewhere(OrgFactory):
    class Meta:
        model = type("Elsewhere", (Base,), {"__tablename__": "elsewhere",
                     "id": sa.orm.mapped_column(sa.Integer, primary_key=True),
                     "name": sa.orm.mapped_column(sa.String(40))})


@pytest.fixture
def org():
    return OrgFactory()

@pytest.fixture(scope="module")
def module_org():
    return OrgFactory()

@pytest.fixture(scope="session")
def session_org():
    return OrgFactory()

def test_factory():
    OrgFactory()

def test_subfactory():
    UserFactory()

def test_batch():
    OrgFactory.create_batch(2)

def test_fixture(org):
    pass

def test_module_fixture(module_org):
    pass

def test_session_fixture(session_org):
    pass

class TestCaseOfUnittest(unittest.TestCase):
    def test_unittest(self):
        OrgFactory()

class TestWithoutEngine(TidyTestCase):
    def test_no_engine(self):
        OrgFactory()

@pytest.mark.tidy(protects=["users"])
def test_misspelt(tidy):
    pass

@pytest.mark.tidy("users")
def test_positional(tidy):
    pass

@pytest.mark.tidy(lock_timeout="2s")
def test_time(tidy):
    pass

@pytest.mark.tidy(deadline=-1)
def test_past(tidy):
    pass

@pytest.mark.tidy(retry=3)
def test_retry(tidy):
    pass

@pytest.mark.tidy(dependents="delete")
def test_dependents(tidy):
    pass

@pytest.mark.tidy(keep_on_failure="yes")
def test_keep(tidy):
    pass

@pytest.mark.tidy(ledger="on")
def test_ledger(tidy):
    pass

@pytest.mark.tidy(allow_production="shop")
def test_production(tidy):
    pass

@pytest.mark.tidy(own=["usres"])
def test_typo(tidy):
    pass

@pytest.mark.tidy(protect=["User"])
def test_class_name(tidy):
    pass

@pytest.mark.tidy(own="users")
def test_one_table(tidy):
    pass

def test_nested(tidy):
    with CleanupManager(tidy.tracker):
        pass

def test_started(tidy):
    tidy.tracker.start()

def test_early_report(tidy):
    tidy.cleanup.report

def test_async_session(tidy):
    tidy.async_session

def test_no_table(tidy):
    Elsewhere()
"""
TIDY = ("OrgFactory", "no tracker is active", "def test_it(tidy):")
SHARED = ("OrgFactory", "no tracker is active", "with tidy_worker:")
WRONG = {
    "factory": TIDY,
    "subfactory": TIDY,
    "batch": TIDY,
    "fixture": TIDY,
    "module_fixture": SHARED,
    "session_fixture": SHARED,
    "unittest": ("OrgFactory", "no tracker is active", "class TestCaseOfUnittest(TidyTestCase)"),
    "no_engine": ("TestWithoutEngine", "does not say where its rows go", "tidy_engine = engine"),
    "misspelt": ("@pytest.mark.tidy", "takes no protects=", "Did you mean protect=?"),
    "positional": ("@pytest.mark.tidy", "takes no 'users'=", "It takes allow_foreign_keys_off"),
    "time": ("lock_timeout='2s'", "must be a number of seconds", "write lock_timeout=5.0"),
    "past": ("deadline=-1", "at least 0", "write deadline=60.0"),
    "retry": ("retry=3", "must be a RetryPolicy", "write retry=RetryPolicy(attempts=3)"),
    "dependents": ("dependents='delete'", "must be Dependents.", "write dependents=Dependents."),
    "keep": ("keep_on_failure='yes'", "True or False", "write keep_on_failure=True"),
    "ledger": ("ledger='on'", "a Ledger, True or False", "write ledger=True"),
    "production": ("allow_production='shop'", "a list of names", "write allow_production=['app"),
    "typo": ("'usres'", "no such table", "Write own=['users']"),
    "class_name": ("'User'", "no such table", "Write protect=['users']"),
    "one_table": ("'users'", "takes a list of tables", "own=[users]"),
    "nested": ("This tracker", "started already", "one ResourceTracker per block"),
    "started": ("This tracker", "started already", "one ResourceTracker per block"),
    "early_report": ("CleanupManager", "no report yet", "or call cleanup()"),
    "async_session": ("This test's database", "synchronous engine", "Write tidy.session"),
    "no_table": ("elsewhere", "has no table", "Create the tables first"),
}
RUNS = {
    "a URL of old": (["--tidy-url", "postgres://me:secret@db/app"], {}, "'postgres'", "not know",
                     "Write postgresql+psycopg"),
    "no URL": (["--tidy-url", "shop"], {}, "The text", "is no URL", "Write postgresql+psycopg"),
    "no engine": ([], {}, "tidyrows", "does not know the database", "define a session fixture"),
    "ledger": ([], {"tidy_ledger": "maybe"}, "tidy_ledger = maybe", "none of", "on, off, auto"),
    "autouse": ([], {"tidy_autouse": "maybe"}, "tidy_autouse = maybe", "none of", "true, session"),
    "audit": (["--tidy-audit", "-n2"], {}, "--tidy-audit", "several workers", "add -n0"),
}  # fmt: skip  # a row a line


@pytest.fixture
def suite(tmp_path, outside):
    return Suite(tmp_path, outside)


@on("sqlite")
@pytest.mark.parametrize("autouse", ["false", "true"])
def test_a_wrong_test_is_told_what_to_write(suite, autouse):
    suite.write("test_wrong.py", TESTS)
    ended = suite.pytest("--junitxml=all.xml", "-o", f"tidy_autouse={autouse}")
    said = {}
    for case in ET.parse(suite.folder / "all.xml").iter("testcase"):
        name = case.attrib["name"].removeprefix("test_")
        said[name] = " ".join(
            f"{each.attrib.get('message', '')} {each.text}"
            for each in case
            if each.tag in {"failure", "error"}
        )
    assert said.keys() == WRONG.keys(), ended.text
    unsaid = {
        name: (texts, said[name])
        for name, texts in WRONG.items()
        if any(text not in said[name] for text in texts)
    }
    assert unsaid == {}
    assert "KeyError" not in ended.text, "hooks of other plugins were called"
    assert suite.rows() == suite.before
    assert len(WRONG) + len(RUNS) > 22


@on("sqlite")
@pytest.mark.parametrize("wrong", RUNS)
def test_a_wrong_run_is_told_what_to_write(suite, wrong):
    arguments, ini, *texts = RUNS[wrong]
    suite.write("conftest.py", "" if wrong != "ledger" else CONFTEST)
    suite.write("test_it.py", "from models import OrgFactory\ndef test_it(tidy): OrgFactory()\n")
    options = [each for name, value in ini.items() for each in ("-o", f"{name}={value}")]
    ended = suite.pytest(*arguments, *options)
    assert ended.code
    assert [text for text in texts if text not in ended.text] == [], ended.text
    assert "secret" not in "".join(
        line for line in ended.text.splitlines() if line.startswith("E ")
    )


@on("sqlite")
def test_a_name_that_no_table_has_deletes_nothing_of_a_whole_suite_and_is_said(suite):
    suite.write(
        "test_wrong.py",
        """
        import os
        import pytest
        import sqlalchemy as sa

        pytestmark = pytest.mark.tidy(own=["usres"])

        def test_it():
            with sa.create_engine(os.environ["SUITE_URL"]).begin() as connection:
                orgs = sa.Table("orgs", sa.MetaData(), autoload_with=connection)
                connection.execute(sa.insert(orgs).values(name="mine"))

        def test_does_not_even_begin_now_that_the_database_is_known():
            print("began")
        """,
    )
    ended = suite.pytest("-o", "tidy_autouse=true", "-rA")
    assert ended.outcomes == {"passed": 1, "error": 2}
    assert "began" not in ended.text.replace("its keys began", "")
    assert "own= names 'usres'" in ended.text
    assert "Did you mean 'users'" in ended.text
    assert "1 test(s) left 1 row(s), 0 deleted" in ended.text
    assert suite.count("orgs") == 2, "the stranger's, and the test's: it is said above"
