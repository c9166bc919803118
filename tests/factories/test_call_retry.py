"""A factory call whose transaction the database undid is run again as a whole, with its data."""

from __future__ import annotations

import os
import socket
import threading
from functools import partial
from typing import ClassVar

import factory
import factory.random
import pytest
import sqlalchemy as sa
from factory import fuzzy
from sqlalchemy import orm
from sqlalchemy.orm.collections import attribute_keyed_dict

from harness.bystanders import Bystanders, snapshot
from harness.models import Group, Order, Org, User
from harness.targets import ALL_DRIVERS, on
from tidyrows import CleanupManager, ResourceTracker, RetryPolicy, Scoped, TrackedFactory

everywhere = on(*ALL_DRIVERS, fixture="zoo_database")
servers = on(*(each for each in ALL_DRIVERS if each != "sqlite"), fixture="zoo_database")
AT_ONCE = RetryPolicy(base=0.0, attempts=6)


class OrgFactory(TrackedFactory[Org]):
    class Meta:
        model = Org

    name = factory.Sequence("org{}".format)


class UserFactory(TrackedFactory[User]):
    class Meta:
        model = User

    email = Scoped("{tag}@example.test")
    name = factory.Faker("name")
    org = factory.SubFactory(OrgFactory)


class OrderFactory(TrackedFactory[Order]):
    class Meta:
        model = Order

    user = factory.SubFactory(UserFactory)
    note = factory.LazyAttribute(lambda order: f"{order.word} {order.number}")

    class Params:
        word = fuzzy.FuzzyText()
        number = factory.Iterator([1, 2, 3])


class BusyFactory(UserFactory):
    orders = factory.RelatedFactoryList(OrderFactory, factory_related_name="user", size=2)

    @factory.post_generation
    def extras(self, create, extracted, **kwargs):
        self.groups.append(Group(name="raw"))
        OrgFactory(name="called in a hook")


class Fails:
    """Raises the driver's own error for a deadlock, and undoes what the server would undo.

    Args:
        engine: whose statements fail.
        at: the number of the INSERT that fails, from 1; 0 for the COMMIT.
        times: how often.
    """

    CODES: ClassVar = {
        "mysql": (1213, "deadlock"),
        "postgresql": ("deadlock",),
        "sqlite": ("busy",),
    }

    def __init__(self, engine, at, times=1):
        self.engine, self.at, self.times, self.count = engine, at, times, 0
        self.failed = 0
        if at:
            for name in ("do_execute", "do_executemany"):
                sa.event.listen(engine, name, self.statement)
        else:
            self.commit = engine.dialect.do_commit
            engine.dialect.do_commit = self.do_commit

    def stop(self):
        if self.at:
            for name in ("do_execute", "do_executemany"):
                sa.event.remove(self.engine, name, self.statement)
        else:
            self.engine.dialect.do_commit = self.commit

    def error(self):
        dbapi = self.engine.dialect.loaded_dbapi
        made = dbapi.OperationalError(*self.CODES[self.engine.dialect.name])
        match self.engine.dialect.driver:
            case "psycopg":
                import psycopg.errors  # noqa: PLC0415 -- only where it is the driver

                return psycopg.errors.DeadlockDetected("deadlock")
            case "psycopg2":
                made = dbapi.extensions.TransactionRollbackError("deadlock")
                made.__setstate__({"pgcode": "40P01"})
            case "pysqlite":
                made.sqlite_errorcode = 5
        return made

    def statement(self, cursor, statement, *_):
        if not statement.startswith("INSERT"):
            return
        self.count += 1
        if self.count % self.at == 0 and self.failed < self.times:
            self.failed += 1
            self.count = 0
            raise self.error()

    def do_commit(self, dbapi_connection):
        if self.failed < self.times:
            self.failed += 1
            raise self.error()
        self.commit(dbapi_connection)


def outcome(engine, make):
    """The rows of a block with one call in it, which every run must leave alike."""
    factory.random.reseed_random(7)
    before = Bystanders(engine)
    tracker = ResourceTracker(engine, retry=AT_ONCE)
    with CleanupManager(tracker) as cleanup:
        made = make()
        rows = snapshot(engine).added_since(before.expected)
        usable(made)
    before.assert_untouched()
    assert cleanup.report.total_deleted == sum(map(len, rows.values()))
    return rows


def usable(made):
    for each in made if isinstance(made, list) else [made]:
        assert sa.inspect(each).persistent
        assert each.id


@everywhere
@pytest.mark.parametrize(
    "make",
    [
        BusyFactory,
        lambda: BusyFactory.create_batch(2),
        lambda: OrderFactory.create_bulk(3, chunk_size=2),
    ],
)
def test_wherever_it_is_undone_the_call_ends_as_if_nothing_had_been(zoo_engine, make):
    """Scoped tags, sequences and iterators go on from call to call: everything else is equal."""

    def shape(rows):
        return {table: sorted(map(texts, each)) for table, each in rows.items()}

    def texts(row):
        """What no declaration draws: each attempt draws anew."""
        return [value for value in row if value in {"raw", "called in a hook"}]

    calm = shape(outcome(zoo_engine, make))
    inserts = sum(map(len, calm.values()))
    for at in range(inserts + 1):
        fails = Fails(zoo_engine, at, times=2)
        try:
            assert shape(outcome(zoo_engine, make)) == calm, at
        finally:
            fails.stop()
        assert fails.failed >= 1 or at > 3


def attempts_of(engine, make, at):
    """What the attempts at one call drew, as parameters of their INSERTs; keys are left out."""
    drawn = [[]]

    class Draws(Fails):
        def statement(self, cursor, statement, parameters, *rest):
            if statement.startswith("INSERT"):
                values = parameters.values() if isinstance(parameters, dict) else parameters
                drawn[-1].append([each for each in values if isinstance(each, str)])
            try:
                super().statement(cursor, statement, parameters, *rest)
            except Exception:
                drawn.append([])
                raise

    fails = Draws(engine, at)
    with CleanupManager(ResourceTracker(engine, retry=AT_ONCE)):
        try:
            make()
        finally:
            fails.stop()
    return drawn


@everywhere
@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_each_attempt_draws_new_values(zoo_engine, at):
    """Scoped text and sequences of a lost attempt are not used a second time."""
    first, second = attempts_of(zoo_engine, BusyFactory, at)
    assert len(first) == at
    assert len(second) > at
    constant = "['called in a hook']"
    assert {str(values) for values in first} & {str(values) for values in second} <= {constant}


@servers
def test_two_calls_in_a_real_deadlock_both_end_well(zoo_engine):
    """Each hook changes what the other has changed first."""
    shared = [90_001, 90_002]
    with zoo_engine.begin() as connection:
        connection.execute(
            sa.insert(Org.__table__), [{"id": n, "name": f"shared {n}"} for n in shared]
        )
    before = Bystanders(zoo_engine)
    meet = threading.Barrier(2)
    calls = []

    class CrossingFactory(UserFactory):
        @factory.post_generation
        def cross(self, create, extracted, **kwargs):
            session = orm.object_session(self)
            calls.append(extracted)
            for number in extracted:
                session.execute(
                    sa.update(Org.__table__)
                    .where(Org.__table__.c.id == number)
                    .values(name=f"shared {number}")
                )
                if len(calls) <= 2 and number == extracted[0]:
                    meet.wait(20)

    failures, made = [], []

    def run(numbers):
        try:
            tracker = ResourceTracker(zoo_engine, retry=AT_ONCE)
            with CleanupManager(tracker):
                made.append(CrossingFactory(cross=numbers))
                assert len(tracker) == 2
        except BaseException as error:  # noqa: BLE001 -- of a thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in (shared, shared[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert failures == []
    # The victim may lock its first row again before the other call has got it, and lose again.
    assert len(calls) >= 3
    assert len(made) == 2
    before.assert_untouched()


def kill(engine, connection):
    postgresql = engine.dialect.name == "postgresql"
    own = connection.exec_driver_sql(
        "SELECT pg_backend_pid()" if postgresql else "SELECT CONNECTION_ID()"
    ).scalar_one()
    with engine.connect() as other:
        other.exec_driver_sql(
            f"SELECT pg_terminate_backend({own}, 5000)" if postgresql else f"KILL {own}"
        )


@servers
@pytest.mark.parametrize("where", ["flush", "hook", "commit"])
def test_a_connection_that_is_killed_is_another_attempt(zoo_engine, where):
    before = Bystanders(zoo_engine)
    killed = []

    class KilledFactory(UserFactory):
        @factory.post_generation
        def lose(self, create, extracted, **kwargs):
            session = orm.object_session(self)
            if not killed:
                killed.append(1)
                kill(zoo_engine, session.connection())
                if where == "hook":
                    session.execute(sa.text("SELECT 1"))
                if where == "flush":
                    OrgFactory()

    tracker = ResourceTracker(zoo_engine, retry=AT_ONCE)
    with CleanupManager(tracker) as cleanup:
        usable(KilledFactory())
        assert sum(map(len, snapshot(zoo_engine).added_since(before.expected).values())) >= 2
    assert killed
    assert not cleanup.report.already_gone
    before.assert_untouched()


@servers
def test_a_commit_that_succeeded_without_an_answer_gives_its_objects(zoo_engine, monkeypatch):
    """Run again it would make every row twice."""
    before = Bystanders(zoo_engine)
    real = zoo_engine.dialect.do_commit
    lost = []

    def commit(dbapi_connection):
        real(dbapi_connection)
        if not lost:
            lost.append(1)
            code = () if zoo_engine.dialect.name == "postgresql" else (2013, "gone")
            raise zoo_engine.dialect.loaded_dbapi.OperationalError(*code)

    monkeypatch.setattr(zoo_engine.dialect, "do_commit", commit)
    if zoo_engine.dialect.name == "postgresql":
        monkeypatch.setattr(zoo_engine.dialect, "is_disconnect", lambda *_: True)
    tracker = ResourceTracker(zoo_engine, retry=AT_ONCE)
    with CleanupManager(tracker) as cleanup:
        user = BusyFactory()
        monkeypatch.undo()
        rows = snapshot(zoo_engine).added_since(before.expected)
        assert [len(each) for name, each in rows.items() if name.endswith(".users")] == [1]
        usable(user)
        assert user.org.name
        assert [order.user for order in user.orders] == [user, user]
        assert len(tracker) == sum(map(len, rows.values()))
        assert tracker.store.uncertain_keys() == set()
        user.name = "changed"
        tracker.session.commit()
        OrgFactory()
    assert lost
    assert not cleanup.report.leftovers
    before.assert_untouched()


@servers
def test_an_older_doubt_says_nothing_of_a_commit_that_was_lost_later(zoo_engine, monkeypatch):
    """Its rows are there, and those of the call are not."""
    before = Bystanders(zoo_engine)
    real = zoo_engine.dialect.do_commit
    commits = []

    def commit(dbapi_connection):
        commits.append(1)
        if len(commits) != 2:
            real(dbapi_connection)
        if len(commits) <= 2:
            code = () if zoo_engine.dialect.name == "postgresql" else (2013, "gone")
            raise zoo_engine.dialect.loaded_dbapi.OperationalError(*code)

    monkeypatch.setattr(zoo_engine.dialect, "do_commit", commit)
    if zoo_engine.dialect.name == "postgresql":
        monkeypatch.setattr(zoo_engine.dialect, "is_disconnect", lambda *_: True)
    tracker = ResourceTracker(zoo_engine, retry=AT_ONCE)
    with CleanupManager(tracker):
        with orm.Session(zoo_engine) as session:
            session.add(Org(name="older"))
            with pytest.raises(sa.exc.OperationalError):
                session.commit()
        older = tracker.store.uncertain_keys()
        assert len(older) == 1
        OrgFactory(name="newer")
        monkeypatch.undo()
        (rows,) = snapshot(zoo_engine).added_since(before.expected).values()
        assert sorted(name for row in rows for name in row if name in {"older", "newer"}) == [
            "newer",
            "older",
        ]
        assert tracker.store.uncertain_keys() == older
    before.assert_untouched()


@servers
@pytest.mark.parametrize("gone", [(Order,), (Order, User)])
def test_a_commit_whose_rows_the_application_takes_at_once_is_not_run_again(
    zoo_database, zoo_engine, kill_after_commit, gone
):
    """As the worker of a queue does. The rows that are left are ours."""
    before = Bystanders(zoo_engine)
    outside = zoo_database.engine()

    def take():
        with outside.begin() as connection:
            for model in gone:
                connection.execute(sa.delete(model.__table__))

    kill_after_commit(take)
    tracker = ResourceTracker(zoo_engine, retry=AT_ONCE)
    with CleanupManager(tracker):
        OrderFactory()
        added = snapshot(zoo_engine).added_since(before.expected)
        assert sum(map(len, added.values())) == 3 - len(gone)
    before.assert_untouched()


@pytest.fixture
def kill_after_commit(zoo_engine, monkeypatch):
    """Have the answer to the next COMMIT lost, after what is given was called."""

    def prepare(meanwhile):
        real, lost = zoo_engine.dialect.do_commit, []

        def commit(dbapi_connection):
            real(dbapi_connection)
            if not lost:
                lost.append(1)
                meanwhile()
                code = () if zoo_engine.dialect.name == "postgresql" else (2013, "gone")
                if zoo_engine.dialect.name == "postgresql":
                    monkeypatch.setattr(zoo_engine.dialect, "is_disconnect", lambda *_: True)
                raise zoo_engine.dialect.loaded_dbapi.OperationalError(*code)

        monkeypatch.setattr(zoo_engine.dialect, "do_commit", commit)

    return prepare


# --- where it is not run again


def failing(engine, make, **options):
    fails = Fails(engine, 2, **options)
    try:
        with pytest.raises(sa.exc.DBAPIError) as caught:
            make()
    finally:
        fails.stop()
    return caught.value


@everywhere
def test_a_transaction_that_began_before_the_call_is_the_callers(zoo_engine):
    tracker = ResourceTracker(zoo_engine, retry=AT_ONCE)
    with CleanupManager(tracker):
        tracker.session.add(Org(name="not committed yet"))
        tracker.session.flush()
        error = failing(zoo_engine, UserFactory)
        assert any("not its own alone" in note for note in error.__notes__)


@everywhere
def test_a_hook_that_commits_ends_what_can_be_run_again(zoo_engine):
    class CommittingFactory(UserFactory):
        @factory.post_generation
        def commit(self, create, extracted, **kwargs):
            orm.object_session(self).commit()
            OrgFactory()
            OrgFactory()

    before = Bystanders(zoo_engine)
    with CleanupManager(ResourceTracker(zoo_engine, retry=AT_ONCE)):
        fails = Fails(zoo_engine, 4)
        try:
            with pytest.raises(sa.exc.DBAPIError) as caught:
                CommittingFactory()
        finally:
            fails.stop()
        assert any("not its own alone" in note for note in caught.value.__notes__)
        rows = snapshot(zoo_engine).added_since(before.expected)
        assert sum(map(len, rows.values())) == 2
    before.assert_untouched()


@everywhere
def test_a_factory_with_a_session_of_its_own_takes_no_second_part(zoo_engine):
    with orm.Session(zoo_engine) as named:

        class NamedFactory(TrackedFactory[Group]):
            class Meta:
                model = Group
                sqlalchemy_session = named
                sqlalchemy_session_persistence = "flush"

            name = Scoped("{tag}")

        class MixedFactory(OrgFactory):
            @factory.post_generation
            def group(self, create, extracted, **kwargs):
                if zoo_engine.dialect.name != "sqlite":  # it has one writer
                    NamedFactory()
                OrgFactory()
                OrgFactory()

        with CleanupManager(ResourceTracker(zoo_engine, retry=AT_ONCE)):
            fails = Fails(zoo_engine, 3)
            try:
                if zoo_engine.dialect.name == "sqlite":
                    MixedFactory()
                else:
                    with pytest.raises(sa.exc.DBAPIError):
                        MixedFactory()
            finally:
                fails.stop()
            named.rollback()


@everywhere
def test_the_policy_says_how_often(zoo_engine):
    policy = RetryPolicy(attempts=3, base=0.0)
    with CleanupManager(ResourceTracker(zoo_engine, retry=policy)):
        error = failing(zoo_engine, UserFactory, times=9)
        assert any("after 3 attempts" in note for note in error.__notes__)
    with CleanupManager(ResourceTracker(zoo_engine, retry=RetryPolicy(attempts=1))):
        failing(zoo_engine, UserFactory)


@everywhere
def test_an_error_that_does_not_pass_surfaces_at_once(zoo_engine):
    calls = []

    class BrokenFactory(UserFactory):
        @factory.post_generation
        def fail(self, create, extracted, **kwargs):
            calls.append(1)
            raise ValueError("mine")

    with CleanupManager(ResourceTracker(zoo_engine, retry=AT_ONCE)):
        with pytest.raises(ValueError, match="mine"):
            BrokenFactory()
    assert calls == [1]


# --- what the caller passes in


@everywhere
@pytest.mark.parametrize("kind", ["built", "committed"])
def test_objects_that_the_caller_passed_in_do_not_take_lost_ones_along(zoo_engine, kind):
    before = Bystanders(zoo_engine)
    with CleanupManager(ResourceTracker(zoo_engine, retry=AT_ONCE)):
        user = UserFactory() if kind == "committed" else UserFactory.build()
        fails = Fails(zoo_engine, 3 if kind == "built" else 1)
        try:
            order = OrderFactory(user=user)
        finally:
            fails.stop()
        assert fails.failed == 1
        assert order.user is user
        assert user.orders == [order]
        rows = snapshot(zoo_engine).added_since(before.expected)
        counts = {name.rpartition(".")[2]: len(each) for name, each in rows.items()}
        assert counts == {"orgs": 1, "users": 1, "orders": 1}
    before.assert_untouched()


@pytest.mark.parametrize(
    ("make", "at"),
    [
        (UserFactory.create_batch, 7),
        (partial(UserFactory.create_bulk, chunk_size=2), 2),
        (partial(UserFactory.create_bulk, chunk_size=2), 5),
    ],
)
def test_lost_objects_leave_the_callers_new_object_and_its_own_stay(zoo_engine, make, at):
    boss = UserFactory.build(org=None, groups=[Group(name="bosses")])
    org = Org(name="mine", users=[boss])
    before = Bystanders(zoo_engine)
    with CleanupManager(ResourceTracker(zoo_engine, retry=AT_ONCE)):
        fails = Fails(zoo_engine, at)
        try:
            users = make(4, org=org)
        finally:
            fails.stop()
        assert fails.failed == 1
        assert set(org.users) == {boss, *users}
        assert boss.groups[0].users == [boss]
        rows = snapshot(zoo_engine).added_since(before.expected)
        counts = {name.rpartition(".")[2]: len(each) for name, each in rows.items()}
        assert counts == {"orgs": 1, "users": 5, "groups": 1, "user_groups": 1}
    before.assert_untouched()


# --- the caller's objects


class Base(orm.DeclarativeBase):
    pass


class Shelf(Base):
    __tablename__ = "shelves"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str] = orm.mapped_column(sa.String(20), default="of oak")
    by_name: orm.Mapped[dict[str, Jar]] = orm.relationship(
        collection_class=attribute_keyed_dict("name")
    )
    spoons: orm.Mapped[set[Spoon]] = orm.relationship()


class Jar(Base):
    __tablename__ = "jars"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str] = orm.mapped_column(sa.String(20))
    shelf_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("shelves.id"))


class Spoon(Base):
    __tablename__ = "spoons"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    shelf_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("shelves.id"))


class ShelfFactory(TrackedFactory[Shelf]):
    class Meta:
        model = Shelf


@on("sqlite", "postgresql+psycopg", "mysql+pymysql")
@pytest.mark.parametrize(
    "given",
    [lambda: {"by_name": {"a": Jar(name="a")}}, lambda: {"spoons": {Spoon(), Spoon()}}],
    ids=["dict", "set"],
)
def test_collections_of_built_objects_go_into_the_next_attempt(engine, given):
    Base.metadata.create_all(engine)
    before = Bystanders(engine)
    values = given()
    with CleanupManager(ResourceTracker(engine, retry=AT_ONCE)):
        fails = Fails(engine, 2)
        try:
            shelf = ShelfFactory(**values)
        finally:
            fails.stop()
        assert fails.failed == 1
        for name, value in values.items():
            assert getattr(shelf, name) == value
        rows = snapshot(engine).added_since(before.expected)
        assert sum(map(len, rows.values())) == 1 + sum(len(each) for each in values.values())
    before.assert_untouched()


@everywhere
def test_a_key_that_the_lost_attempt_gave_to_the_callers_object_is_not_used_again(
    zoo_database, zoo_engine
):
    """Somebody else may have it by now."""
    name = Org.__table__.c.name

    outside = zoo_database.engine()

    def intrude(_attempt):
        with outside.begin() as connection:
            connection.execute(sa.insert(Org.__table__).values(name="theirs"))

    policy = RetryPolicy(base=0.0, attempts=6, on_attempt=intrude)
    with CleanupManager(ResourceTracker(zoo_engine, retry=policy)):
        user = UserFactory.build()
        fails = Fails(zoo_engine, 3)
        try:
            OrderFactory(user=user)
        finally:
            fails.stop()
        assert fails.failed == 1
        assert user.org.id
    with zoo_engine.connect() as connection:
        assert connection.execute(sa.select(name)).scalars().all().count("theirs") == 1


@everywhere
def test_a_key_that_the_caller_gave_to_a_built_object_stays(zoo_engine):
    with CleanupManager(ResourceTracker(zoo_engine, retry=AT_ONCE)):
        user = UserFactory.build(id=90_003)
        fails = Fails(zoo_engine, 3)
        try:
            order = OrderFactory(user=user)
        finally:
            fails.stop()
        assert fails.failed == 1
        assert (user.id, order.user_id) == (90_003, 90_003)


# --- what another call has committed


@servers
def test_a_call_in_whose_hook_another_tracker_has_committed_is_not_run_again(zoo_engine):
    other = ResourceTracker(zoo_engine, retry=AT_ONCE)

    class GroupFactory(TrackedFactory[Group]):
        class Meta:
            model = Group

        name = Scoped("{tag}")

    class OuterFactory(OrgFactory):
        @factory.post_generation
        def both(self, create, extracted, **kwargs):
            GroupFactory.scoped_to(other).create()
            OrgFactory()

    with CleanupManager(other), CleanupManager(ResourceTracker(zoo_engine, retry=AT_ONCE)):
        fails = Fails(zoo_engine, 3)
        try:
            with pytest.raises(sa.exc.DBAPIError) as caught:
                OuterFactory()
        finally:
            fails.stop()
        assert any("not its own alone" in note for note in caught.value.__notes__)
        assert len(other) == 1


@everywhere
@pytest.mark.parametrize("persistence", ["flush", "commit"])
def test_a_factory_that_persists_as_its_meta_says_is_not_run_again(zoo_engine, persistence):
    class OwnFactory(OrgFactory):
        class Meta:
            model = Org
            sqlalchemy_session_persistence = persistence

    with CleanupManager(ResourceTracker(zoo_engine, retry=AT_ONCE)) as cleanup:
        fails = Fails(zoo_engine, 1)
        try:
            with pytest.raises(sa.exc.DBAPIError) as caught:
                OwnFactory()
        finally:
            fails.stop()
        cleanup.tracker.session.rollback()
    assert any("not its own alone" in note for note in caught.value.__notes__)


@on("postgresql+psycopg", "postgresql+psycopg2", fixture="zoo_database")
def test_a_commit_that_goes_on_after_its_client_is_gone_is_waited_for(zoo_engine, monkeypatch):
    """Until it has ended nobody sees its rows: asked too early, they would be made twice."""
    before = Bystanders(zoo_engine)
    with zoo_engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN PERFORM pg_sleep(1.5); RETURN NULL; END $$"
        )
        connection.exec_driver_sql(
            "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON orgs DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION slow()"
        )
    real, cut = zoo_engine.dialect.do_commit, []

    def commit(dbapi_connection):
        if cut:
            return real(dbapi_connection)
        cut.append(1)
        driver = getattr(dbapi_connection, "driver_connection", dbapi_connection)

        def shut():
            with socket.socket(fileno=os.dup(driver.fileno())) as line:
                line.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(0.3, shut)
        timer.start()
        try:
            real(dbapi_connection)
        finally:
            timer.join()

    monkeypatch.setattr(zoo_engine.dialect, "do_commit", commit)
    with CleanupManager(ResourceTracker(zoo_engine)) as cleanup:
        OrgFactory()
        added = snapshot(zoo_engine).added_since(before.expected)
        assert [len(rows) for rows in added.values()] == [1]
    assert cleanup.report.total_deleted == 1
    with zoo_engine.begin() as connection:
        connection.exec_driver_sql("DROP FUNCTION slow() CASCADE")
    before.assert_untouched()
