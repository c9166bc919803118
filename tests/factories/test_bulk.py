"""create_bulk: what create_batch makes, in a few statements for each table; the rest is refused."""

from __future__ import annotations

import gc
from collections import Counter
from functools import partial

import factory
import factory.random
import pytest
import sqlalchemy as sa
from factory.alchemy import SQLAlchemyModelFactory
from factory.fuzzy import FuzzyText
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    registry,
    relationship,
    validates,
)

from harness.bystanders import Bystanders, snapshot
from harness.factories import (
    DocumentFactory,
    DogFactory,
    EngineerFactory,
    GroupFactory,
    OrgFactory,
    TicketFactory,
)
from harness.models import Group, Order, OrderLine, Org, User
from tidyrows import (
    ArgumentError,
    CleanupManager,
    NoSessionError,
    Progress,
    ResourceTracker,
    factory_for,
)
from tidyrows.errors import BulkError
from tidyrows.factories import Scoped, TrackedFactory

# -- every kind of declaration, no value of which depends on the time or on the worker


class DeptFactory(TrackedFactory[Org]):
    class Meta:
        model = Org

    name = factory.Faker("city")


class MemberFactory(TrackedFactory[User]):
    class Meta:
        model = User
        exclude = ("number",)

    class Params:
        domain = "one.test"
        parts = factory.Dict({"a": factory.Sequence(str), "b": factory.SelfAttribute("a")})
        words = factory.List([factory.SelfAttribute("..domain"), "x"])
        loud = factory.Trait(name=factory.LazyAttribute(lambda o: o.email.upper()[:40]))
        managed = factory.Trait(
            manager=factory.SubFactory(f"{__name__}.MemberFactory", domain="boss.test")
        )
        nameless = False

    number = factory.Iterator([3, 5, 7])
    email = factory.LazyAttribute(
        lambda o: f"{o.parts['b']}-{o.number}-{len(o.words)}@{o.words[0]}"
    )
    name = factory.Maybe("nameless", None, factory.Faker("first_name"))
    org = factory.SubFactory(DeptFactory)


class OrderFactory(TrackedFactory[Order]):
    class Meta:
        model = Order
        rename = {"text": "note"}  # noqa: RUF012 -- factory_boy's way

    user = factory.SubFactory(MemberFactory, org__name=factory.SelfAttribute("...text"))
    text = FuzzyText()


class LineFactory(TrackedFactory[OrderLine]):
    class Meta:
        model = OrderLine

    order = factory.SubFactory(OrderFactory)
    line_no = factory.LazyFunction(iter(range(10_000)).__next__)
    sku = factory.Transformer("abc", transform=str.upper)


CASES = [
    (MemberFactory, {}),
    (MemberFactory, {"loud": True, "domain": "two.test", "org__name": "given"}),
    (MemberFactory, {"managed": True, "nameless": True}),
    (MemberFactory, {"name": factory.Sequence("n{}".format), "org": "shared"}),
    (MemberFactory, {"groups": factory.List([factory.SubFactory(GroupFactory, name="a")])}),
    (OrderFactory, {"user__loud": True, "user__org__name": "one"}),
    (OrderFactory, {"text": factory.Maybe(factory.LazyFunction(int), "yes", "no")}),
    (LineFactory, {"sku": "given", "order__user__org__name": "deep"}),
    (LineFactory, {"quantity": None}),
    (EngineerFactory, {"name": "one", "salary": factory.Sequence(int)}),
    (DogFactory, {"name": "one"}),
    (DocumentFactory, {"title": "one"}),
    (TicketFactory, {"title": "one"}),
]


def described(instance, seen=()):
    """An object by its values, and what it refers to; keys differ."""
    mapper = sa.inspect(instance).mapper
    keys = {column for column in mapper.columns if column.primary_key or column.foreign_keys}
    values = {
        each.key: getattr(instance, each.key)
        for each in mapper.column_attrs
        if keys.isdisjoint(each.columns)
    }
    for relation in mapper.relationships:
        other = getattr(instance, relation.key) if relation.mapper not in seen else None
        others = other if relation.uselist and other is not None else [other]
        seen_now = (*seen, mapper)
        values[relation.key] = [each and described(each, seen_now) for each in others]
    return type(instance).__name__, values


def made_by(create, overrides, tracker):
    if overrides.get("org") == "shared":
        overrides = {**overrides, "org": OrgFactory(name="shared")}
    for each in (MemberFactory, OrderFactory, LineFactory, EngineerFactory):
        each.reset_sequence(0, force=True)
    MemberFactory._meta.pre_declarations["number"].declaration.reset()
    factory.random.reseed_random(7)
    made = create(5, **overrides)
    keys = [sa.inspect(each).identity for each in made]
    in_memory = [described(each) for each in made]
    tracker.session.expire_all()
    assert [described(each) for each in made] == in_memory
    assert [sa.inspect(each).identity for each in made] == keys
    return in_memory


def test_create_bulk_makes_what_create_batch_makes(zoo_engine):
    for kind, overrides in CASES:
        tracker = ResourceTracker(zoo_engine)
        with CleanupManager(tracker):
            expected = made_by(kind.create_batch, overrides, tracker)
            count = len(tracker)
        for chunk_size in (10, 2):
            tracker = ResourceTracker(zoo_engine)
            with CleanupManager(tracker):
                bulk = partial(kind.create_bulk, chunk_size=chunk_size)
                assert made_by(bulk, overrides, tracker) == expected, (kind, overrides)
                assert len(tracker) == count, (kind, overrides)


def test_rows_are_tracked_and_deleted_exactly(zoo_engine, ledgers):
    Bystanders(zoo_engine).insert(Org, {"id": 70_000, "name": "theirs"})
    before = snapshot(zoo_engine)
    tracker = ResourceTracker(zoo_engine, ledger=ledgers.installed(zoo_engine))
    with CleanupManager(tracker):
        MemberFactory.create_bulk(7, chunk_size=3, managed=True)
        LineFactory.create_bulk(5, returning=False, chunk_size=2)
        EngineerFactory.create_bulk(4)
        MemberFactory.create_bulk(2, groups=GroupFactory.create_bulk(3))
        added = snapshot(zoo_engine).added_since(before)
        counts = {name.rpartition(".")[2]: len(rows) for name, rows in added.items()}
        assert counts.pop("tidyrows_ledger")
        assert counts["users"] == 14 + 5 + 2
        assert counts["user_groups"] == 6
        assert counts["persons"] == counts["engineers"] == 4
        assert sum(counts.values()) == len(tracker)
    after = snapshot(zoo_engine)
    [ledger] = after.keys() - before.keys()
    assert all({"owner", "version"} & set(row) for row in after.pop(ledger))
    assert after == before


def test_objects_are_persistent_and_need_no_statement(zoo_engine):
    tracker = ResourceTracker(zoo_engine)
    statements = []
    sa.event.listen(zoo_engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    with CleanupManager(tracker):
        users = MemberFactory.create_bulk(3)
        lines = LineFactory.create_bulk(2)
        statements.clear()
        assert all(user.id and user.org_id == user.org.id and user.org.name for user in users)
        assert [line.quantity for line in lines] == [1, 1]  # a default of the column
        assert not statements
        assert tracker.session.get(User, users[1].id) is users[1]
        assert not tracker.session.dirty
        users[0].name = "changed"
        tracker.session.commit()
        with zoo_engine.connect() as connection:
            query = sa.select(User.name).where(User.id == users[0].id)
            assert connection.scalar(query) == "changed"


def test_relationships_are_as_after_create_batch(zoo_engine):
    with CleanupManager(ResourceTracker(zoo_engine)) as cleanup:
        user = MemberFactory()
        assert user.orders == []  # loaded, and kept up to date from here on
        orders = OrderFactory.create_bulk(2, user=user)
        assert user.orders == orders
        # an org of the session for the first user, and a new one for the second
        chosen = factory.Maybe(
            factory.Iterator([True, False]), user.org, factory.SubFactory(DeptFactory)
        )
        first, second = MemberFactory.create_bulk(2, org=chosen)
        assert first.org is user.org is not second.org
        assert second.org_id == second.org.id
        assert len(cleanup.tracker) == 2 + 2 + 3
        cleanup.tracker.session.expire(user.org)
        assert set(user.org.users) == {user, first}


def test_few_statements_whatever_the_number(zoo_engine):
    statements: Counter[str] = Counter()
    sa.event.listen(
        zoo_engine,
        "before_cursor_execute",
        lambda *args: statements.update([args[2].split("(")[0][:20]]),
    )
    with CleanupManager(ResourceTracker(zoo_engine)):
        names = factory.Sequence("n{}".format)
        for returning in (False, True):
            MemberFactory.create_bulk(400, returning=returning, org__name=names)
            assert (statements["INSERT INTO users "], statements["INSERT INTO orgs "]) == (1, 1)
            statements.clear()


def test_factories_from_the_model(zoo_engine):
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker):
        orders = factory_for(Order).create_bulk(3)
        assert len({order.user.org.id for order in orders}) == 3
        assert len(tracker) == 9


def test_a_failure_in_the_middle_leaves_nothing(zoo_engine):
    before = snapshot(zoo_engine)
    tracker = ResourceTracker(zoo_engine)
    names = iter(["a", "b", "c", "d", None])
    with CleanupManager(tracker):
        with pytest.raises(IntegrityError):
            OrgFactory.create_bulk(5, chunk_size=2, name=factory.LazyFunction(names.__next__))
        assert snapshot(zoo_engine) == before
        assert not len(tracker)
        assert len(MemberFactory.create_bulk(2)) == 2


def test_what_only_the_row_has_can_be_read(zoo_engine):
    class LooseFactory(TrackedFactory[User]):
        class Meta:
            model = User

        class Params:
            dept = factory.SubFactory(DeptFactory)

        email = Scoped("{tag}@example.test")
        org_id = factory.SelfAttribute("dept.id")

    with CleanupManager(ResourceTracker(zoo_engine)):
        users = LooseFactory.create_bulk(4)
        assert len({user.org.id for user in users}) == 4
        lines = LineFactory.create_bulk(3, sku=factory.LazyAttribute(lambda o: str(o.order.id)))
        assert [line.sku for line in lines] == [str(line.order_id).upper() for line in lines]


def test_declarations_read_and_change_an_object_that_waits_for_its_row(zoo_engine):
    class PlainFactory(MemberFactory):
        class Meta:
            exclude = ("name", "number")

    class NotedFactory(TrackedFactory[Order]):
        class Meta:
            model = Order

        user = factory.SubFactory(PlainFactory)

    class ReadingFactory(NotedFactory):
        note = factory.LazyAttribute(lambda o: f"of {o.user.id}")

    class ChangingFactory(NotedFactory):
        note = factory.LazyAttribute(lambda o: setattr(o.user, "name", "set") or "changed")

    class AddingFactory(NotedFactory):
        note = factory.LazyAttribute(lambda o: o.user.groups.append(Group(name="a")) or "added")

    class KeyFactory(NotedFactory):
        class Meta:
            exclude = ("user",)

        user_id = factory.SelfAttribute("user.id")

    with CleanupManager(tracker := ResourceTracker(zoo_engine)):
        for kind in (ReadingFactory, ChangingFactory, AddingFactory, KeyFactory):
            kind.create_bulk(3, returning=False)
        query = sa.select(Order.note, User.id, User.name, Group.name)
        query = query.join(User, User.id == Order.user_id).outerjoin(User.groups)
        with zoo_engine.connect() as connection:
            rows = connection.execute(query).all()
            users = connection.scalar(sa.select(sa.func.count()).select_from(User))
    assert len({row.id for row in rows}) == users == 12
    expected = Counter({("set", None): 3, (None, "a"): 3, (None, None): 6})
    assert Counter((row[2], row[3]) for row in rows) == expected
    assert sorted(row.note for row in rows if "of" in (row.note or "")) == sorted(
        f"of {row.id}" for row in rows if "of" in (row.note or "")
    )
    assert len(tracker) == 0


def test_a_session_that_routes_as_a_flush_would(zoo_engine):
    class Routing(Session):
        def get_bind(self, *args, **kwargs):
            return zoo_engine if self._flushing else sa.create_engine("sqlite://")

    with CleanupManager(ResourceTracker(zoo_engine)) as cleanup, Routing() as session:
        orders = OrderFactory.using(session).create_bulk(2)
        assert not session._flushing
        session.commit()
        assert len(cleanup.tracker) == 3 * len(orders)


def test_a_declaration_may_write_what_it_reads(zoo_engine):
    """The objects that wait for their rows are those of any other session."""

    class NotedFactory(OrderFactory):
        user = factory.SubFactory(MemberFactory)
        text = factory.LazyAttribute(lambda o: Chain(user=o.user).note)

    class Chain(OrderFactory):
        user = None
        text = factory.LazyAttribute(lambda o: f"after {o.user.email}")

    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker):
        orders = NotedFactory.create_bulk(3)
        assert [order.note for order in orders] == [f"after {o.user.email}" for o in orders]
        tracker.session.expire_all()
        assert [len(order.user.orders) for order in orders] == [2, 2, 2]
        assert len({order.user.org.id for order in orders}) == 3
        assert len(tracker) == 3 * 4


def test_rows_without_objects_stay_few_in_memory(zoo_engine):
    progress: list[Progress] = []
    tracker = ResourceTracker(zoo_engine)
    ended, seen = [], []
    sa.event.listen(zoo_engine, "commit", lambda _connection: ended.append(1))

    def report(each):
        progress.append(each)
        seen.append(len(ended))

    with CleanupManager(tracker):
        made = MemberFactory.create_bulk(10, returning=False, chunk_size=4, on_progress=report)
        assert made == []
        assert seen == [1, 2, 3]  # the chunk is committed by then
        assert [(each.done, each.total, each.finished) for each in progress] == [
            (4, 10, False),
            (8, 10, False),
            (10, 10, True),
        ]
        assert len(tracker) == 20
        gc.collect()
        assert not list(tracker.session.identity_map.values())


# -- what needs the row of each object -------------------------------------------------------------


class Hooked(DeptFactory):
    @factory.post_generation
    def extras(self, create, extracted, **kwargs):
        self.name = "by a hook"


class OwnCreate(DeptFactory):
    @classmethod
    def _create(cls, model_class, *args, **kwargs):
        return super()._create(model_class, *args, **kwargs)


class OwnCall(DeptFactory):
    @classmethod
    def create(cls, **kwargs):
        return super().create(**{"name": "a name of its own", **kwargs})


class OwnBatch(DeptFactory):
    @classmethod
    def create_batch(cls, size, **kwargs):
        return super().create_batch(size, **{"name": "of a batch", **kwargs})


class OwnGeneration(DeptFactory):
    @classmethod
    def _generate(cls, strategy, params):
        return super()._generate(strategy, {"name": "generated", **params})


class OwnEnd(DeptFactory):
    @classmethod
    def _after_postgeneration(cls, instance, create, results=None):
        pass


class Found(DeptFactory):
    class Meta:
        sqlalchemy_get_or_create = ("name",)


class Related(DeptFactory):
    users = factory.RelatedFactoryList(MemberFactory, factory_related_name="org")


class Chosen(DeptFactory):
    class Params:
        busy = factory.Trait(user=factory.RelatedFactory(MemberFactory, factory_related_name="org"))


class PlainFactory(SQLAlchemyModelFactory):
    class Meta:
        model = Org


class Elsewhere(DeptFactory):
    class Meta:
        sqlalchemy_session = Session(sa.create_engine("sqlite://"))


REFUSED = [
    (Hooked, {}, "Hooked.extras: it is a post_generation"),
    (OwnCreate, {}, "OwnCreate._create: the factory overrides it"),
    (OwnCall, {}, "OwnCall.create: the factory overrides it"),
    (OwnBatch, {}, "OwnBatch.create_batch: the factory overrides it"),
    (OwnGeneration, {}, "OwnGeneration._generate: the factory overrides it"),
    (OwnEnd, {}, "OwnEnd._after_postgeneration: the factory overrides it"),
    (Found, {}, "Found.Meta.sqlalchemy_get_or_create"),
    (Related, {}, "Related.users: it is a RelatedFactoryList"),
    (Chosen, {"busy": True}, "Chosen.user: it is a RelatedFactory"),
    (MemberFactory, {"org": factory.SubFactory(Hooked)}, "Hooked.extras"),
    (MemberFactory, {"org": factory.SubFactory(PlainFactory)}, "PlainFactory.the factory"),
    (MemberFactory, {"org": factory.SubFactory(Elsewhere)}, "Elsewhere.Meta.sqlalchemy_session"),
]


@pytest.mark.parametrize(("kind", "overrides", "words"), REFUSED, ids=lambda each: str(each)[:20])
def test_what_needs_the_row_of_each_object_is_refused(tracker, rows, kind, overrides, words):
    with pytest.raises(BulkError) as caught:
        kind.create_bulk(3, **overrides)
    assert words in str(caught.value)
    assert f"{kind.__name__}.create_bulk(n, hooks=True)" in str(caught.value)
    assert not tracker.session.new
    assert rows(Org) == rows(User) == 0


def test_hooks_and_own_ways_are_honoured_one_by_one(tracker, rows):
    progress = []
    made = Hooked.create_bulk(3, hooks=True, chunk_size=2, on_progress=progress.append)
    assert [org.name for org in made] == ["by a hook"] * 3
    assert [each.done for each in progress] == [2, 3]
    assert tracker.ended == ["commit"]
    for own, told in (
        (OwnCall, "a name of its own"),
        (OwnBatch, "of a batch"),
        (OwnGeneration, "generated"),
    ):
        assert [org.name for org in own.create_bulk(1, hooks=True)] == [told]
    tracker.ended.clear()
    assert Related.create_bulk(2, hooks=True, returning=False, chunk_size=1) == []
    assert tracker.ended == ["commit"] * 2
    assert (rows(Org), rows(User)) == (8, 4)


def test_a_trait_that_brings_hooks_is_honoured_where_it_is_off(tracker, rows):
    assert len(Chosen.create_bulk(3)) == rows(Org) == 3


def test_a_changed_factory_is_compiled_anew(tracker, monkeypatch):
    assert {org.name for org in DeptFactory.create_bulk(2, name="a")} == {"a"}
    declared = DeptFactory._meta.pre_declarations
    monkeypatch.setitem(declared.declarations, "name", factory.Sequence("n{}".format))
    assert len({org.name for org in DeptFactory.create_bulk(2)}) == 2
    monkeypatch.setattr(declared.declarations["name"], "function", lambda _n: "c")
    assert {org.name for org in DeptFactory.create_bulk(2)} == {"c"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n": -1}, "n must be a whole number, at least 0"),
        ({"n": "3"}, "n must be a whole number"),
        ({"n": True}, "n must be a whole number"),
        ({"n": 1, "chunk_size": 0}, "chunk_size must be"),
        ({"n": 1, "returning": 0}, "returning must be"),
        ({"n": 1, "on_progress": 1}, "on_progress must be"),
    ],
)
def test_arguments_are_checked(tracker, arguments, words):
    with pytest.raises(ArgumentError, match=words):
        DeptFactory.create_bulk(**arguments)


def test_none_at_all(tracker, rows):
    assert DeptFactory.create_bulk(0) == []
    assert not tracker.ended


def test_without_a_session(shop):
    with pytest.raises(NoSessionError, match="DeptFactory has no session"):
        DeptFactory.create_bulk(1)


@pytest.mark.parametrize("persistence", [None, "flush", "commit"])
def test_a_session_of_meta(shop, rows, persistence):
    with Session(shop) as session:

        class OwnFactory(TrackedFactory[Org]):
            class Meta:
                model = Org
                sqlalchemy_session = session
                sqlalchemy_session_persistence = persistence

            name = "a"

        made = OwnFactory.create_bulk(3)
        assert all(org.id for org in made)
        assert rows(Org) == (3 if persistence == "commit" else 0)
        session.rollback()
        assert rows(Org) == (3 if persistence == "commit" else 0)
        if persistence is None:  # as objects of a flush that is rolled back
            assert all(sa.inspect(org).transient for org in made)


def test_inside_of_a_hook_the_outer_call_commits(tracker, rows):
    class Outer(DeptFactory):
        @factory.post_generation
        def users(self, create, extracted, **kwargs):
            MemberFactory.create_bulk(3, org=self)
            MemberFactory.create_bulk(3, returning=False, chunk_size=1, org=self)
            assert rows(Org) == 0

    org = Outer()
    assert tracker.ended == ["commit"]
    assert (rows(Org), rows(User)) == (1, 6)
    assert len(org.users) == 6


def test_a_transaction_begun_by_hand_is_the_callers(make_tracker, rows):
    tracker = make_tracker(owns_session=False)
    tracker.session.begin()
    with tracker.block():
        MemberFactory.create_bulk(2)
    assert rows(User) == 0
    tracker.session.commit()
    assert rows(User) == 2


def test_objects_of_the_caller_are_written_too(tracker, rows):
    org, boss = Org(name="new"), MemberFactory.build(org=None)
    boss.org = org
    users = MemberFactory.create_bulk(2, org=org, manager=boss)
    assert (rows(Org), rows(User)) == (1, 3)
    assert {user.manager_id for user in users} == {boss.id}
    assert users[0] in org.users


# -- models that see how their objects are made ----------------------------------------------------


class Base(DeclarativeBase):
    pass


class Shelf(Base):
    __tablename__ = "shelves"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(40), server_default="from the database")
    books: Mapped[list[Book]] = relationship(back_populates="shelf", passive_deletes=True)


class Book(Base):
    __tablename__ = "books"
    id: Mapped[int] = mapped_column(primary_key=True)
    shelf_id: Mapped[int | None] = mapped_column(sa.ForeignKey("shelves.id"))
    title: Mapped[str] = mapped_column(sa.String(40))
    words: Mapped[int] = mapped_column(default=lambda: 7)
    length: Mapped[int] = mapped_column(sa.Integer, sa.Computed("words * 2", persisted=True))
    shelf: Mapped[Shelf | None] = relationship(back_populates="books")

    @validates("title")
    def check(self, _key, value):
        return value.strip()


class Lid(Base):
    __tablename__ = "lids"
    id: Mapped[int] = mapped_column(primary_key=True)
    shelf_id: Mapped[int | None] = mapped_column(sa.ForeignKey("shelves.id"))
    shelf: Mapped[Shelf | None] = relationship()


class Pen(Base):
    __tablename__ = "pens"
    id: Mapped[int] = mapped_column(primary_key=True)
    colour: Mapped[str] = mapped_column(sa.String(40))
    shelf_id: Mapped[int | None] = mapped_column(sa.ForeignKey("shelves.id"))

    def __init__(self, colour):
        self.colour = colour.upper()


class ShelfFactory(TrackedFactory[Shelf]):
    class Meta:
        model = Shelf


class BookFactory(TrackedFactory[Book]):
    class Meta:
        model = Book

    title = " a title "
    shelf = factory.SubFactory(ShelfFactory)


class LidFactory(TrackedFactory[Lid]):
    class Meta:
        model = Lid


class PenFactory(TrackedFactory[Pen]):
    class Meta:
        model = Pen
        inline_args = ("colour",)

    colour = "red"


def test_models_with_ways_of_their_own(engine):
    Base.metadata.create_all(engine)
    inserted = []
    tracker = ResourceTracker(engine)
    try:
        with CleanupManager(tracker):
            books = BookFactory.create_bulk(3)
            assert [(b.title, b.words, b.length) for b in books] == [("a title", 7, 14)] * 3
            assert {b.shelf.name for b in books} == {"from the database"}
            assert {p.colour for p in PenFactory.create_bulk(2)} == {"RED"}
            shelves = ShelfFactory.create_bulk(2, name=sa.func.upper("x"))
            assert [shelf.name for shelf in shelves] == ["X", "X"]
            loaded = shelves[0].books
            assert loaded == []
            book = BookFactory.create_bulk(1, shelf=shelves[0])[0]
            assert loaded == [book]  # as the relationship's other side always is
            sa.event.listen(Shelf, "before_insert", lambda *args: inserted.append(args[2]))
            assert ShelfFactory.create_bulk(2) == inserted
            assert len(tracker) == 3 + 3 + 2 + 2 + 1 + 2
    finally:
        Base.metadata.drop_all(engine)


def test_a_registry_with_a_constructor_of_its_own_and_a_default_that_no_model_has(engine):
    own = registry(constructor=lambda self, **values: setattr(self, "name", values["name"].upper()))

    @own.mapped
    class Cup:
        __tablename__ = "cups"
        id = mapped_column(sa.Integer, primary_key=True)
        name = mapped_column(sa.String(20))

    class Blank(sa.TypeDecorator):
        impl = sa.String(20)
        cache_ok = True

        def process_bind_param(self, value, dialect):
            return value or "blank"

    plain = registry()

    @plain.mapped
    class Mug:
        __tablename__ = "mugs"
        id = mapped_column(sa.Integer, primary_key=True)
        name = mapped_column(sa.String(20))
        status = mapped_column(sa.String(20))
        note = mapped_column(Blank)

    own.metadata.create_all(engine)
    with engine.begin() as connection:
        created = sa.schema.CreateTable(Mug.__table__).compile(engine)
        text = str(created).replace("status VARCHAR(20)", "status VARCHAR(20) DEFAULT 'new'")
        connection.exec_driver_sql(text)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker):
        assert [cup.name for cup in factory_for(Cup).create_bulk(1, name="a")] == ["A"]

        class MugFactory(TrackedFactory[Mug]):
            class Meta:
                model = Mug

            name = factory.Sequence("mug{}".format)

        MugFactory.create_batch(2)
        MugFactory.create_bulk(2)
        with engine.connect() as connection:
            rows = connection.execute(sa.select(Mug.status, Mug.note)).all()
        assert rows == [(None, "blank")] * 4


def test_a_deleted_object_is_no_parent(engine):
    Base.metadata.create_all(engine)
    with CleanupManager(tracker := ResourceTracker(engine)):
        tracker.session.delete(shelf := ShelfFactory())
        tracker.session.flush()
        with pytest.raises(InvalidRequestError, match="has been deleted"):
            LidFactory.create_bulk(2, shelf=shelf)
