"""Wrong calls: each is refused at the call; the error names object, cause and the next line.

A row of a table is a call and three texts of its error: the object, the cause, and what to write.
"""

from __future__ import annotations

import copy
import pickle
import sys
import unittest
from inspect import signature

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.declarative import AbstractConcreteBase
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from harness.models import Org, User
from tidyrows import (
    CleanupManager,
    Ledger,
    ResourceTracker,
    RetryPolicy,
    Scoped,
    ScopedEmail,
    ScopedInteger,
    TidyRowsError,
    TrackedFactory,
    Unique,
    WorkerContext,
    external_handler,
    find_orphans,
    sweep,
    with_retries,
)
from tidyrows.arguments import kinds_of
from tidyrows.testing import Tidy

WRITE_MANAGER = "CleanupManager(ResourceTracker(engine))"


ID = sa.Column("id", sa.Integer, primary_key=True)


def enter(manager):
    with manager:
        pytest.fail("it was entered")


class Bench:
    """What a wrong call may need: an engine with tables, a tracker of it."""

    def __init__(self, engine):
        self.engine = engine
        self.tracker = ResourceTracker(engine)

    def manager(self, **options):
        return CleanupManager(self.tracker, **options)


def options(**given):
    return lambda bench: bench.manager(**given)


MANAGER = {
    "an engine": (lambda b: CleanupManager(b.engine), "Engine", "cleans up after", WRITE_MANAGER),
    "nothing": (lambda _: CleanupManager(None), "NoneType", "cleans up after", WRITE_MANAGER),
    "retry": (options(retry=3), "retry=3", "a RetryPolicy", "retry=RetryPolicy(attempts=3)"),
    "a text as time": (options(lock_timeout="2s"), "'2s'", "number of seconds", "lock_timeout=5.0"),
    "no time": (options(lock_timeout=0), "lock_timeout=0", "above 0", "lock_timeout=5.0"),
    "nan": (options(lock_timeout=float("nan")), "=nan", "number of seconds", "lock_timeout=5.0"),
    "True as time": (options(lock_timeout=True), "=True", "number", "lock_timeout=5.0"),
    "the past": (options(deadline=-1), "deadline=-1", "at least 0", "deadline=60.0"),
    "a text as end": (options(deadline="60"), "'60'", "number of seconds", "deadline=60.0"),
    "no rows": (
        options(rows_per_transaction=0), "rows_per_transaction=0", "at least 1", "=25_000",
    ),
    "half a row": (options(rows_per_transaction=2.5), "=2.5", "whole number", "=25_000"),
    "no listener": (options(on_progress=5), "on_progress=5", "a function", "progress_bar()"),
    "a word as switch": (options(verify="no"), "verify='no'", "True or False", "verify=True"),
    "trust": (options(trust_keys="yes"), "trust_keys='yes'", "True or False", "trust_keys=True"),
    "keep": (options(keep_on_failure=1), "keep_on_failure=1", "True or False", "=True"),
    "off": (
        options(allow_foreign_keys_off="on"), "allow_foreign_keys_off='on'", "True or", "=True",
    ),
    "policy": (
        options(dependents="delete"), "dependents='delete'", "Dependents.DELETE", "Dependents.",
    ),
    "a number of tables": (options(own=5), "5", "takes a list of tables", "own=["),
    "one name": (options(own="users"), "'users'", "takes a list of tables", "own=[users]"),
    "one class": (options(protect=User), "User", "takes a list of tables", "protect=[User]"),
    "no table": (options(own=[5]), "5", "mapped classes", "own=[AuditLog]"),
    "a typo": (options(own=["usres"]), "'usres'", "no such table", "own=['users']"),
    "a class's name": (options(protect=["User"]), "'User'", "no such table", "=['users']"),
    "both": (options(own=[User], protect=["users"]), "users", "own= and in protect=", "take it"),
    "a misspelt option": (options(protects=[User]), "protects=", "takes no", "mean protect="),
    "an option of old": (options(whatever=1), "whatever=", "takes no", "It takes tracker, dep"),
}  # fmt: skip  # a row a line

TRACKER = {
    "a URL": (
        lambda _: ResourceTracker("sqlite:///x.db"), "a str", "know the database",
        "ResourceTracker(engine)",
    ),
    "None": (lambda _: ResourceTracker(None), "NoneType", "know", "ResourceTracker(engine)"),
    "no bind": (
        lambda _: ResourceTracker(sessionmaker()), "sessionmaker", "has no engine",
        "sessionmaker(engine)",
    ),
    "context": (
        lambda b: ResourceTracker(b.engine, context="gw1"), "'gw1'", "a WorkerContext",
        "context=WorkerContext.current()",
    ),
    "production": (
        lambda b: ResourceTracker(b.engine, allow_production="shop"), "'shop'", "list of names",
        "allow_production=['",
    ),
    "ledger": (
        lambda b: ResourceTracker(b.engine, ledger=[b.engine]), "Engine", "no ledger",
        "ledger=Ledger(engine)",
    ),
    "retry": (
        lambda b: ResourceTracker(b.engine, retry=5), "retry=5", "a RetryPolicy",
        "retry=RetryPolicy(attempts=3)",
    ),
    "a misspelt option": (
        lambda b: ResourceTracker(b.engine, ledgers=[]), "ledgers=", "takes no", "mean ledger=",
    ),
    "a transient object": (
        lambda b: b.tracker.track(User(email="a")), "User", "has no row yet", "Flush or commit",
    ),
    "no object": (lambda b: b.tracker.track(5), "5", "no mapped object", "track_rows("),
    "a name of a table": (
        lambda b: b.tracker.track_rows("users", [1]), "'users'", "neither a mapped class",
        "track_rows(User",
    ),
    "one key": (lambda b: b.tracker.track_rows(Org, 1), "orgs", "one value", "[key]"),
    "a text of keys": (lambda b: b.tracker.track_rows(Org, "12"), "orgs", "one value", "[key]"),
    "no key": (lambda b: b.tracker.track_rows(Org, [None]), "orgs.id", "NULL", "cannot be named"),
    "a key of another type": (
        lambda b: b.tracker.track_rows(Org, ["1"]), "'1'", "no value of main.orgs.id",
        "Give the Python value",
    ),
    "a long key": (lambda b: b.tracker.track_rows(Org, [(1, 2)]), "(1, 2)", "2 value", "Give one"),
    "a text as query": (
        lambda b: b.tracker.track_query("SELECT 1"), "'SELECT 1'", "takes a select()",
        "track_query(select(User)",
    ),
    "two models": (
        lambda b: b.tracker.track_query(sa.select(User, Org)), "query", "not select one model",
        "write select(User)",
    ),
    "late": (
        lambda b: b.tracker.track_query(sa.select(User), late="yes"), "late='yes'",
        "True or False", "late=True",
    ),
    "a template without a tag": (
        lambda b: b.tracker.track_tagged(User.email, "user"), "'user'", "another run or worker",
        "needs {tag}",
    ),
    "a number as template": (
        lambda b: b.tracker.track_tagged(User.email, 5), "template=5", "a text",
        "template='user-{tag}'",
    ),
    "whose": (
        lambda b: b.tracker.track_tagged(User.email, "u-{tag}", whose="me"), "'me'", "nobody",
        "'worker'",
    ),
    "a payload": (
        lambda b: b.tracker.track_external("file", object()), "payload", "written as JSON",
        "str(user_id)",
    ),
    "a kind": (lambda b: b.tracker.track_external(5, {}), "5", "no kind", "track_external("),
    "after": (
        lambda b: b.tracker.track_external("file", {}, after="users"), "'users'", "takes a list",
        "after=[...]",
    ),
    "preserve": (
        lambda b: b.tracker.preserve(User), "User", "takes a select()", "preserve(select(",
    ),
    "mine": (lambda b: b.tracker.mine("users"), "'users'", "neither a mapped class", "the model"),
    "a list": (
        lambda b: b.tracker.track([Org(name="a")]), "a list", "takes mapped objects", "track(*",
    ),
    "a class": (lambda b: b.tracker.track(Org), "Org", "no mapped object", "track_rows("),
    "explain": (
        lambda b: b.tracker.explain(5), "explain()", "5 is no mapped object", "track_rows(",
    ),
    "a table that is not there": (
        lambda b: b.tracker.track_rows(sa.Table("new", sa.MetaData(), ID), [1]), "new",
        "has no table", "metadata.create_all(engine)",
    ),
    "pickle": (
        lambda b: pickle.dumps(b.tracker), "ResourceTracker", "cannot be pickled", "to_json()",
    ),
    "copy": (lambda b: copy.copy(b.tracker), "ResourceTracker", "or copied", "from_json(text"),
    "a tracker as a block": (
        lambda b: enter(b.tracker), "tracker", "no block", "with CleanupManager(ResourceTracker(",
    ),
    "no JSON of ours": (
        lambda b: ResourceTracker.from_json("{}", b.engine), "to_json()", "not what",
        "tracker.to_json()",
    ),
}  # fmt: skip  # a row a line

OTHERS = {
    "no attempt": (
        lambda _: RetryPolicy(attempts=0), "attempts=0", "at least 1", "attempts=1 for no retry",
    ),
    "attempts": (lambda _: RetryPolicy(attempts="3"), "attempts='3'", "whole number", "attempts=1"),
    "wait": (lambda _: RetryPolicy(wait=1), "wait=1", "a function", "tenacity.wait_fixed(1)"),
    "bounds": (
        lambda _: RetryPolicy(base=3.0, max_wait=1.0), "max_wait=1.0", "at least 3", "max_wait=3.0",
    ),
    "no session": (
        lambda _: with_retries("users", print), "a str", "needs a transaction", "with_retries(sess",
    ),
    "no function": (lambda b: with_retries(b.engine, 5), "5", "not a function", "lambda session:"),
    "retry": (
        lambda b: with_retries(b.engine, print, retry=3), "retry=3", "RetryPolicy",
        "retry=RetryPolicy(attempts=3)",
    ),
    "a number as template": (lambda _: Scoped(5), "template=5", "a text", "'user-{tag}'"),
    "no tag": (lambda _: Scoped("user"), "'user'", "another run or worker", "needs {tag}"),
    "prefix": (lambda _: ScopedEmail(7), "prefix=7", "a text", "prefix='user'"),
    "domain": (lambda _: ScopedEmail("user", "b c"), "'b c'", "not a domain", "example.test"),
    "start": (lambda _: ScopedInteger("1"), "start='1'", "a whole number", "start=100"),
    "worker": (
        lambda _: WorkerContext("run", "gw3", "3"), "worker_index='3'", "whole number",
        "worker_index=3",
    ),
    "worker's number": (
        lambda _: WorkerContext("run", "gw3", 1000), "1000", "from 0 to 999", "TIDYROWS_WORKER_IND",
    ),
    "ledger by URL": (
        lambda _: Ledger("sqlite:///x.db"), "a str", "reached by an engine", "create_engine(url)",
    ),
    "ledger's name": (lambda b: Ledger(b.engine, name=5), "name=5", "a text", "'tidyrows_ledger'"),
    "heartbeat": (lambda b: Ledger(b.engine, beat=0), "beat=0", "above 0", "beat=2.0"),
    "no place": (lambda _: sweep(5), "place=5", "an engine, a URL or a Ledger", "place=engine"),
    "a URL of old": (
        lambda _: sweep("postgres://me:secret@db/app"), "'postgres'", "does not know",
        "postgresql+psycopg",
    ),
    "no URL": (lambda _: sweep("shop"), "text", "is no URL", "postgresql+psycopg"),
    "no such driver": (
        lambda _: sweep("mysql+missing://me:secret@db/app"), "'mysql+missing'", "does not know",
        "mysql+pymysql://",
    ),
    "a URL for Tidy": (
        lambda _: Tidy("postgre://me:secret@db/app"), "'postgre'", "does not know", "postgresql+",
    ),
    "no report yet": (
        lambda b: b.manager().report, "CleanupManager", "no report yet", "call cleanup()",
    ),
    "age": (
        lambda b: sweep(b.engine, older_than="1h"), "'1h'", "number of seconds", "older_than=3600",
    ),
    "patience": (lambda b: sweep(b.engine, patience=-1), "-1", "at least 0", "patience=15"),
    "empty variable": (lambda b: sweep(b.engine, run=""), "run=''", "shell variable", "run='nig"),
    "kept": (lambda b: sweep(b.engine, kept=""), "kept=''", "shell variable", "kept=True"),
    "forget": (lambda b: sweep(b.engine, forget=5), "forget=5", "owners", "forget=['left"),
    "an option passed on": (
        lambda b: sweep(b.engine, lock_timeout="2s"), "'2s'", "seconds", "lock_timeout=5.0",
    ),
    "a misspelt option": (lambda b: sweep(b.engine, keep=1), "keep=", "takes no", "mean kept="),
    "no ledger": (
        lambda b: sweep(b.engine), "tidyrows_ledger", "has no ledger", "Ledger(engine).install()",
    ),
    "run": (lambda b: find_orphans(b.engine, run=5), "run=5", "a text", "run='nightly-17'"),
    "no exceptions": (
        lambda _: external_handler("file", retry_on="x"), "retry_on='x'", "exception classes",
        "retry_on=[TimeoutError]",
    ),
    "test": (lambda b: Tidy(b.engine, test=5), "test=5", "a text", "test='test_login'"),
    "ledger": (lambda b: Tidy(b.engine, ledger="on"), "ledger='on'", "a Ledger", "ledger=True"),
    "an option of Tidy": (
        lambda b: Tidy(b.engine, keep=1), "keep=", "takes no", "keep_on_failure=",
    ),
    "passed on by Tidy": (
        lambda b: Tidy(b.engine, deadline="1"), "deadline='1'", "seconds", "deadline=60.0",
    ),
}  # fmt: skip  # a row a line


def calls(table):
    return pytest.mark.parametrize(
        ("call", "thing", "cause", "line"), table.values(), ids=table.keys()
    )


@pytest.fixture
def bench(zoo_engine):
    return Bench(zoo_engine)


def refused(call, *texts):
    with pytest.raises(TidyRowsError) as caught:
        call()
    said = str(caught.value)
    assert [text for text in texts if text not in said] == [], said
    assert "secret" not in said
    return caught.value


on_sqlite = pytest.mark.parametrize("zoo_database", ["sqlite"], indirect=True)


@on_sqlite
@calls(MANAGER)
def test_a_wrong_manager_is_refused_when_it_is_made(bench, call, thing, cause, line):
    refused(lambda: call(bench), thing, cause, line)


@on_sqlite
@calls(TRACKER)
def test_a_wrong_call_of_a_tracker_is_refused(bench, call, thing, cause, line):
    refused(lambda: call(bench), thing, cause, line)
    assert len(bench.tracker) == 0


@on_sqlite
@calls(OTHERS)
def test_a_wrong_call_is_refused(bench, call, thing, cause, line):
    refused(lambda: call(bench), thing, cause, line)


def test_a_class_that_is_mapped_later_hides_no_typo(sqlite_engine):
    """Its registry refuses to list its mappers."""

    class Local(DeclarativeBase):
        pass

    class Shape(AbstractConcreteBase, Local):
        id: Mapped[int] = mapped_column(primary_key=True)

    Local.metadata.create_all(sqlite_engine)
    refused(
        lambda: CleanupManager(ResourceTracker(sqlite_engine), own=["Shape"]),
        "'Shape'",
        "no such table",
    )


def test_a_driver_that_is_not_installed_is_named_with_one_that_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "MySQLdb", None)
    refused(lambda: sweep("mysql://me:secret@db/app"), "'mysql'", "MySQLdb", "mysql+pymysql://")


def test_a_tracker_that_runs_is_refused_by_a_second_block(zoo_engine):
    """The inner block would end it, and nobody would track the rows that come after."""
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker) as cleanup:
        for start in (lambda: enter(CleanupManager(tracker)), tracker.start):
            refused(start, "This tracker", "started already", "blocks nest with a tracker each")
        with Session(zoo_engine) as session:
            session.add(Org(name="after the refusal"))
            session.commit()
    assert cleanup.report.total_deleted == 1


def test_a_tidy_that_runs_is_not_started_again(zoo_engine):
    tidy = Tidy(zoo_engine).start()
    refused(tidy.start, "This tracker", "started already", "blocks nest with a tracker each")
    tidy.finish()


CHECKED = (CleanupManager, ResourceTracker, Ledger, Tidy, Scoped, ScopedEmail, ScopedInteger)
CHECKED += (Unique, sweep, find_orphans, with_retries, external_handler)
ELSEWHERE = {"self", "tracker", "own", "protect", "bind", "engine", "ledger", "fn", "kind"}
"""Arguments with errors of their own."""


@pytest.mark.parametrize("call", CHECKED, ids=lambda call: call.__name__)
def test_every_argument_of_a_public_call_is_checked(call):
    named = [p for p in signature(call).parameters.values() if p.kind is not p.VAR_KEYWORD]
    assert {p.name for p in named} - kinds_of(call).keys() - ELSEWHERE == set()


# --- a factory without a tracker, the commonest of all


class OrgFactory(TrackedFactory[Org]):
    class Meta:
        model = Org

    name = Scoped("org-{tag}")


def test_a_factory_without_a_tracker_is_told_of_the_fixture_in_pytest():
    said = str(refused(OrgFactory, "OrgFactory", "no tracker is active", "def test_it(tidy):"))
    assert "tidy_worker" in said
    assert "TidyTestCase" not in said


def test_a_factory_without_a_tracker_is_told_of_the_test_case_in_unittest():
    class ShopTest(unittest.TestCase):
        def runTest(self):  # noqa: N802 -- unittest's name
            refused(
                OrgFactory, "OrgFactory", "no tracker is active", "class ShopTest(TidyTestCase)"
            )

    ended = unittest.TestResult()
    ShopTest().run(ended)
    assert ended.wasSuccessful(), ended.failures + ended.errors


def test_a_factory_without_a_tracker_is_told_of_the_block_elsewhere(monkeypatch):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    refused(OrgFactory, "OrgFactory", "no tracker", "with CleanupManager(tracker):", "scoped_to(")


def test_a_factory_whose_table_is_not_there_is_told_to_create_it(engine):
    with CleanupManager(ResourceTracker(engine)), pytest.raises(sa.exc.DBAPIError) as caught:
        OrgFactory()
    assert "has no table orgs. Create the tables first" in " ".join(caught.value.__notes__)


def test_there_are_more_than_63_wrong_calls():
    assert len(MANAGER) + len(TRACKER) + len(OTHERS) > 63
