"""behave: a scenario's rows go after it, a feature's after the feature."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from harness.suites import PLAIN, Suite
from harness.targets import mostly_on

FEATURE = """
Feature: rows
  Background:
    Given a user

  Scenario Outline: each row
    Given a user
    Then there are 2 users of mine
    Examples:
      | n |
      | 1 |
      | 2 |

  Scenario: it fails
    Given a fault
"""

STEPS = """
from behave import given, then
from models import *

@given("a user")
def a_user(context):
    add(User(org_id=context.org.id))

@then("there are 2 users of mine")
def two(context):
    assert len(context.tidy.tracker) == 2
    assert count(f"users WHERE org_id = {context.org.id}") == 2

@given("a fault")
def fault(context):
    if os.environ.get("FAULT"):
        raise RuntimeError("the step's own")
"""

FEATURE_THAT_DRAWS = """
Feature: values
  Scenario: one
    Given a value
    Given a fault
  Scenario: two
    Given a value
"""

DRAWING = """
import random, sys
from tidyrows import TrackedFactory

class AnyFactory(TrackedFactory[dict]):
    pass

@given("a value")
def a_value(context):
    print(f"drawn {context.tidy.context.test_id}: {random.random()}", file=sys.__stderr__)
"""

ENVIRONMENT = """
from models import *
from tidyrows.testing.behave import setup

def before_all(context):
    setup(context, engine, **eval(os.environ.get("OPTIONS", "{}")))
    add(Org(name="of the run"))
    assert len(context.tidy.tracker) == len(context.tidy_run.tracker) == 1

def before_feature(context, feature):
    context.org = add(Org(name="shared"))
"""


@pytest.fixture
def suite(tmp_path, outside):
    made = Suite(tmp_path, outside, PLAIN)
    made.write("features/rows.feature", FEATURE)
    made.write("features/steps/steps.py", STEPS)
    made.write("features/environment.py", ENVIRONMENT)
    return made


def test_every_scenario_and_feature_leaves_nothing(suite):
    code, said = suite.run("behave")
    assert code == 0, said
    assert suite.rows() == suite.before


@mostly_on("sqlite")
def test_a_failing_step_leaves_nothing(suite, monkeypatch):
    monkeypatch.setenv("FAULT", "1")
    code, said = suite.run("behave")
    assert code == 1
    assert "the step's own" in said
    assert suite.rows() == suite.before


@mostly_on("sqlite")
def test_random_values_follow_the_seed(suite, monkeypatch):
    suite.append("features/steps/steps.py", DRAWING)
    monkeypatch.setenv("FAULT", "1")
    drawn = []
    for features in ("one two", "two one"):
        for name in ("one", "two"):
            suite.write(f"features/{name}.feature", FEATURE_THAT_DRAWS)
        arguments = [f"features/{name}.feature" for name in features.split()]
        code, said = suite.run("behave", *arguments, TIDYROWS_SEED="5")
        assert code == 1
        assert "tidyrows: TIDYROWS_SEED=5 repeats the random values" in said
        drawn.append(dict(re.findall(r"^drawn (.*): (.*)$", said, re.MULTILINE)))
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0].values())) == len(drawn[0]) == 4


@mostly_on("sqlite")
def test_what_is_kept_is_said(suite, monkeypatch):
    monkeypatch.setenv("FAULT", "1")
    monkeypatch.setenv("OPTIONS", "{'keep_on_failure': True}")
    code, said = suite.run("behave")
    assert code == 1
    assert "kept for study" in said
    assert re.search(r"^rows that tests left: \S+orgs 1 .*, \S+users 1 kept", said, re.MULTILINE)
    assert suite.count("users") == 2


@mostly_on("sqlite")
def test_ctrl_c_in_the_middle_of_a_cleanup_leaves_nothing(suite):
    """Behave ends there, and calls no cleanup of the feature's."""
    suite.write(
        "features/environment.py",
        ENVIRONMENT
        + """
import signal

@sa.event.listens_for(sa.Engine, "before_cursor_execute")
def interrupt(connection, cursor, statement, *rest):
    if statement.startswith("DELETE") and "users" in statement:
        sa.event.remove(sa.Engine, "before_cursor_execute", interrupt)
        signal.raise_signal(signal.SIGINT)
""",
    )
    code, said = suite.run("behave")
    assert code == 1
    assert "ABORTED: By user." in said
    assert suite.rows() == suite.before


@mostly_on("postgresql+psycopg")
def test_a_failed_cleanup_fails_the_run(suite, monkeypatch):
    monkeypatch.setenv("OPTIONS", "{'protect': [User]}")
    suite.write(
        "features/environment.py",
        ENVIRONMENT
        + """
def after_feature(context, feature):
    import subprocess, sys
    subprocess.run([sys.executable, "-c",
        f"from models import *; add(User(org_id={context.org.id}))"], check=True)
""",
    )
    code, said = suite.run("behave")
    assert code == 1, said
    assert "CleanupError" in said


@mostly_on("mysql+pymysql")
def test_two_processes_at_once(suite):
    both = [suite.start("behave"), suite.start("behave")]
    for process in both:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert suite.rows() == suite.before


def test_behave_is_not_imported_by_the_others():
    code = "import sys, tidyrows, tidyrows.testing; assert 'behave' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
