"""Factories made from models: every type, every constraint, every kind of key and class."""

from __future__ import annotations

import enum
import uuid
from dataclasses import InitVar, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import factory
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.ext.declarative import AbstractConcreteBase
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    mapped_column,
    registry,
    relationship,
    validates,
)

from harness.bystanders import Bystanders
from tidyrows import (
    ArgumentError,
    AutoFactoryError,
    CleanupManager,
    ResourceTracker,
    TrackedFactory,
    WorkerContext,
    column_maker,
    create_tree,
    factory_for,
)

FK = sa.ForeignKey


def orm_base():
    return type("Base", (DeclarativeBase,), {})


@pytest.fixture
def base():
    class Base(DeclarativeBase):
        pass

    return Base


@pytest.fixture
def block(engine, base):
    """Make the tables, and a block in which every row is tracked; the rows of others stay."""

    class Block:
        tracker = ResourceTracker(
            engine, context=replace(WorkerContext.current(), worker_id="gw1", worker_count=8)
        )

        def __enter__(self):
            base.metadata.create_all(engine)
            self.others = Bystanders(engine)
            self.cleanup = CleanupManager(self.tracker)
            self.cleanup.__enter__()
            return self

        def __exit__(self, *error):
            self.cleanup.__exit__(*error)
            self.others.assert_untouched()

        def again(self, instance):
            """The same row, read anew."""
            with Session(engine) as session:
                return session.get(type(instance), sa.inspect(instance).identity)

        def count(self, model):
            with engine.connect() as connection:
                return connection.scalar(sa.select(sa.func.count()).select_from(model))

    return Block()


# -- types -----------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


class Money(sa.TypeDecorator[Any]):
    """A type of the project: its value is no number, and no text."""

    impl = sa.Numeric(8, 2)
    cache_ok = True

    def process_bind_param(self, value, dialect):
        return None if value is None else value[0]

    def process_result_value(self, value, dialect):
        return None if value is None else (value, "EUR")


class JsonText(sa.TypeDecorator[Any]):
    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value, dialect):
        return repr(sorted(value.items()))

    def process_result_value(self, value, dialect):
        return dict(eval(value))


class CharGuid(sa.TypeDecorator[Any]):
    impl = sa.Uuid
    cache_ok = True

    def load_dialect_impl(self, dialect):
        return dialect.type_descriptor(sa.CHAR(36))

    def process_bind_param(self, value, dialect):
        assert isinstance(value, uuid.UUID)
        return str(value)

    def process_result_value(self, value, dialect):
        return uuid.UUID(value)


class AwareMoment(sa.TypeDecorator[Any]):
    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value, dialect):
        if value.tzinfo is None:
            raise TypeError("a zone is missing")
        return int(value.timestamp())

    def process_result_value(self, value, dialect):
        return datetime.fromtimestamp(value, UTC)


COMMON = {
    "text": sa.Text,
    "short": sa.String(3),
    "char": sa.CHAR(5),
    "unicode": sa.Unicode(20),
    "small": sa.SmallInteger,
    "whole": sa.Integer,
    "big": sa.BigInteger,
    "numeric": sa.Numeric(5, 3),
    "fraction": sa.Numeric(3, 3),
    "money": sa.Numeric(6, 2, asdecimal=False),
    "real": sa.Float,
    "double": sa.Double,
    "flag": sa.Boolean,
    "colour": sa.Enum(Colour),
    "stored": sa.Enum(
        Colour, values_callable=lambda kind: [each.value for each in kind], name="stored"
    ),
    "words": sa.Enum("yes", "no", name="words"),
    "plain": sa.Enum(Colour, native_enum=False, create_constraint=True, name="plain"),
    "json": sa.JSON,
    "uuid": sa.Uuid,
    "uuid_text": sa.Uuid(as_uuid=False),
    "day": sa.Date,
    "moment": sa.DateTime,
    "zoned": sa.DateTime(timezone=True),
    "clock": sa.Time,
    "bytes": sa.LargeBinary,
    "few_bytes": sa.LargeBinary(4),
    "interval": sa.Interval,
    "guid": CharGuid,
    "decorated": Money,
    "json_text": JsonText,
    "aware": AwareMoment,
    "variant": sa.JSON().with_variant(postgresql.JSONB(), "postgresql"),
}
OWN = {
    "sqlite": {},
    "postgresql": {
        "array": sa.ARRAY(sa.Integer),
        "grid": postgresql.ARRAY(sa.String(4), dimensions=2),
        "jsonb": postgresql.JSONB,
        "inet": postgresql.INET,
        "cidr": postgresql.CIDR,
        "macaddr": postgresql.MACADDR,
        "macaddr8": postgresql.MACADDR8,
        "bit": postgresql.BIT(5),
        "interval_own": postgresql.INTERVAL,
        "time_zone": sa.Time(timezone=True),
        "span": postgresql.INT4RANGE,
        "spans": postgresql.INT8MULTIRANGE,
        "numbers": postgresql.NUMRANGE,
        "days": postgresql.DATERANGE,
        "moments": postgresql.TSRANGE,
        "zoned_moments": postgresql.TSTZRANGE,
        "words_found": postgresql.TSVECTOR,
        "bytea": postgresql.BYTEA,
        "enum_own": postgresql.ENUM("a", "b", name="enum_own"),
        "uuid_own": postgresql.UUID,
    },
    "mysql": {
        "year": mysql.YEAR,
        "set": mysql.SET("a", "b"),
        "enum_own": mysql.ENUM("a", "b"),
        "tiny": mysql.TINYINT,
        "tiny_flag": mysql.TINYINT(1),
        "medium": mysql.MEDIUMINT(unsigned=True),
        "bit": mysql.BIT(5),
        "long": mysql.LONGTEXT,
        "tiny_text": mysql.TINYTEXT,
        "blob": mysql.MEDIUMBLOB,
        "binary": mysql.BINARY(6),
        "timestamp": mysql.TIMESTAMP,
        "double_own": mysql.DOUBLE,
    },
}


def as_python(value: Any) -> Any:
    """A value as any of the databases gives it back."""
    if isinstance(value, datetime):
        return value.replace(tzinfo=None)
    if isinstance(value, bytes) and len(value) == 1:
        return value[0]
    if isinstance(value, float):
        return Decimal(str(value))
    return value


def test_every_type_is_filled_and_read_back(database, engine, base, block):
    column_maker(Money)(lambda _: (Decimal("9.50"), "EUR"))
    types = COMMON | OWN[database.backend]
    columns = {name: mapped_column(kind, nullable=False) for name, kind in types.items()}
    made = {"__tablename__": "kinds", "id": mapped_column(sa.Integer, primary_key=True)}
    model = type("Kinds", (base,), made | columns)
    state = factory.random.get_random_state()
    assert "decorated" in factory_for(model)._meta.pre_declarations
    assert factory.random.get_random_state() == state, "the first use moves the seeded generator"
    with block:
        for row in factory_for(model).create_batch(5):
            again = block.again(row)
            for name in types:
                given, read = as_python(getattr(row, name)), as_python(getattr(again, name))
                assert given is not None, name
                assert given == read or str(given) == str(read), name


def test_every_type_can_be_unique(database, engine, base, block):
    """Twenty rows, where each column has a UNIQUE of its own, by each of two workers."""
    names = [
        *("text_", "unicode", "whole", "big", "numeric_", "uuid", "uuid_text", "guid"),
        *("day", "moment", "zoned", "clock_", "interval", "variant_", "double"),
    ]
    types = {name: kind for name, kind in COMMON.items() if name in names}
    types |= {"email": sa.String(40), "url": sa.String(60), "long_numeric": sa.Numeric(12, 2)}
    if database.backend == "postgresql":
        types |= {name: OWN["postgresql"][name] for name in ("inet", "macaddr", "span", "days")}
    columns = {
        name: mapped_column(kind, nullable=False, unique=True) for name, kind in types.items()
    }
    made = {"__tablename__": "kinds", "code": mapped_column(sa.String(20), primary_key=True)}
    model = type("Kinds", (base,), made | columns)
    with block:
        factory_for(model).create_batch(20)
        other = replace(WorkerContext.current(), worker_id="gw7", worker_index=7, worker_count=8)
        with CleanupManager(ResourceTracker(engine, context=other)):
            factory_for(model).create_batch(20)
            assert block.count(model) == 40


# -- what is left alone ----------------------------------------------------------------------------


def test_what_has_a_value_is_left_alone(base, block):
    class Thing(base):
        __tablename__ = "things"
        id: Mapped[int] = mapped_column(primary_key=True)
        absent: Mapped[str | None] = mapped_column(sa.String(20))
        of_python: Mapped[str] = mapped_column(sa.String(20), default="python")
        of_call: Mapped[int] = mapped_column(default=lambda: 7)
        of_server: Mapped[str] = mapped_column(sa.String(20), server_default="server")
        twice: Mapped[int] = mapped_column(sa.Computed("of_call * 2", persisted=True))
        version: Mapped[int] = mapped_column()
        owner_id: Mapped[int | None] = mapped_column(FK("things.id"))
        needed: Mapped[str] = mapped_column(sa.String(20))

        __mapper_args__ = {"version_id_col": version}  # noqa: RUF012 -- SQLAlchemy's way

        @validates("needed")
        def shout(self, key, value):
            return value.upper()

    with block:
        again = block.again(factory_for(Thing)())
        assert (again.absent, again.owner_id, again.version) == (None, None, 1)
        assert (again.of_python, again.of_call, again.of_server, again.twice) == (
            "python", 7, "server", 14,
        )  # fmt: skip  # one line
        assert again.needed == again.needed.upper()
        assert block.count(Thing) == 1
        assert factory_for(Thing)(absent="x", needed="mine").needed == "MINE"
        assert factory_for(Thing).build().version is None


def test_a_factory_of_ones_own_adds_what_it_declares_itself(base, block):
    class Org(base):
        __tablename__ = "orgs"
        label: Mapped[str] = mapped_column(sa.String(50))
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(sa.String(30))

    class User(base):
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        email: Mapped[str] = mapped_column(sa.String(60), unique=True)
        first_name: Mapped[str] = mapped_column(sa.String(4))
        age: Mapped[int]
        level: Mapped[int]
        hidden: Mapped[str] = mapped_column(sa.String(9))
        org_id: Mapped[int] = mapped_column(FK("orgs.id"))
        org: Mapped[Org] = relationship()

        @validates("email")
        def hide(self, key, value):
            self.hidden = "model"
            return value

    class UserFactory(TrackedFactory[User]):
        class Meta:
            model = User
            auto = True
            exclude = ("hidden",)

        class Params:
            senior = factory.Trait(age=90)

        level = 3
        org__name = "ours"

    class JuniorFactory(UserFactory):
        class Meta:
            exclude = ()

        age = 15

    class NoFactory(UserFactory):
        class Meta:
            auto = False

        org = None

    with block:
        one, two = UserFactory.create_batch(2, senior=True)
        assert (one.age, one.level, one.org.name, one.hidden) == (90, 3, "ours", "model")
        assert one.email != two.email
        assert one.email.endswith("@example.test")
        assert one.org is not two.org
        assert len(one.first_name) <= 4
        junior = JuniorFactory(org=one.org)
        assert (junior.age, junior.level, junior.org) == (15, 3, one.org)
        assert UserFactory(org_id=one.org_id).org is one.org
        assert block.count(Org) == 2
        assert not {"email", "first_name"} & NoFactory._meta.declarations.keys()
        assert {"email", "org", "age"} <= UserFactory._meta.declarations.keys()
        assert isinstance(UserFactory.build().org, Org)
    with pytest.raises(ArgumentError, match="auto must be True or False"):

        class WrongFactory(TrackedFactory[User]):
            class Meta:
                model = User
                auto = 1


def test_what_a_parent_is_made_in_is_the_session_of_its_child(engine, base, block):
    class Org(base):
        __tablename__ = "orgs"
        label: Mapped[str] = mapped_column(sa.String(50))
        id: Mapped[int] = mapped_column(primary_key=True)

    class User(base):
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        org_id: Mapped[int] = mapped_column(FK("orgs.id"))
        org: Mapped[Org] = relationship()

    class UserFactory(TrackedFactory[User]):
        class Meta:
            model = User
            auto = True
            sqlalchemy_session_persistence = "flush"

    with block:
        for _ in range(2):
            with Session(engine) as session:
                UserFactory._meta.sqlalchemy_session = session
                user = UserFactory()
                assert user.id is not None
                assert sa.inspect(user.org).session is session
        assert block.count(Org) == 0


# -- constraints -----------------------------------------------------------------------------------


def test_unique_constraints_over_several_columns_have_a_member_that_differs(base, block):
    class Owner(base):
        __tablename__ = "owners"
        label: Mapped[str] = mapped_column(sa.String(50))
        id: Mapped[int] = mapped_column(primary_key=True)

    class Slot(base):
        __tablename__ = "slots"
        __table_args__ = (
            sa.UniqueConstraint("owner_id", "name"),
            sa.UniqueConstraint("colour", "number"),
            sa.UniqueConstraint("flag", "absent"),
            sa.Index("lowered", "flag", "label", unique=True),
        )
        id: Mapped[int] = mapped_column(primary_key=True)
        owner_id: Mapped[int] = mapped_column(FK("owners.id"))
        owner: Mapped[Owner] = relationship()
        name: Mapped[str] = mapped_column(sa.String(30))
        colour: Mapped[Colour]
        number: Mapped[int]
        flag: Mapped[bool]
        absent: Mapped[int | None]
        label: Mapped[str] = mapped_column(sa.String(20))

    class Line(base):
        __tablename__ = "lines"
        label: Mapped[str] = mapped_column(sa.String(50))
        owner_id: Mapped[int] = mapped_column(FK("owners.id"), primary_key=True)
        line_no: Mapped[int] = mapped_column(primary_key=True)

    with block:
        owner = factory_for(Owner)()
        factory_for(Slot).create_batch(30, owner=owner)
        factory_for(Line).create_batch(30, owner_id=owner.id)


def test_a_text_that_is_too_short_to_be_unique_is_refused_with_the_line_to_write(base, block):
    class Country(base):
        __tablename__ = "countries"
        code: Mapped[str] = mapped_column(sa.String(2), primary_key=True)

    with block:
        with pytest.raises(AutoFactoryError, match=r"countries.*code = ") as caught:
            factory_for(Country)()
        assert (caught.value.model, caught.value.column) == (Country, "code")
        assert factory_for(Country)(code="XX").code == "XX"


def test_simple_checks_are_met(base, block):
    class Product(base):
        __tablename__ = "products"
        __table_args__ = (
            sa.CheckConstraint("price > 10 AND price <= 10.05", name="price_is_fair"),
            sa.CheckConstraint("stock BETWEEN -3 AND -1"),
            sa.CheckConstraint("state IN ('new', 'it''s old') AND state <> 'new'"),
            sa.CheckConstraint("length(note) >= 30"),
            sa.CheckConstraint("absent IS NULL OR absent > 5"),
            sa.CheckConstraint("grade IS NULL OR grade >= 200"),
            sa.CheckConstraint("5 < small AND small < 7"),
            sa.CheckConstraint("share >= 0 AND share < 0.001"),
            sa.CheckConstraint("((place > (0)) AND (length((note)) <= 35))"),
        )
        id: Mapped[int] = mapped_column(primary_key=True)
        price: Mapped[Decimal] = mapped_column(sa.Numeric(8, 2))
        stock: Mapped[int]
        state: Mapped[str] = mapped_column(sa.String(20))
        note: Mapped[str] = mapped_column(sa.String(40))
        absent: Mapped[int | None]
        grade: Mapped[int]
        small: Mapped[int] = mapped_column(sa.SmallInteger)
        share: Mapped[float] = mapped_column(sa.Double)
        place: Mapped[int] = mapped_column(sa.CheckConstraint("place <> 7 AND place < 9"))

    with block:
        factory_for(Product).create_batch(40)


def test_a_check_that_is_not_simple_is_named_if_the_database_refuses_the_row(base, block):
    class Span(base):
        __tablename__ = "spans"
        __table_args__ = (sa.CheckConstraint("low < high", name="low_below_high"),)
        id: Mapped[int] = mapped_column(primary_key=True)
        low: Mapped[int]
        high: Mapped[int]

    class Child(base):
        __tablename__ = "children"
        id: Mapped[int] = mapped_column(primary_key=True)
        span_id: Mapped[int] = mapped_column(FK("spans.id"), default=77)

    with block:
        assert factory_for(Span)(low=1, high=2).id
        with pytest.raises(sa.exc.DBAPIError) as caught:
            factory_for(Span)(low=2, high=1)
        (note,) = caught.value.__notes__
        assert "CHECK low_below_high (low < high). Declare low = ...; high = ..." in note
        with pytest.raises(sa.exc.DBAPIError) as caught:
            factory_for(Child)()
        (note,) = caught.value.__notes__
        assert "whether spans.id has the default of span_id. Declare span_id = ..." in note


# -- foreign keys ----------------------------------------------------------------------------------


def test_a_class_whose_mapping_is_deferred_disturbs_no_other():
    base = orm_base()

    class Shape(AbstractConcreteBase, orm_base()):
        strict_attrs = True

    class Circle(Shape):
        __tablename__ = "circles"
        id: Mapped[int] = mapped_column(primary_key=True)
        __mapper_args__ = {"concrete": True, "polymorphic_identity": "circle"}  # noqa: RUF012 -- SQLAlchemy's way

    class Org(base):
        __tablename__ = "orgs"
        id: Mapped[int] = mapped_column(primary_key=True)

    class User(base):
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        org_id: Mapped[int] = mapped_column(FK("orgs.id"))

    assert isinstance(factory_for(User).build(org=Org(id=3)), User)
    assert Circle.__name__


def test_a_key_without_a_relationship_gets_its_row_too(base, block):
    class Org(base):
        __tablename__ = "orgs"
        label: Mapped[str] = mapped_column(sa.String(50))
        id: Mapped[int] = mapped_column(primary_key=True)

    class User(base):
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        org_id: Mapped[int] = mapped_column(FK("orgs.id"))

    class Profile(base):
        __tablename__ = "profiles"
        label: Mapped[str] = mapped_column(sa.String(50))
        user_id: Mapped[int] = mapped_column(FK("users.id"), primary_key=True)

    class UserFactory(TrackedFactory[User]):
        class Meta:
            model = User
            auto = True

        org = factory.SubFactory(factory_for(Org), id=77)

    with block:
        profile = factory_for(Profile)()
        user = block.again(profile)
        assert (block.count(Org), block.count(User)) == (1, 1)
        user = factory_for(User)(org=factory_for(Org)())
        assert factory_for(Profile)(user=user).user_id == user.id
        assert factory_for(User)(org_id=user.org_id).org_id == user.org_id
        assert block.count(Org) == 2
        assert UserFactory().org_id == 77
        assert block.count(User) == 4
        assert factory_for(Profile).build().user_id is None


def test_composite_keys_that_share_a_column_get_one_value(base, block):
    class Tenant(base):
        __tablename__ = "tenants"
        label: Mapped[str] = mapped_column(sa.String(50))
        id: Mapped[int] = mapped_column(primary_key=True)

    def owned(name):
        return {
            "__tablename__": f"{name}s",
            "tenant_id": mapped_column(FK("tenants.id"), primary_key=True),
            "id": mapped_column(sa.Integer, primary_key=True, autoincrement=False),
            "tenant": relationship(Tenant),
            "label": mapped_column(sa.String(50), nullable=False),
        }

    orders = type("Order", (base,), owned("order"))
    products = type("Product", (base,), owned("product"))

    class Line(base):
        __tablename__ = "lines"
        __table_args__ = (
            sa.ForeignKeyConstraint(["tenant_id", "order_id"], ["orders.tenant_id", "orders.id"]),
            sa.ForeignKeyConstraint(
                ["tenant_id", "product_id"], ["products.tenant_id", "products.id"]
            ),
        )
        label: Mapped[str] = mapped_column(sa.String(50))
        id: Mapped[int] = mapped_column(primary_key=True)
        tenant_id: Mapped[int]
        order_id: Mapped[int]
        product_id: Mapped[int]
        order = relationship(orders)

    class Note(base):
        __tablename__ = "notes"
        __table_args__ = (
            sa.ForeignKeyConstraint(["tenant_id", "order_id"], ["orders.tenant_id", "orders.id"]),
        )
        label: Mapped[str] = mapped_column(sa.String(50))
        id: Mapped[int] = mapped_column(primary_key=True)
        tenant_id: Mapped[int] = mapped_column(FK("tenants.id"))
        order_id: Mapped[int]

    with block:
        factory_for(Line).create_batch(2)
        factory_for(Note).create_batch(2)
        assert [block.count(each) for each in (Tenant, orders, products)] == [4, 4, 2]
        mine = factory_for(Tenant)()
        line = factory_for(Line)(tenant_id=mine.id)
        assert (line.tenant_id, line.order.tenant_id) == (mine.id, mine.id)
        line = factory_for(Line)(order=line.order)
        assert line.tenant_id == mine.id
        assert factory_for(Note)(tenant=mine).tenant_id == mine.id
        assert block.count(Tenant) == 5


def test_a_circle_of_keys_that_must_be_there_is_an_error_that_names_the_tables(base, block):
    class Hen(base):
        __tablename__ = "hens"
        label: Mapped[str] = mapped_column(sa.String(50))
        id: Mapped[int] = mapped_column(primary_key=True)
        egg_id: Mapped[int] = mapped_column(FK("eggs.id", use_alter=True, name="of_egg"))
        egg: Mapped[Egg] = relationship(foreign_keys=egg_id)

    class Egg(base):
        __tablename__ = "eggs"
        id: Mapped[int] = mapped_column(primary_key=True)
        hen_id: Mapped[int] = mapped_column(FK("hens.id", use_alter=True, name="of_hen"))
        best_id: Mapped[int | None] = mapped_column(FK("eggs.id"))

    base.registry._class_registry["Egg"] = Egg
    with block:
        with pytest.raises(AutoFactoryError, match=r"hens -> eggs -> hens") as caught:
            factory_for(Hen)()
        assert "hen=..." in str(caught.value)
        assert block.count(Hen) == 0
        with pytest.raises(AutoFactoryError, match=r"eggs -> hens -> eggs"):
            create_tree(Egg)


def test_a_tree_has_one_row_of_each_class_that_is_needed(base, block):
    class Org(base):
        __tablename__ = "orgs"
        label: Mapped[str] = mapped_column(sa.String(50))
        id: Mapped[int] = mapped_column(primary_key=True)
        code: Mapped[str] = mapped_column(sa.String(30), unique=True)

    class User(base):
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        org_id: Mapped[int] = mapped_column(FK("orgs.id"))
        org: Mapped[Org] = relationship()
        boss_id: Mapped[int | None] = mapped_column(FK("users.id"))

    class Order(base):
        __tablename__ = "orders"
        label: Mapped[str] = mapped_column(sa.String(50))
        id: Mapped[int] = mapped_column(primary_key=True)
        buyer_id: Mapped[int] = mapped_column(FK("users.id"))
        buyer: Mapped[User] = relationship(foreign_keys=buyer_id)
        seller_id: Mapped[int] = mapped_column(FK("users.id"))
        org_id: Mapped[int] = mapped_column(FK("orgs.id"))
        org: Mapped[Org] = relationship()

    with block:
        order = create_tree(Order)
        assert len(block.tracker) == 3
        assert order.buyer.org is order.org
        assert order.buyer_id == order.seller_id
        again = create_tree(Order, org=order.org)
        assert again.buyer.org is order.org
        assert len(block.tracker) == 5
        factory_for(Order)()
        assert len(block.tracker) == 11
    with pytest.raises(ArgumentError, match="model must be a mapped class"):
        create_tree(object)


# -- classes ---------------------------------------------------------------------------------------


def test_inheritance(base, block):
    class Owner(base):
        __tablename__ = "owners"
        label: Mapped[str] = mapped_column(sa.String(50))
        id: Mapped[int] = mapped_column(primary_key=True)

    class Person(base):
        __tablename__ = "people"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(sa.String(20))
        name: Mapped[str] = mapped_column(sa.String(20))
        __mapper_args__ = {"polymorphic_on": kind}  # noqa: RUF012 -- SQLAlchemy's way

    class Engineer(Person):
        __tablename__ = "engineers"
        id: Mapped[int] = mapped_column(FK("people.id"), primary_key=True)
        language: Mapped[str] = mapped_column(sa.String(20))
        owner_id: Mapped[int] = mapped_column(FK("owners.id"))
        owner: Mapped[Owner] = relationship()
        __mapper_args__ = {"polymorphic_identity": "engineer"}  # noqa: RUF012 -- SQLAlchemy's way

    class Guest(Person):
        badge: Mapped[int | None]

        def __init__(self, invitation):
            raise TypeError("no invitation")

        __mapper_args__ = {"polymorphic_identity": "guest"}  # noqa: RUF012 -- SQLAlchemy's way

    class Visit(base):
        __tablename__ = "visits"
        label: Mapped[str] = mapped_column(sa.String(50))
        id: Mapped[int] = mapped_column(primary_key=True)
        person_id: Mapped[int] = mapped_column(FK("people.id"))
        person: Mapped[Person] = relationship()

    with block:
        engineer = block.again(factory_for(Engineer)())
        assert (engineer.kind, type(engineer)) == ("engineer", Engineer)
        assert engineer.language
        assert engineer.owner_id
        assert factory_for(Guest)().kind == "guest"
        assert type(factory_for(Visit)().person) is Guest
        with pytest.raises(AutoFactoryError, match=r"no polymorphic_identity.*Engineer, Guest"):
            factory_for(Person)()


def test_constructors(engine, block):
    """Dataclasses, a constructor that takes little, and a class without one."""

    class Base(MappedAsDataclass, DeclarativeBase):
        pass

    class Org(Base):
        __tablename__ = "orgs"
        id: Mapped[int] = mapped_column(primary_key=True, init=False)
        name: Mapped[str] = mapped_column(sa.String(20))

    class User(Base):
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True, init=False)
        nick: Mapped[str | None] = mapped_column(sa.String(20))
        token: Mapped[str] = mapped_column(sa.String(20), init=False)
        org_id: Mapped[int] = mapped_column(FK("orgs.id"))
        org: Mapped[Org] = relationship()
        friends: Mapped[list[Friend]] = relationship()
        level: Mapped[int] = mapped_column(default=5)

    class Friend(Base):
        __tablename__ = "friends"
        id: Mapped[int] = mapped_column(primary_key=True, init=False)
        user_id: Mapped[int] = mapped_column(FK("users.id"), init=False)

    Base.registry._class_registry["Friend"] = Friend

    class Secret(Base):
        __tablename__ = "secrets"
        id: Mapped[int] = mapped_column(primary_key=True, init=False)
        name: Mapped[str] = mapped_column(sa.String(20), init=False)
        code: InitVar[str]

        def __post_init__(self, code):
            self.name = code

    mapped = registry(metadata=Base.metadata)
    plain = type("Plain", (), {})
    table = sa.Table(
        "plain", mapped.metadata,
        sa.Column("id", sa.Integer, primary_key=True), sa.Column("n", sa.Integer, nullable=False),
    )  # fmt: skip  # one column a line says no more
    mapped.map_imperatively(plain, table)

    class Little:
        def __init__(self, title):
            self.title = title

    class Greedy:
        def __init__(self, title, password):
            self.title = title

    class Kept:
        def __init__(self, title, size=9):
            self.title = title
            self.size = size

    class Swallowing:
        def __init__(self, **kwargs):
            self.extra = kwargs

    class Choosy:
        def __init__(self, title, size):
            if title != "red":
                raise ValueError("only red")

    for each in (Little, Greedy, Kept, Swallowing, Choosy):
        mapped.map_imperatively(
            each,
            sa.Table(
                each.__name__, mapped.metadata,
                sa.Column("id", sa.Integer, primary_key=True),
                sa.Column("title", sa.String(50), nullable=False),
                sa.Column("size", sa.Integer, nullable=False),
            ),
        )  # fmt: skip  # as above
    Base.metadata.create_all(engine)
    with block:
        user = block.again(factory_for(User)())
        assert (user.nick, user.level) == (None, 5)
        assert user.token
        assert factory_for(User)(token="mine").token == "mine"
        assert factory_for(plain)(n=4).n == 4
        little = block.again(factory_for(Little)())
        assert little.title
        assert little.size
        assert factory_for(Kept)().size == 9
        assert block.again(factory_for(Greedy)()).title
        assert block.again(factory_for(Swallowing)()).size
        with pytest.raises(ValueError, match="only red") as caught:
            factory_for(Choosy)()
        assert "constructor of Choosy was given values guessed" in caught.value.__notes__[0]
        with pytest.raises(AutoFactoryError, match=r"constructor requires it.*code = "):
            factory_for(Secret)()
        assert factory_for(Secret)(code="x").name == "x"
        assert factory_for(Little).build().size


def test_models_of_sqlmodel(engine, block):
    """Its constructor takes any argument, and its defaults are Pydantic's."""
    sqlmodel = pytest.importorskip("sqlmodel")

    class Base(sqlmodel.SQLModel, registry=registry()):
        pass

    class Team(Base, table=True):
        id: int | None = sqlmodel.Field(default=None, primary_key=True)
        name: str = sqlmodel.Field(unique=True, max_length=30)
        city: str = sqlmodel.Field(max_length=30)

    class Hero(Base, table=True):
        id: uuid.UUID = sqlmodel.Field(default_factory=uuid.uuid4, primary_key=True)
        secret: str = sqlmodel.Field(default="x", max_length=10)
        age: int
        nick: str | None = sqlmodel.Field(default=None, max_length=10)
        team_id: int = sqlmodel.Field(foreign_key="team.id")

    Base.metadata.create_all(engine)
    with block:
        one, two = factory_for(Hero).create_batch(2)
        assert (one.secret, one.nick) == ("x", None)
        assert one.age
        assert one.team_id != two.team_id


def test_what_cannot_be_guessed_is_refused_unless_it_is_given(base, block):
    class Odd(sa.types.UserDefinedType[Any]):
        cache_ok = True

        def get_col_spec(self, **kwargs):
            return "VARCHAR(20)"

    sa.Table("elsewhere", base.metadata, sa.Column("id", sa.Integer, primary_key=True))

    class Thing(base):
        __tablename__ = "things"
        id: Mapped[int] = mapped_column(primary_key=True)
        odd: Mapped[str] = mapped_column(Odd())

    class Other(base):
        __tablename__ = "others"
        id: Mapped[int] = mapped_column(primary_key=True)
        elsewhere_id: Mapped[int | None] = mapped_column(FK("elsewhere.id"))
        needed_id: Mapped[int] = mapped_column(FK("elsewhere.id"))

    with block:
        with pytest.raises(AutoFactoryError, match=r"Thing.odd \(things\).*Odd.*odd = factory"):
            factory_for(Thing)()
        assert factory_for(Thing)(odd="x").odd == "x"
        with pytest.raises(AutoFactoryError, match=r"Other.needed_id .* references elsewhere"):
            factory_for(Other)()
        assert block.count(Thing) == 1


def test_one_factory_for_a_model(base):
    class Thing(base):
        __tablename__ = "things"
        id: Mapped[int] = mapped_column(primary_key=True)

    assert factory_for(Thing) is factory_for(Thing)
    assert factory_for(Thing).__name__ == "ThingFactory"
    with pytest.raises(ArgumentError, match="model must be a mapped class"):
        factory_for(Thing.__table__)
