"""The pytest plugin as users have it: suites of their own, run by pytest in another process."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sqlalchemy as sa

from harness.ledgers import Worker
from harness.suites import Suite
from harness.targets import mostly_on, on
from tidyrows import find_orphans, sweep

pytestmark = pytest.mark.slow

sqlite_only = on("sqlite")

TEN = """
    import pytest
    from models import OrgFactory, UserFactory

    @pytest.mark.parametrize("n", range(10))
    def test_users(tidy, n):
        UserFactory.create_batch(2)
        assert len(tidy.tracker) == 4
"""


@pytest.fixture
def suite(tmp_path, outside):
    return Suite(tmp_path, outside)


def tracked_away(suite):
    """Whether nothing of the suite is left, not even in the ledger."""
    return suite.rows() == suite.before and not find_orphans(suite.url)


# --- one process


def test_what_a_test_creates_is_gone_after_it(suite):
    suite.write("test_users.py", TEN)
    ended = suite.pytest()
    assert ended.outcomes == {"passed": 10}
    assert suite.rows() == suite.before
    assert ended.summary == ["40 row(s) created in 10 test(s), 40 deleted"]


@mostly_on("postgresql+psycopg")
def test_what_the_application_made_in_another_process_is_gone_too(suite):
    suite.write(
        "app.py",
        """
        import os, sys
        import sqlalchemy as sa

        with sa.create_engine(os.environ["SUITE_URL"]).begin() as connection:
            connection.exec_driver_sql(
                f"INSERT INTO users (email, org_id) VALUES ('app', {sys.argv[1]})"
            )
        """,
    )
    suite.write(
        "test_app.py",
        """
        import subprocess, sys
        from models import OrgFactory

        def test_app(tidy):
            subprocess.run([sys.executable, "app.py", str(OrgFactory().id)], check=True)
        """,
    )
    ended = suite.pytest()
    assert ended.outcomes == {"passed": 1}
    assert suite.rows() == suite.before
    assert ended.summary == [
        "1 row(s) created in 1 test(s), 2 deleted (1 of them made by the application)"
    ]


@mostly_on("sqlite")
def test_a_test_that_fails_is_cleaned_and_fails_as_itself(suite):
    suite.write(
        "test_users.py",
        """
        from models import UserFactory

        def test_fails(tidy):
            UserFactory()
            raise LookupError("mine")
        """,
    )
    ended = suite.pytest()
    assert ended.outcomes == {"failed": 1}
    assert "LookupError: mine" in ended.text
    assert suite.rows() == suite.before


@mostly_on("postgresql+psycopg")
def test_a_cleanup_that_fails_is_an_error_of_its_own_beside_the_tests(suite):
    suite.write(
        "test_users.py",
        """
        import os
        import pytest
        import sqlalchemy as sa
        from models import OrgFactory

        pytestmark = pytest.mark.tidy(protect=["users"])

        def needed():
            org = OrgFactory()
            with sa.create_engine(os.environ["SUITE_URL"]).begin() as connection:
                connection.exec_driver_sql(
                    f"INSERT INTO users (email, org_id) VALUES ('protected{org.id}', {org.id})"
                )

        def test_fails(tidy):
            needed()
            raise LookupError("mine")

        def test_passes(tidy):
            needed()
        """,
    )
    ended = suite.pytest()
    assert ended.outcomes == {"failed": 1, "passed": 1, "error": 2}
    assert "LookupError: mine" in ended.text
    assert "ERROR at teardown of test_passes" in ended.text
    assert ended.text.count("1 tracked row(s) are still there") >= 2
    assert ended.summary[0] == "2 row(s) created in 2 test(s), 0 deleted, 2 leaked"
    (left,) = [line for line in ended.summary if line.startswith("rows that tests left")]
    assert left.endswith(".orgs 2 left over")


@sqlite_only
def test_where_nothing_was_created_nothing_is_said(suite):
    suite.write(
        "test_empty.py", "def test_nothing(tidy):\n    pass\n\ndef test_other():\n    pass\n"
    )
    assert suite.pytest().summary == []
    assert "tidyrows" not in suite.pytest().text


@sqlite_only
def test_a_suite_that_asks_for_nothing_loads_nothing(suite):
    suite.write(
        "test_empty.py",
        """
        import sys

        def test_nothing():
            assert "pytest_tidyrows" in sys.modules
            assert "tidyrows" not in sys.modules
        """,
    )
    suite.write("conftest.py", "")
    assert suite.pytest().outcomes == {"passed": 1}
    assert suite.pytest("-n", "1").outcomes == {"passed": 1}


@sqlite_only
@pytest.mark.parametrize("how", ["option", "ini"])
def test_a_url_is_enough(suite, how):
    suite.write("conftest.py", "")
    suite.write("test_users.py", TEN)
    if how == "ini":
        suite.write("pytest.ini", f"[pytest]\ntidy_url = {suite.url}\n")
    ended = suite.pytest(*([f"--tidy-url={suite.url}"] if how == "option" else []))
    assert ended.outcomes == {"passed": 10}
    assert suite.rows() == suite.before


@sqlite_only
def test_without_a_database_it_says_what_to_write(suite):
    suite.write("conftest.py", "")
    suite.write("test_users.py", TEN)
    ended = suite.pytest()
    assert ended.outcomes == {"error": 10}
    assert "define a session fixture tidy_engine" in ended.text
    assert "Traceback" not in ended.text


@sqlite_only
def test_the_suite_of_the_page_runs(suite):
    """The blocks of docs/pytest.md that begin with a file's name, together."""
    page = Path(__file__).parent.parent.parent / "docs" / "pytest.md"
    files = {}
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page.read_text(), re.DOTALL):
        files[name] = files.get(name, "") + code
    assert files.keys() == {"conftest.py", "test_users.py", "test_async.py"}
    for name, code in files.items():
        suite.write(name, code)
    ended = suite.pytest("-n", "2", "-p", "asyncio", "-o", "asyncio_mode=auto")
    assert ended.outcomes == {"passed": 4}
    with sa.create_engine(f"sqlite:///{suite.folder}/suite.db").connect() as connection:
        for table in ("users", "orgs"):
            assert not connection.exec_driver_sql(f"SELECT * FROM {table}").all()


@sqlite_only
@pytest.mark.parametrize("scope", ["worker", "run"])
def test_shared_rows_over_an_asynchronous_engine_are_refused(suite, scope):
    suite.write("test_shared.py", SHARED.replace("SCOPE", scope))
    suite.write(
        "conftest.py",
        """
        import pytest
        from sqlalchemy.ext.asyncio import create_async_engine

        @pytest.fixture(scope="session")
        def tidy_engine():
            return create_async_engine("sqlite+aiosqlite:///other.db")
        """,
    )
    ended = suite.pytest()
    assert ended.outcomes == {"error": 6}
    assert f"tidy_{scope} cannot await" in ended.text


# --- marks and options


@sqlite_only
def test_marks_closer_to_the_test_have_the_last_word(suite):
    suite.write(
        "test_marks.py",
        """
        import pytest
        from tidyrows import Dependents

        pytestmark = pytest.mark.tidy(verify=False, dependents=Dependents.ERROR)

        def test_module(tidy):
            assert tidy.cleanup.options.dependents is Dependents.ERROR
            assert not tidy.cleanup.options.verify

        @pytest.mark.tidy(verify=True, ledger=True)
        def test_own(tidy):
            assert tidy.cleanup.options.dependents is Dependents.ERROR
            assert tidy.cleanup.options.verify
            assert tidy.tracker.journals
        """,
    )
    assert suite.pytest().outcomes == {"passed": 2}


@sqlite_only
def test_a_mark_that_is_misspelt_is_said(suite):
    suite.write(
        "test_marks.py",
        """
        import pytest

        @pytest.mark.tidy(keep_on_failures=True)
        def test_it(tidy):
            pass
        """,
    )
    ended = suite.pytest()
    assert ended.outcomes == {"error": 1}
    assert "takes no keep_on_failures=. Did you mean keep_on_failure=?" in ended.text
    assert "keep_on_failure," in ended.text


@pytest.mark.parametrize("by", ["option", "mark"])
@mostly_on("postgresql+psycopg")
def test_rows_of_a_failed_test_are_kept_where_asked_and_only_those(suite, by):
    mark = "@pytest.mark.tidy(keep_on_failure=True)" if by == "mark" else ""
    suite.write(
        "test_users.py",
        f"""
        import pytest
        from models import OrgFactory

        {mark}
        def test_fails(tidy):
            OrgFactory()
            raise LookupError

        {mark}
        def test_passes(tidy):
            OrgFactory()
        """,
    )
    ended = suite.pytest(*(["--tidy-keep"] if by == "option" else []))
    assert ended.outcomes == {"failed": 1, "passed": 1}
    assert ended.summary[0] == "2 row(s) created in 2 test(s), 1 deleted, 1 kept"
    assert ended.summary[1].endswith(".orgs 1 kept for study")
    (name,) = re.findall(r"kept='(\w+)'", ended.text)
    (orphans,) = find_orphans(suite.url)
    assert (orphans.kept, sum(orphans.rows.values())) == (name, 1)
    assert sweep(suite.url, kept=name).total_deleted == 1
    assert tracked_away(suite)


@sqlite_only
def test_the_report_counts_by_table(suite):
    suite.write("test_users.py", TEN)
    ended = suite.pytest("--tidy-report")
    assert "  main.orgs: 20 created, 20 deleted" in ended.summary
    assert "  main.users: 20 created, 20 deleted" in ended.summary
    assert re.search(
        r"^  cleanup took [\d.]+ s: test_users.py::test_users", ended.text, re.MULTILINE
    )


@pytest.mark.parametrize("looked", ["on", "off"])
@sqlite_only
def test_the_look_afterwards_may_be_left_out(suite, looked):
    suite.write(
        "test_it.py",
        f"def test_it(tidy):\n    assert tidy.cleanup.options.verify is {looked == 'on'}\n",
    )
    assert suite.pytest(f"--tidy-verify={looked}").outcomes == {"passed": 1}


# --- shared rows


SHARED = """
    import pytest
    from models import OrgFactory, UserFactory

    @pytest.fixture(scope="session")
    def org(tidy_SCOPE):
        return tidy_SCOPE.once("org", lambda: OrgFactory().id)

    @pytest.mark.parametrize("n", range(6))
    def test_shared(org, tidy, tidy_engine, n):
        UserFactory(org_id=org)
        assert len(tidy.tracker) == 1
        with tidy_engine.connect() as connection:
            found = connection.exec_driver_sql("SELECT count(*) FROM orgs").scalar()
        assert found >= 2  # the stranger's and ours
"""


@pytest.mark.parametrize("scope", ["worker", "run"])
@pytest.mark.parametrize("processes", [0, 2])
@mostly_on("postgresql+psycopg")
def test_shared_rows_stay_until_the_end_and_no_longer(suite, scope, processes):
    suite.write("test_shared.py", SHARED.replace("SCOPE", scope))
    ended = suite.pytest("-n", str(processes))
    assert ended.outcomes == {"passed": 6}
    assert suite.rows() == suite.before
    made = 6 + (1 if scope == "run" or not processes else 2)
    assert re.match(rf"{made} row\(s\) created", ended.summary[0])
    if processes:
        assert tracked_away(suite)


@sqlite_only
def test_what_is_no_json_is_refused_where_other_workers_must_be_told(suite):
    suite.write("test_shared.py", SHARED.replace("SCOPE", "run").replace("().id)", "())"))
    ended = suite.pytest("-n", "2")
    assert "passed" not in ended.outcomes
    assert "Return keys or names instead" in ended.text
    assert suite.rows() == suite.before


# --- several processes


@pytest.mark.parametrize("dist", ["worksteal", pytest.param("loadfile", marks=pytest.mark.soak)])
@mostly_on("mysql+pymysql")
def test_workers_leave_nothing_however_tests_are_dealt_out(suite, dist):
    suite.write("test_users.py", TEN)
    suite.write("test_more.py", TEN)
    ended = suite.pytest("-n", "2", "--dist", dist)
    assert ended.outcomes == {"passed": 20}
    assert ended.summary == ["80 row(s) created in 20 test(s), 80 deleted"]
    assert tracked_away(suite)


@mostly_on("postgresql+psycopg")
@pytest.mark.parametrize(
    "end",
    [
        pytest.param("os._exit(3)", marks=pytest.mark.soak),
        "os.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_what_a_crashed_worker_left_is_swept_when_it_goes_down(suite, end):
    suite.write(
        "test_crash.py",
        SHARED.replace("SCOPE", "run").replace(
            "        assert len",
            f"        if n == 2:\n            import os, signal; {end}\n        assert len",
        ),
    )
    ended = suite.pytest("-n", "2")
    assert ended.outcomes == {"passed": 5, "failed": 1}
    assert re.search(r"worker gw\d crashed: .*users 1 deleted", "\n".join(ended.summary))
    assert tracked_away(suite)


@mostly_on("sqlite")
def test_a_run_that_is_interrupted_leaves_nothing(suite):
    """Ctrl-C: pytest tears down what is set up."""
    suite.write(
        "test_users.py",
        """
        from models import UserFactory

        def test_interrupted(tidy):
            UserFactory()
            raise KeyboardInterrupt
        """,
    )
    ended = suite.pytest("-n", "2")
    assert ended.code == 2
    assert tracked_away(suite)


@mostly_on("postgresql+psycopg")
def test_what_dead_runs_left_goes_before_the_first_test_if_asked(suite):
    suite.write(
        "test_dies.py",
        """
        import os
        from models import UserFactory

        def test_dies(tidy):
            UserFactory()
            os._exit(1)
        """,
    )
    suite.write("pytest.ini", "[pytest]\ntidy_ledger = on\n")
    suite.pytest()
    assert suite.rows() != suite.before
    suite.write("test_dies.py", TEN)
    ended = suite.pytest("--tidy-sweep")
    assert ended.outcomes == {"passed": 10}
    assert any("swept before the first test" in line for line in ended.summary)
    assert tracked_away(suite)


@sqlite_only
def test_what_such_a_sweep_cannot_delete_is_said_and_fails_no_test(suite, database, ledgers):
    dead = Worker(database, ledgers)
    with dead, dead.engine.begin() as connection:
        connection.exec_driver_sql("SELECT 1")
        users = sa.Table("users", sa.MetaData(), autoload_with=connection)
        row = {"email": "dead", "org_id": 900000}
        key = connection.execute(sa.insert(users), row).inserted_primary_key[0]
    dead.dies()
    with suite.engine.begin() as connection:  # a stranger's by now, since it looks otherwise
        change = f"UPDATE users SET email = 'changed' WHERE id = {key}"
        connection.exec_driver_sql(change)
    suite.write("test_users.py", TEN)
    ended = suite.pytest("--tidy-sweep")
    assert ended.outcomes == {"passed": 10}
    assert any("not all that dead runs left" in line for line in ended.summary)
