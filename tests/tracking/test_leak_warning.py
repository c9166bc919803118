"""A tracker that ends with rows that nobody will delete says so, and names them."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import sqlalchemy as sa

import tidyrows
from harness import forks
from harness.blocks import insert
from tidyrows import CleanupError, CleanupManager, Ledger, ResourceTracker

METADATA = sa.MetaData()
THINGS = sa.Table("things", METADATA, sa.Column("id", sa.Integer, primary_key=True))
NOTES = sa.Table("notes", METADATA, sa.Column("text", sa.String(20)))


def said_of(make):
    """What is said once the tracker is garbage."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gc.freeze()  # what is older is not looked through
        try:
            make()
            gc.collect()
        finally:
            gc.unfreeze()
    return [str(each.message) for each in caught if each.category is ResourceWarning]


@pytest.fixture
def things(engine):
    METADATA.create_all(engine)
    return engine


def test_rows_and_resources_are_named(things):
    def forget():
        tracker = ResourceTracker(things)
        tracker.start()
        insert(things, (THINGS, [{"id": n} for n in (3, 4)]), (NOTES, [{"text": "a"}]))
        tracker.track_external("account", {"id": "not shown"})
        tracker.stop()

    (said,) = said_of(forget)
    for part in ("4 row(s)", "things(3)", "things(4)", "1 of", "notes", "account #1", "with Cl"):
        assert part in said
    assert "not shown" not in said


@pytest.mark.parametrize("way", ["start", "with", "stack", "again"])
def test_the_line_that_started_it_is_named(things, way):
    """The tag alone does not tell one tracker of a test from another."""
    lines = []

    def forget():
        tracker = ResourceTracker(things)
        here = sys._getframe()
        if way == "again":
            tracker.start().stop()
        with contextlib.ExitStack() as stack:
            if way == "stack":
                stack.enter_context(Unclean(tracker)), lines.append(here.f_lineno)
            elif way == "with":
                with Unclean(tracker), contextlib.nullcontext(lines.append(here.f_lineno)):
                    insert(things, (THINGS, [{"id": 1}]))
                return
            else:
                tracker.start(), lines.append(here.f_lineno)
            insert(things, (THINGS, [{"id": 1}]))
            tracker.stop()

    (said,) = said_of(forget)
    assert f", started at {__file__}:{lines[0]}, is gone" in said


class Unclean(CleanupManager):
    """Deletes nothing."""

    def __exit__(self, *_):
        self.tracker.stop()


def test_with_a_ledger_a_sweep_is_the_remedy(things):
    ledger = Ledger(things)
    ledger.install()

    def forget():
        tracker = ResourceTracker(things, ledger=ledger)
        tracker.start()
        insert(things, (THINGS, [{"id": 1}]))
        tracker.stop()

    (said,) = said_of(forget)
    assert "sweep(engine) deletes them once this process has ended" in said
    ledger.close()


def test_a_tracker_that_was_cleaned_says_nothing(things):
    def clean():
        with CleanupManager(ResourceTracker(things)):
            insert(things, (THINGS, [{"id": 1}]))

    assert said_of(clean) == []


def test_what_an_error_has_said_is_not_said_again(things):
    children = sa.Table(
        "children",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("thing", sa.ForeignKey(THINGS.c.id), nullable=False),
    )
    children.create(things)

    def leave():
        tracker = ResourceTracker(things)
        with pytest.raises(CleanupError):
            with CleanupManager(tracker, protect=["children"]):
                insert(things, (THINGS, [{"id": 1}]))
                with things.connect() as connection:  # by somebody whom nobody hears
                    raw = connection.connection.cursor()
                    raw.execute("INSERT INTO children (id, thing) VALUES (1, 1)")
                    connection.connection.commit()

    assert said_of(leave) == []


def test_the_end_of_the_process_is_an_end_too(things):
    url = things.url.render_as_string(hide_password=False)
    source = str(Path(tidyrows.__file__).parent.parent)
    code = f"""
        import sqlalchemy as sa
        from tidyrows import ResourceTracker
        engine = sa.create_engine({url!r})
        things = sa.Table("things", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
        tracker = ResourceTracker(engine)
        tracker.start()
        with engine.begin() as connection:
            connection.execute(sa.insert(things).values(id=7))
        tracker.stop()
    """
    done = forks.run(
        [sys.executable, "-W", "default", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": source},
        check=True,
    )
    assert "ResourceWarning" in done.stderr
    assert "things(7)" in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_says_nothing_of_its_parents_rows(things, capfd):
    tracker = ResourceTracker(things)
    with CleanupManager(tracker):
        insert(things, (THINGS, [{"id": 1}]))
        child = os.fork()
        if not child:
            warnings.simplefilter("always")
            tracker._leak_warning()  # as at the end of a process
            os._exit(0)
        os.waitpid(child, 0)
    assert "ResourceWarning" not in capfd.readouterr().err
