"""``pytest --tidy-audit`` as users have it: suites that do not use tidyrows, in another process."""

from __future__ import annotations

import json

import pytest
import sqlalchemy as sa

from harness.suites import Suite
from harness.targets import mostly_on, on

pytestmark = pytest.mark.slow

sqlite_only = on("sqlite")

CONFTEST = """
    import os

    import pytest
    import sqlalchemy as sa
    from sqlalchemy.orm import Session

    from models import Base, Org, User

    engine = sa.create_engine(os.environ["SUITE_URL"])

    @pytest.fixture
    def session():
        with Session(engine) as session:
            yield session

    @pytest.fixture(scope="module")
    def shared():
        with Session(engine, expire_on_commit=False) as session:
            session.add(org := Org(name="shared"))
            session.commit()
            yield org
            session.delete(org)
            session.commit()
"""

CULPRITS = """
    import subprocess
    import sys
    import unittest

    import sqlalchemy as sa
    from conftest import engine
    from models import Org, OrgFactory, User
    from sqlalchemy.orm import Session

    APP = '''
    import os
    import sqlalchemy as sa

    with sa.create_engine(os.environ["SUITE_URL"]).begin() as connection:
        connection.exec_driver_sql("INSERT INTO orgs (id, name) VALUES (700, 'app')")
    '''

    def test_leaves(session):
        session.add_all([Org(id=500, name="<b>a</b>"), Org(id=501, name="b")])
        session.commit()

    def test_reads(session):
        assert session.scalars(sa.select(Org).where(Org.id == 500)).one()

    def test_changes(session):
        session.get(Org, 900000).name = "changed"
        session.commit()

    def test_deletes(session):
        session.execute(sa.text("DELETE FROM orgs WHERE id = 501"))
        session.commit()

    def test_shared(session, shared):
        session.get(Org, shared.id)

    def test_shared_is_changed(session, shared):
        session.get(Org, shared.id).name = "other"
        session.commit()

    def test_application():
        subprocess.run([sys.executable, "-c", __import__("textwrap").dedent(APP)], check=True)

    class TestOld(unittest.TestCase):
        @classmethod
        def setUpClass(cls):
            with Session(engine) as session:
                session.add(Org(id=600, name="of the class"))
                session.commit()

        @classmethod
        def tearDownClass(cls):
            with Session(engine) as session:
                session.delete(session.get(Org, 600))
                session.commit()

        def test_old(self):
            with Session(engine) as session:
                session.add(User(id=500, email="old", org_id=session.get(Org, 600).id))
                session.commit()
                session.execute(sa.update(User).where(User.id == 500).values(org_id=900000))
                session.commit()

    # Innocent, all of these.

    def test_fails_and_leaves_nothing(session):
        session.add(Org(name="gone"))
        session.flush()
        raise LookupError

    def test_reads_what_was_there(session):
        assert session.get(Org, 900000)

    def test_cleans_up(session):
        session.add(org := Org(name="mine"))
        session.commit()
        org.name = "mine too"
        session.commit()
        session.delete(org)
        session.commit()

    def test_tidy(tidy):
        OrgFactory()

    def test_file_of_its_own(tmp_path):
        own = sa.create_engine(f"sqlite:///{tmp_path}/own.db")
        Org.metadata.create_all(own)
        with Session(own) as session:
            session.add(Org(name="nobody's business"))
            session.commit()
        own.dispose()
"""


@pytest.fixture
def suite(tmp_path, outside):
    made = Suite(tmp_path, outside)
    text = (made.folder / "conftest.py").read_text()
    made.write("conftest.py", CONFTEST)
    made.append("conftest.py", text)
    return made


def audited(suite, *arguments, **environment):
    """How a run has ended, and what it found, by test."""
    ended = suite.pytest(
        "--tidy-audit", "--tidy-audit-json", "audit.json", *arguments, **environment
    )
    report = json.loads((suite.folder / "audit.json").read_text())
    found = {
        culprit["test"].partition("::")[2] or culprit["test"]: [
            (each["fault"], str(each["table"]).rpartition(".")[2], each["rows"], each["keys"])
            for each in culprit["findings"]
        ]
        for culprit in report["culprits"]
    }
    return ended, found, report


@mostly_on("postgresql+psycopg")
def test_who_left_changed_deleted_or_read_which_rows(suite):
    suite.write("test_all.py", CULPRITS)
    ended, found, report = audited(suite, "--tidy-audit-seeds=0", "--tidy-audit-html=audit.html")
    assert ended.outcomes == {"failed": 1, "passed": 12}
    assert ended.code == 1
    shared = found.pop("test_shared_is_changed")
    assert [each[:3] for each in shared] == [("changes", "orgs", 1)]
    assert found == {
        "test_changes": [("changes", "orgs", 1, [900000])],
        "test_deletes": [("deletes", "orgs", 1, [501])],
        "test_reads": [("reads", "orgs", 1, [500])],
        "test_leaves": [("leaves", "orgs", 2, [500, 501])],
        "test_application": [("leaves", "orgs", 1, [700])],
        "TestOld::test_old": [("leaves", "users", 1, [500])],
    }
    assert report["notes"] == []
    cures = {c["test"].rpartition("::")[2]: c["findings"][0]["cure"] for c in report["culprits"]}
    assert cures["test_changes"] == "tidy.tracker.preserve(select(Org)) before the change"
    assert "def test_leaves(tidy):" in cures["test_leaves"]
    assert "TidyTestCase" in cures["test_old"]
    order = [culprit["findings"][0]["fault"] for culprit in report["culprits"]]
    assert order == ["changes", "changes", "deletes", "reads", "leaves", "leaves", "leaves"]
    assert "test_reads</h3>" in (suite.folder / "audit.html").read_text()
    # What the tests left is deleted; what cannot be is said.
    with suite.engine.connect() as connection:
        left = connection.scalars(sa.text("SELECT id FROM orgs ORDER BY id")).all()
    assert left == [700, 900000]
    assert [each.replace("public.", "") for each in report["not_put_back"]] == [
        "1 row of orgs (700) was not there",
        "1 row of orgs (900000) has changed",
    ]


BARE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
"""Without the plugins of this environment, which take their time: each audit is several runs."""

DEPENDENT = """
    import sqlalchemy as sa
    from models import Org

    def test_leaves(session):
        session.add(Org(id=500, name="left"))
        session.commit()

    def test_spoilt(session):
        assert not session.scalar(sa.select(sa.exists().where(Org.name == "left")))

    def test_changes(session):
        session.get(Org, 900000).name = "changed"
        session.commit()

    def test_needs(session):
        assert session.scalar(sa.select(sa.func.count()).where(Org.name == "left")) == 1
"""


def test_each_order_begins_with_the_database_as_it_was(suite):
    """A row that the first run left would make the dependent test pass in every later one."""
    suite.write("test_all.py", DEPENDENT)
    ended, found, report = audited(suite, "-p", "no:randomly", "--tidy-audit-seeds=1", **BARE)
    assert ended.outcomes == {"failed": 1, "passed": 3}
    said = {c["test"].partition("::")[2]: c["findings"][0] for c in report["culprits"]}
    leaves = "test_all.py::test_leaves"
    assert said["test_needs"]["said"] == f"fails alone, passes after {leaves}"
    assert said["test_spoilt"]["said"] == f"passes alone, fails after {leaves}"
    for test in ("test_needs", "test_spoilt"):
        assert said[test]["proof"] == "proved by 2 runs on the same changed database"
        assert said[test]["whose"] == [leaves]
    assert ("reads", "orgs", 1, [500]) in found["test_needs"]
    assert [each[0] for each in found["test_changes"]] == ["changes"]
    assert [each[0] for each in found["test_leaves"]] == ["leaves"]
    (changed,) = report["not_put_back"]
    assert changed.endswith("orgs (900000) has changed")
    assert [run["changed"] for run in report["runs"]] == [[]] + [[changed]] * 6
    assert [len(rows) for rows in suite.rows().values()] == [1, 1]


SHARED = """
    import pytest
    from conftest import engine
    from models import Org
    from sqlalchemy.orm import Session

    @pytest.fixture(scope="session", autouse=True)
    def prepared():
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS extra (id int PRIMARY KEY)")
        with Session(engine) as session:
            session.add(Org(name="of the session"))
            session.commit()

    def test_leaves(session):
        session.add(Org(name="of the test"))
        session.commit()
"""


@sqlite_only
@pytest.mark.parametrize("autouse", ["false", "true"])
def test_what_fixtures_of_the_session_leave_is_deleted_too(suite, autouse):
    """With ``tidy_autouse`` it would stay, but for the audit."""
    suite.write("pytest.ini", f"[pytest]\ntidy_autouse = {autouse}\n")
    suite.write("test_all.py", SHARED)
    _ended, _found, report = audited(suite, "--tidy-audit-seeds=0", **BARE)
    assert report["not_put_back"] == ["the table main.extra was made"]
    assert suite.count("orgs") == 1


ORDERED = """
    import os
    import random
    from pathlib import Path

    import sqlalchemy as sa
    from tidyrows import TrackedFactory

    class AnyFactory(TrackedFactory[dict]):
        pass

    engine = sa.create_engine(os.environ["SUITE_URL"])
    ready = False

    def test_once():
        with engine.begin() as connection:
            connection.exec_driver_sql("INSERT INTO orgs (id, name) VALUES (5, 'unique')")

    def test_needs_a_later_test():
        assert ready

    def test_later():
        global ready
        ready = True

    def test_innocent():
        import warnings
        warnings.warn("of the suite")
        with Path("drawn").open("a") as file:
            print(random.random(), file=file)
        with engine.begin() as connection:
            connection.exec_driver_sql("INSERT INTO orgs (id, name) VALUES (6, 'gone')")
            connection.rollback()
"""


@sqlite_only
def test_who_passes_once_or_in_one_order_only_is_told_with_the_line_that_shows_it(suite):
    suite.write("conftest.py", "")
    suite.write("test_all.py", ORDERED)
    alone = ("-x", "--maxfail=9", "--junitxml=junit.xml", "-W", "default")
    ended, found, report = audited(suite, "--tidy-audit-seeds=1", *alone, COLUMNS="70", **BARE)
    assert (ended.outcomes["failed"], ended.outcomes["passed"]) == (1, 3)
    assert [each[0] for each in found.pop("test_once")] == ["twice", "leaves"]
    assert [each[0] for each in found.pop("test_needs_a_later_test")] == ["order"]
    assert found == {}
    said = {c["test"].rpartition("::")[2]: c["findings"][0] for c in report["culprits"]}
    assert said["test_once"]["said"].startswith("passes the first time, fails once more")
    assert said["test_once"]["proof"] == "proved by 2 runs on a changed database"
    needs = said["test_needs_a_later_test"]
    assert needs["said"] == "fails alone, passes after test_all.py::test_later"
    assert needs["proof"] == "proved by 2 runs on the same changed database"
    assert [run["seed"] for run in report["runs"]][:3] == [None, None, 1]
    assert all(run["said"] is None for run in report["runs"])
    first, *others = (suite.folder / "drawn").read_text().splitlines()
    assert set(others) == {first}, "each run has the data of the first"
    assert 'tests="4"' in (suite.folder / "junit.xml").read_text()
    # The verdict follows the progress; the suite's own warnings come after it.
    progress, _, rest = ended.text.partition(" tidyrows audit ")
    verdict, _, rest = rest.partition("warnings summary")
    assert "of the suite" not in progress + verdict
    assert "of the suite" in rest
    assert max(map(len, verdict.splitlines()[1:-1])) <= 70
    again = suite.pytest("--tidy-audit-order", "1", *alone, **BARE)
    assert (again.outcomes["failed"], again.outcomes["passed"]) == (1, 3)
    assert "needs_a_later_test" not in again.text


@pytest.mark.soak
@sqlite_only
def test_a_run_that_does_not_end_is_ended_and_said(suite):
    suite.write(
        "test_all.py",
        """
        import threading
        from pathlib import Path

        def test_quick():
            pass

        def test_hangs_the_second_time():
            if Path("once").exists():
                threading.Event().wait()
            Path("once").touch()
        """,
    )
    suite.write("conftest.py", "import tidyrows.testing.pytest_audit as h\nh._PATIENCE = 1.0\n")
    _ended, found, report = audited(suite, "--tidy-audit-seeds=1", **BARE)
    assert found == {}
    assert all("it was ended after" in run["said"] for run in report["runs"][1:])


@sqlite_only
def test_several_workers_are_refused(suite):
    suite.write("conftest.py", "")
    ended = suite.pytest("--tidy-audit", "-n", "2")
    assert ended.code == pytest.ExitCode.USAGE_ERROR
    assert "add -n0" in ended.text
