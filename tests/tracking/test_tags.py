"""Rows that carry a tag, and queries that are asked when a cleanup begins."""

from __future__ import annotations

import re
from itertools import islice

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from harness.bystanders import Bystanders, snapshot
from tidyrows import (
    CleanupManager,
    NoPrimaryKeyError,
    ResourceTracker,
    ScopedEmail,
    ScopeError,
    TrackedFactory,
    UnknownTableError,
    WorkerContext,
)
from tidyrows.template import counter_codes
from tidyrows.tracking.tags import patterns

TEMPLATE = "user-{tag}@example.test"
PARTS = ("run0000", "01", "0z")


class Base(DeclarativeBase): ...


class Account(Base):
    __tablename__ = "accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str | None] = mapped_column(sa.String(40), index=True)
    kind: Mapped[str] = mapped_column(sa.String(10), default="account")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "account"}  # noqa: RUF012


class Admin(Account):
    __tablename__ = "admins"
    id: Mapped[int] = mapped_column(sa.ForeignKey("accounts.id"), primary_key=True)
    level: Mapped[int] = mapped_column(default=1)
    __mapper_args__ = {"polymorphic_identity": "admin"}  # noqa: RUF012


bare = sa.Table("bare", Base.metadata, sa.Column("email", sa.String(40)))


class AccountFactory(TrackedFactory[Account]):
    class Meta:
        model = Account

    email = ScopedEmail()


@pytest.fixture
def accounts(engine):
    Base.metadata.create_all(engine)
    return engine


def context(run="run", worker=1, test="a test"):
    return WorkerContext(run, f"w{worker}", worker, test_id=test, worker_count=4)


def write(engine, *emails, model=Account):
    """What an application in another process would: nobody here tracks it."""
    with Session(engine) as session:
        session.add_all([model(email=email) for email in emails])
        session.commit()


def left(engine):
    with engine.connect() as connection:
        return set(connection.scalars(sa.select(Account.email)))


WHOSE = {
    "test": [True, False, False, False],
    "worker": [True, True, False, False],
    "run": [True, True, True, False],
    "any": [True, True, True, True],
}


@pytest.mark.parametrize("whose", WHOSE)
def test_tags_tell_whose_a_row_is(accounts, whose):
    emails = [
        each.text(TEMPLATE)
        for each in (
            context(),
            context(test="another"),
            context(worker=2),
            context(run="another run"),
        )
    ]
    strangers = {
        "somebody@example.test",
        "user-@example.test",
        f"x{emails[0]}",
        f"{emails[0]}x",
        emails[0].upper(),
        emails[0].replace("user", "users"),
        emails[0].replace("@", "%@"),
        None,
    }
    write(accounts, *emails, *strangers)
    tracker = ResourceTracker(accounts, context=context())
    taken = {email for email, ours in zip(emails, WHOSE[whose], strict=True) if ours}
    assert tracker.track_tagged(Account.email, TEMPLATE, whose=whose) == len(taken)
    CleanupManager(tracker).cleanup()
    assert left(accounts) == (set(emails) | strangers) - taken


def test_all_that_a_scoped_declaration_makes_is_found(accounts):
    """Many values of one test: every length of the counter."""
    mine = context(run="long", test="long")
    emails = [mine.text("account-of-a-customer-{tag}", 40) for _ in range(300)]
    write(accounts, *emails)
    tracker = ResourceTracker(accounts, context=mine)
    assert tracker.track_tagged(Account.email, "account-of-a-customer-{tag}") == 300
    tracker.stop()


@pytest.mark.parametrize("length", [None, 60, 40, 31, 24, 20])
@pytest.mark.parametrize("template", ["{tag}", TEMPLATE, "a-long-name-{run}{worker}{n}-{test}"])
def test_a_pattern_matches_what_is_made_and_nothing_else(template, length):
    mine = context(run="pattern", test="pattern")
    tag = mine.tag
    parts = (tag[:7], tag[7:9], tag[9:])
    for keep_end in (False, True):
        try:
            made = {mine.text(template, length, keep_end=keep_end) for _ in range(50)}
        except ScopeError:
            continue
        found = patterns(template, length, parts, "test")
        for value in made:
            assert any(p.whole.fullmatch(value) for p in found), value
            assert any(value.startswith(p.prefix) for p in found)
        for value in made:
            for wrong in (value[:-1] + "!", "!" + value, value + "0!"):
                assert not any(p.whole.fullmatch(wrong) for p in found), wrong


@pytest.mark.parametrize("number", [0, 7, 8, 151, 152, 5_335, 5_336, 191_959, 191_960, 200_000])
def test_every_counter_is_matched_and_no_other_text_as_long(number):
    (pattern,) = patterns("{tag}", None, PARTS, "test")
    code = next(islice(counter_codes(), number, None))
    assert pattern.whole.fullmatch("".join(PARTS) + code)
    for wrong in (code + "0", code[:-1], code[:-1] + "A"):
        assert not pattern.whole.fullmatch("".join(PARTS) + wrong)


def test_short_columns_hold_cut_values(accounts):
    mine = context(run="short", test="short")
    value = mine.text("a-name-that-is-much-too-long-for-it-{tag}@example.test", 40)
    write(accounts, value)
    assert len(value) <= 40
    tracker = ResourceTracker(accounts, context=mine)
    long = "a-name-that-is-much-too-long-for-it-{tag}@example.test"
    assert tracker.track_tagged(Account.email, long) == 1


def test_rows_of_every_table_of_a_class_are_taken(accounts):
    before = snapshot(accounts)
    mine = context(run="classes")
    write(accounts, mine.text(TEMPLATE), model=Admin)
    write(accounts, mine.text(TEMPLATE))
    tracker = ResourceTracker(accounts, context=mine)
    assert tracker.track_tagged(Account.email, TEMPLATE) == 2
    assert CleanupManager(tracker).cleanup().total_deleted == 3
    assert snapshot(accounts) == before


def test_a_tables_column_does_as_well(accounts):
    mine = context(run="table")
    write(accounts, mine.text(TEMPLATE))
    tracker = ResourceTracker(accounts, context=mine)
    assert tracker.track_tagged(Account.__table__.c.email, TEMPLATE) == 1


def test_what_another_tracker_holds_is_left_to_it(accounts):
    mine = context(run="shared")
    inner = ResourceTracker(accounts, context=mine)
    outer = ResourceTracker(accounts, context=mine)
    with CleanupManager(inner):
        AccountFactory()
        assert outer.track_tagged(Account.email, TEMPLATE, whose="any") == 0


def test_a_row_that_is_not_committed_is_not_there(accounts):
    if accounts.dialect.name == "sqlite":
        pytest.skip("SQLite's readers wait for nobody, but its one writer is the session")
    mine = context(run="pending")
    with Session(accounts) as session:
        session.add(Account(email=mine.text(TEMPLATE)))
        session.flush()
        tracker = ResourceTracker(accounts, context=mine)
        assert tracker.track_tagged(Account.email, TEMPLATE) == 0


PLANS = {
    "sqlite": ("EXPLAIN QUERY PLAN ", "ix_accounts_email"),
    "postgresql": ("EXPLAIN ", "ix_accounts_email"),
    "mysql": ("EXPLAIN ", "ix_accounts_email"),
}


def test_the_index_is_used(accounts):
    """Asked of the database with the statement and the values that were sent."""
    write(accounts, *(f"{n}-somebody@example.test" for n in range(3000)))
    if accounts.dialect.name != "sqlite":
        with accounts.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            word = "ANALYZE" if accounts.dialect.name == "postgresql" else "ANALYZE TABLE"
            connection.exec_driver_sql(f"{word} accounts")
    sent = []

    def hear(_connection, _cursor, statement, parameters, _context, _many):
        if "FROM accounts" in re.sub(r"\s+", " ", statement) and "coalesce" not in statement:
            sent.append((statement, parameters))

    sa.event.listen(accounts, "before_cursor_execute", hear)
    for whose in ("test", "run", "any"):
        tracker = ResourceTracker(accounts, context=context())
        tracker.track_tagged(Account.email, TEMPLATE, whose=whose)
    sa.event.remove(accounts, "before_cursor_execute", hear)
    assert len(sent) >= 3
    explain, index = PLANS[accounts.dialect.name]
    with accounts.connect() as connection:
        for statement, parameters in sent:
            rows = connection.exec_driver_sql(explain + statement, parameters).all()
            assert index in str(rows)


@pytest.mark.parametrize(
    "asked",
    [
        (Account.email, "user", "test", ScopeError, "could produce the value of another run"),
        (Account.email, TEMPLATE, "us", ScopeError, "whose='us' is nobody"),
        (Account.email, "{tag}", "any", ScopeError, "begin with nothing that is known"),
        (Account.id, TEMPLATE, "test", ScopeError, "no text column"),
        (Account, TEMPLATE, "test", UnknownTableError, "is no column"),
        ("email", TEMPLATE, "test", UnknownTableError, "is no column"),
        (bare.c.email, TEMPLATE, "test", NoPrimaryKeyError, "no primary key"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_what_cannot_be_asked_is_said_at_once(sqlite_engine, asked, late):
    column, template, whose, error, match = asked
    Base.metadata.create_all(sqlite_engine)
    tracker = ResourceTracker(sqlite_engine)
    with pytest.raises(error, match=match):
        tracker.track_tagged(column, template, whose=whose, late=late)
    assert CleanupManager(tracker).cleanup().total_deleted == 0


# -- late ------------------------------------------------------------------------------------------


def test_a_late_query_finds_what_came_after_it(accounts):
    bystanders = Bystanders(accounts)
    bystanders.insert(Account, {"email": "theirs", "kind": "account"})
    mine = context(run="late")
    tracker = ResourceTracker(accounts, context=mine)
    with CleanupManager(tracker) as cleanup:
        named = sa.select(Account).where(Account.email == "by the application")
        assert tracker.track_query(named, late=True) == 0
        assert tracker.track_tagged(Account.email, TEMPLATE, late=True) == 0
        tracker.stop()
        write(accounts, "by the application", mine.text(TEMPLATE))
        assert cleanup.plan().total_rows == 2
    assert cleanup.report.total_deleted == 2
    write(accounts, "by the application")
    assert cleanup.cleanup().total_deleted == 1
    bystanders.assert_untouched()


def test_a_late_query_that_fails_keeps_no_row_from_going(accounts):
    before = snapshot(accounts)
    gone = sa.Table("gone", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    tracker = ResourceTracker(accounts)
    manager = CleanupManager(tracker)
    with pytest.raises(sa.exc.DBAPIError, match="gone"), manager:
        tracker.track_query(sa.select(gone), late=True)
        tracker.track_query(sa.select(Account).where(Account.email == "late"), late=True)
        AccountFactory()
        tracker.stop()
        write(accounts, "late")
    assert manager.report.total_deleted == 2
    assert snapshot(accounts) == before
    with pytest.raises(sa.exc.DBAPIError, match="gone"):
        manager.plan()


def test_a_late_query_that_can_never_be_asked_is_refused_at_once(sqlite_engine):
    tracker = ResourceTracker(sqlite_engine)
    with pytest.raises(UnknownTableError, match="takes a select"):
        tracker.track_query("SELECT 1", late=True)
    with pytest.raises(NoPrimaryKeyError, match="no primary key"):
        tracker.track_query(sa.select(bare), late=True)
