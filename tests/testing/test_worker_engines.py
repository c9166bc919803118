"""Suites whose engine is ``worker_engine``: what a test leaves open, and a server that is away."""

from __future__ import annotations

import pytest

from harness.suites import Suite
from harness.targets import on

pytestmark = pytest.mark.slow

CONFTEST = """
    import os
    import pytest
    import tidyrows

    engine = tidyrows.worker_engine(os.environ["SUITE_URL"], reserve=0)

    @pytest.fixture(scope="session")
    def tidy_engine():
        yield engine
        print(tidyrows.pool_report(engine))
        engine.dispose()
"""
LEAKY = """
    import sqlalchemy as sa
    from conftest import engine
    from models import Org

    kept = []

    def test_leaks({fixture}):
        connection = engine.connect()
        connection.execute(sa.insert(Org).values(name="mine"))
        connection.commit()
        connection.execute(sa.update(Org).where(Org.name == "mine").values(name="locked"))
        kept.append(connection)

    def test_the_next_one({fixture}):
        with engine.begin() as connection:
            assert connection.scalar(sa.select(Org.id).where(Org.name == "mine")) is None
"""


@pytest.mark.parametrize(("ini", "fixture"), [("", "tidy"), ("tidy_autouse = true", "")])
def test_a_leaked_connection_does_not_block_the_cleanup_and_is_named(
    tmp_path, outside, ini, fixture
):
    suite = Suite(tmp_path, outside)
    suite.write("pytest.ini", f"[pytest]\n{ini}\n")
    suite.write("conftest.py", CONFTEST)
    suite.write("test_leaks.py", LEAKY.format(fixture=fixture))
    ended = suite.pytest()
    assert ended.outcomes == {"passed": 2, "warning": 1}, ended.text
    assert "test_leaks.py:9 took it in test_leaks.py::test_leaks" in ended.text
    assert suite.rows() == suite.before


@on("sqlite")
def test_a_run_without_its_server_says_so_once_at_its_end(tmp_path, outside):
    suite = Suite(tmp_path, outside)
    suite.write(
        "conftest.py",
        """
        import warnings
        import pytest
        import tidyrows
        from models import Base

        @pytest.fixture(scope="session")
        def tidy_engine():
            engine = tidyrows.worker_engine(
                "postgresql+psycopg://127.0.0.1:1/app", fallback="sqlite", metadata=Base.metadata
            )
            yield engine
            engine.dispose()
        """,
    )
    suite.write(
        "test_users.py",
        """
        import pytest
        from models import OrgFactory

        @pytest.mark.parametrize("n", range(4))
        def test_org(tidy, n):
            OrgFactory()
        """,
    )
    ended = suite.pytest("-n2", CI="")
    assert ended.outcomes["passed"] == 4, ended.text
    said = "the tests ran on sqlite, since no server answers at postgresql://127.0.0.1:1/app"
    assert ended.text.count(said) == 1
    assert "TidyRowsWarning: No server answers" in ended.text
