"""What a run says at its end of the rows that its tests leave, compared with the database.

The suites run in this process, with pytest's own fixture for tests of plugins.
"""

from __future__ import annotations

import atexit
import json
import random
import re
import sys
import textwrap
import unittest
from typing import NamedTuple

import pytest
import sqlalchemy as sa

from harness.targets import on
from tidyrows import CleanupManager, ResourceTracker
from tidyrows.testing import TidyTestCase, unittest_case

pytest_plugins = ["pytester"]

SUITE = '''
import json
import os

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

metadata = sa.MetaData()


def table(name, *columns):
    key = sa.Column("id", sa.Integer, primary_key=True)
    return sa.Table(name, metadata, key, sa.Column("name", sa.String(40)), *columns)


parents = table("parents")
notes = table("notes", sa.Column("parent_id", sa.ForeignKey("parents.id")))
items = table("items", sa.Column("parent_id", sa.ForeignKey("parents.id"), nullable=False))
logs = table("logs")
engine = sa.create_engine(os.environ["SUITE_URL"], poolclass=NullPool)
open_ones = []


@pytest.fixture(scope="session")
def tidy_engine():
    metadata.create_all(engine)
    yield engine
    while open_ones:
        open_ones.pop().commit()


def in_another_process(*statements):
    """What nobody in this process sees."""
    arguments, options = engine.dialect.create_connect_args(engine.url)
    connection = engine.dialect.loaded_dbapi.connect(*arguments, **options)
    cursor = connection.cursor()
    for statement in statements:
        cursor.execute(statement)
    connection.commit()
    connection.close()


def commit(table, **values):
    with engine.begin() as connection:
        return connection.execute(sa.insert(table).values(**values)).inserted_primary_key[0]


def is_detached():
    parent = commit(parents, name="p")
    in_another_process(f"INSERT INTO notes (name, parent_id) VALUES ('theirs', {parent})")


def is_deleted_with_its_parent():
    parent = commit(parents, name="p")
    in_another_process(f"INSERT INTO items (name, parent_id) VALUES ('theirs', {parent})")


def raw(sql, times=1):
    with engine.begin() as connection:
        for _ in range(times):
            connection.execute(sa.text(sql))


def late():
    while open_ones:
        open_ones.pop().commit()
    connection = engine.connect()
    connection.execute(sa.insert(logs).values(name="late"))
    open_ones.append(connection)


def rekeyed():
    commit(parents, name="ours")
    moved = sa.update(parents).where(parents.c.name == "ours").values(name="moved")
    with engine.begin() as connection:
        connection.execute(moved.values(id=parents.c.id + 1000))
        again = sa.update(parents).where(parents.c.name == "moved")
        connection.execute(again.values(id=parents.c.id + 1))


def rolled_back():
    with engine.connect() as connection:
        connection.execute(sa.text("INSERT INTO logs (name) VALUES ('never')"))


def kept():
    commit(logs, name="kept")
    raise LookupError("mine")


ACTIONS = {
    "commits": lambda: commit(logs, name="ours"),
    "is detached": is_detached,
    "goes with its parent": is_deleted_with_its_parent,
    "raw": lambda: raw("INSERT INTO logs (name) VALUES ('raw'), ('raw')"),
    "raw and referenced": lambda: raw(
        f"INSERT INTO items (name, parent_id) VALUES ('raw', {commit(parents, name='p')})"
    ),
    "raw and updated": lambda: (
        raw("INSERT INTO logs (name) VALUES ('short')"),
        raw("UPDATE logs SET name = 'long' WHERE name = 'short'"),
    ),
    "rekeyed": rekeyed,
    "raw and deleted": lambda: (
        raw("INSERT INTO parents (name) VALUES ('short')"),
        raw("DELETE FROM parents WHERE name = 'short'"),
    ),
    "raw and nothing": lambda: raw(
        "INSERT INTO parents (name) SELECT name FROM logs WHERE name = 'nobody'"
    ),
    "rolled back": rolled_back,
    "late": late,
    "kept": kept,
}
PLAN = json.loads(os.environ["PLAN"])


@pytest.mark.filterwarnings("ignore::tidyrows.UntrackedRowsWarning")
@pytest.mark.filterwarnings("ignore::tidyrows.LateCommitWarning")
@pytest.mark.parametrize("actions", PLAN, ids=[str(n) for n in range(len(PLAN))])
def test_it(actions, FIXTURE):
    for action in actions:
        ACTIONS[action]()
'''


_ONLY = ("-p", "no:cacheprovider", "-p", "pytest_tidyrows")


class Said(NamedTuple):
    """The end of a run."""

    code: int
    lines: list[str]

    @property
    def residue(self) -> dict[str, list[tuple[int, bool, str]]]:
        """By table the number, whether that is only the most it can be, and the reason."""
        found: dict[str, list[tuple[int, bool, str]]] = {}
        for line in self.lines:
            head, _, rest = line.partition("rows that tests left: ")
            for part in rest.split(", ") if rest and not head else ():
                text = re.fullmatch(r"\S*?(\w+) (up to )?(\d+) (.+)", part)
                assert text, part
                found.setdefault(text[1], []).append((int(text[3]), bool(text[2]), text[4]))
        return found


@pytest.fixture
def run(pytester, monkeypatch, database, outside):
    """Runs a suite, in this process, on an empty database."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_TESTRUNUID", "TIDYROWS_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("SUITE_URL", database.url.render_as_string(hide_password=False))

    def run(plan, *arguments, fixture="tidy", text=SUITE):
        monkeypatch.setenv("PLAN", json.dumps(plan))
        pytester.makepyfile(test_suite=text.replace("FIXTURE", fixture))
        ended = pytester.runpytest_inprocess(*_ONLY, *arguments)
        sys.modules.pop("test_suite", None)
        lines = ended.outlines
        start = next((n for n, line in enumerate(lines) if "= tidyrows =" in line), len(lines))
        own = [line for line in lines[start + 1 :] if not line.startswith("=")]
        return Said(int(ended.ret), own)

    return run


def counts(engine):
    """How many rows there are in each table of the suite."""
    with engine.connect() as connection:
        return {
            name: connection.scalar(sa.text(f"SELECT count(*) FROM {name}"))
            for name in ("parents", "notes", "items", "logs")
        }


def assert_accounted_for(said, engine):
    """What the run says is what the database has."""
    for table, count in counts(engine).items():
        of_table = said.residue.get(table, [])
        exact = sum(number for number, most, _why in of_table if not most)
        upper = sum(number for number, _most, _why in of_table)
        assert exact <= count <= upper, (table, count, said.lines)
        assert bool(count) == bool(of_table), (table, count, said.lines)


QUIET = ["commits", "is detached", "goes with its parent", "raw and nothing", "rolled back"]
RAW = ["raw", "raw and referenced", "raw and deleted"]


def plan_of(seed, *more):
    chosen = random.Random(seed)
    kinds = [*QUIET, *RAW, *more]
    return [chosen.choices(kinds, k=chosen.randint(1, 3)) for _ in range(chosen.randint(3, 8))]


@on("sqlite")
@pytest.mark.parametrize("seed", range(4))
def test_a_run_accounts_for_every_row_that_is_left(run, outside, seed):
    said = run(plan_of(seed))
    assert_accounted_for(said, outside)


@on("sqlite")
@pytest.mark.parametrize("seed", range(2))
def test_so_does_a_suite_that_does_not_use_tidyrows(run, outside, seed):
    said = run(plan_of(seed), "-o", "tidy_autouse=true", fixture="tidy_engine")
    assert_accounted_for(said, outside)


@on("postgresql+psycopg", "mysql+pymysql")
@pytest.mark.parametrize("arguments", [(), ("-o", "tidy_autouse=true")], ids=["tidy", "autouse"])
def test_so_does_one_with_late_commits(run, outside, arguments):
    said = run([*plan_of(1, "late"), ["late"]], *arguments, fixture="tidy, tidy_engine")
    assert_accounted_for(said, outside)
    assert not any(why == "committed late" for each in said.residue.values() for *_, why in each)


@on("sqlite")
def test_rows_whose_keys_nobody_knows_are_the_test_s_own_and_are_said(run, outside):
    """Migrations do this: they insert their version, and rename it with SQL's own values."""
    plan = [["raw and updated", "rekeyed"]]
    said = run(plan, "-o", "tidy_autouse=true", fixture="tidy_engine")
    assert_accounted_for(said, outside)
    assert counts(outside) == {"parents": 1, "notes": 0, "items": 0, "logs": 1}
    assert "had not made them" not in "\n".join(said.lines)


@on("sqlite")
def test_the_line_names_tables_numbers_and_reasons_and_the_ini_file_what_becomes_of_it(
    run, outside
):
    plan = [["is detached"], ["is detached", "raw"], ["kept"]]
    kept = ("--tidy-keep", "-o", "tidy_ledger=off")
    said = run(plan, *kept)
    assert [line for line in said.lines if "left" in line] == [
        (
            "rows that tests left: main.logs 1 kept for study, main.logs up to 2 not tracked, "
            "main.notes 2 detached"
        )
    ]
    (detached,) = (line for line in said.lines if line.startswith("  main.notes"))
    assert detached == (
        '  main.notes detached: test_suite.py::test_it[0] and 1 other test(s) (own=["notes"] '
        "deletes them)"
    )
    with outside.begin() as connection:
        for name in ("notes", "logs"):
            connection.execute(sa.text(f"DELETE FROM {name}"))
    assert run([["is detached"]], "-o", "tidy_residue=fail").code == 1
    said = run([["is detached"]], "-o", "tidy_residue=ignore")
    assert (said.code, said.residue) == (0, {})
    assert run([["commits"]], "-o", "tidy_residue=fail").code == 0
    assert run([["commits"]], "-o", "tidy_residue=no").code == pytest.ExitCode.USAGE_ERROR


@on("sqlite")
def test_what_is_deleted_by_the_end_of_the_run_is_not_said(run, outside):
    """Rows that a later test took, and rows that raw SQL made and `track_query` named."""
    later = textwrap.dedent(
        """
        def test_zz_it_takes_them(tidy):
            tidy.tracker.track_query(sa.select(notes))
            raw("INSERT INTO logs (name) VALUES ('raw')")
            tidy.tracker.track_query(sa.select(logs))
        """
    )
    with outside.begin() as connection:
        connection.execute(sa.text("CREATE TABLE logs (id INTEGER PRIMARY KEY, name VARCHAR(40))"))
    said = run([["is detached"]], "-W", "ignore", text=SUITE + later)
    assert said.residue == {}
    assert counts(outside) == {"parents": 0, "notes": 0, "items": 0, "logs": 0}


@on("sqlite")
def test_workers_of_xdist_tell_their_controller(run, outside):
    plan = [["is detached"], ["is detached", "raw"], ["raw and deleted"]]
    said = run(plan, "-p", "xdist", "-n", "1")
    assert_accounted_for(said, outside)
    assert said.residue["notes"] == [(2, False, "detached")]


@on("postgresql+psycopg", "mysql+pymysql")  # SQLite has one writer
def test_rows_that_are_committed_while_a_cleanup_runs_are_deleted_by_it(engine):
    """No warning either, which would be an error here."""
    logs = sa.Table("logs", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    logs.create(engine)
    with engine.connect() as late:

        def commit(progress):
            if progress.done:
                late.commit()

        with CleanupManager(ResourceTracker(engine), on_progress=commit) as cleanup:
            late.execute(sa.insert(logs).values())
            with engine.begin() as connection:
                connection.execute(sa.insert(logs).values())
    assert cleanup.report.total_deleted == 2
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(logs)) == 0


MIGRATED = """

@pytest.fixture(scope="session", autouse=True)
def migrated(tidy_engine):
    number = sa.Column("number", sa.String(9), primary_key=True)
    version = sa.Table("versions", sa.MetaData(), number)
    with engine.begin() as connection:
        connection.execute(sa.update(version).where(version.c.number == "1").values(number="2"))
        connection.execute(sa.insert(version).values(number="branch"))
        connection.execute(sa.update(version).values(number=version.c.number + "."))
        connection.execute(sa.text("INSERT INTO logs (name) SELECT name FROM parents"))
        connection.execute(sa.text("INSERT INTO logs (name) VALUES ('a'), ('b')"))
        connection.execute(sa.text("UPDATE logs SET name = 'c' WHERE name = 'b'"))
"""


@on("sqlite")
def test_migrations_of_a_session_fixture_are_one_line(run, outside):
    with outside.begin() as connection:
        connection.execute(sa.text("CREATE TABLE versions (number VARCHAR(9) PRIMARY KEY)"))
        connection.execute(sa.text("INSERT INTO versions VALUES ('1')"))
    said = run([["commits"]], "-o", "tidy_autouse=true", fixture="migrated", text=SUITE + MIGRATED)
    assert said.lines == [
        "1 test(s) left 1 row(s), all deleted",
        "  main.logs: 1",
        "most of them:",
        "  1 by test_suite.py::test_it[0]",
        (
            "rows that stay, made before the first test or by session fixtures: main.versions 1, "
            "main.logs up to 2"
        ),
    ]


@on("sqlite")
def test_what_cases_of_unittest_leave_is_printed_when_the_process_ends(
    engine, outside, monkeypatch, capfd
):
    metadata = sa.MetaData()
    key = sa.Column("id", sa.Integer, primary_key=True)
    parents = sa.Table("parents", metadata, key, sa.Column("name", sa.String(9)))
    notes = sa.Table(
        "notes",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("of", sa.ForeignKey("parents.id")),
    )
    metadata.create_all(engine)
    at_exit = unittest_case.ResidueOfProcess()
    monkeypatch.setattr(unittest_case, "RESIDUE", at_exit)

    class Case(TidyTestCase):
        tidy_engine = engine

        def test_it(self):
            with engine.begin() as connection:
                made = connection.execute(sa.insert(parents).values(name="ours"))
            with outside.begin() as connection:
                connection.execute(sa.insert(notes).values(of=made.inserted_primary_key[0]))

    for _ in range(2):
        ran = unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(Case))
        assert ran.wasSuccessful(), ran.errors
    with outside.begin() as connection:
        connection.execute(sa.delete(notes).where(notes.c.id == 1))
    at_exit.print()
    at_exit.print()
    said = [line for line in capfd.readouterr().err.splitlines() if "notes" in line]
    assert said[0] == "rows that tests left: main.notes 1 detached"
    assert said[1:] == [line for line in said if line.endswith('(own=["notes"] deletes them)')]
    assert len(said) == 2
    atexit.unregister(at_exit.print)
