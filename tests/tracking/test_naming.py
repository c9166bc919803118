"""Rows that the user names, questions about them, and what is answered to nonsense."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import uuid
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column, sessionmaker

from harness.bystanders import Bystanders, snapshot
from harness.models import (
    Animal,
    Cat,
    Currency,
    Document,
    Dog,
    Employee,
    Engineer,
    Order,
    OrderLine,
    Org,
    Person,
    PublicIdType,
    Ticket,
    User,
)
from harness.pairs import drivers_in_turn
from tidyrows import (
    CleanupManager,
    KeyShapeError,
    NoPrimaryKeyError,
    NotBoundError,
    ProductionDatabaseError,
    ResourceTracker,
    SessionStateError,
    TidyRowsError,
    UnknownTableError,
    UntrackableRowError,
)
from tidyrows.capture.engine import capture_for
from tidyrows.keys import RowKey


class Base(DeclarativeBase):
    pass


class Parent(Base):
    __tablename__ = "parents"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(sa.String(10))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "parent"}  # noqa: RUF012 -- SQLAlchemy's way


class Child(Parent):
    """Its key has another name than its parent's."""

    __tablename__ = "children"
    parent_id: Mapped[int] = mapped_column(sa.ForeignKey("parents.id"), primary_key=True)
    name: Mapped[str | None] = mapped_column(sa.String(20))
    __mapper_args__ = {"polymorphic_identity": "child"}  # noqa: RUF012 -- SQLAlchemy's way


def tables(tracker: ResourceTracker) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in tracker.rows():
        found[row.table.name] = found.get(row.table.name, 0) + 1
    return found


def committed(engine: sa.Engine, *objects: Any) -> None:
    with Session(engine, expire_on_commit=False) as session:
        session.add_all(objects)
        session.commit()


# --- telling


def test_objects_of_every_kind_are_owned_in_every_table(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    before = snapshot(engine)
    user = User(email="a@example.test", org=Org(name="ours"))
    user.orders = [Order(lines=[OrderLine(line_no=1, sku="kettle")])]
    objects = [Engineer(name="Ada"), Dog(name="D"), Document(title="t"), Ticket(title="t"), user]
    committed(engine, *objects)
    tracker = ResourceTracker(engine)
    tracker.track(*objects, user.org, *user.orders, *user.orders[0].lines)
    assert tables(tracker) == {
        "persons": 1,
        "employees": 1,
        "engineers": 1,
        "animals": 1,
        "documents": 1,
        "tickets": 1,
        "users": 1,
        "orgs": 1,
        "orders": 1,
        "order_lines": 1,
    }
    assert all("is ours" in tracker.explain(each) for each in objects)
    CleanupManager(tracker).cleanup()
    assert snapshot(engine) == before


def test_rows_by_their_keys_in_every_table_of_a_hierarchy(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    bystanders = Bystanders(engine)
    bystanders.insert(Person, {"name": "theirs", "kind": "person"})
    ada = Engineer(name="Ada")
    ticket = Ticket(title="t")
    line = OrderLine(line_no=1, sku="kettle")
    order = Order(lines=[line], user=User(email="a@example.test", org=Org(name="ours")))
    committed(engine, ada, ticket, order)
    tracker = ResourceTracker(engine)
    tracker.track_rows(Engineer, [ada.id])
    tracker.track_rows(Ticket, iter([ticket.id]))
    tracker.track_rows(OrderLine, [(order.id, 1)])
    tracker.track_rows(Order.__table__, {order.id})
    tracker.track_rows(User, [order.user_id])
    tracker.track_rows(Org, [order.user.org_id])
    assert tables(tracker)["persons"] == tables(tracker)["engineers"] == 1
    CleanupManager(tracker).cleanup()
    bystanders.assert_untouched()


def test_a_child_whose_key_has_another_name(any_driver_engine):
    engine = any_driver_engine
    Base.metadata.create_all(engine)
    bystanders = Bystanders(engine)
    bystanders.insert(Parent, {"kind": "parent"})
    for name in ("object", "keys", "query", "query of the parents"):
        child = Child(name="ours")
        committed(engine, child)
        tracker = ResourceTracker(engine)
        if name == "object":
            tracker.track(child)
        elif name == "keys":
            tracker.track_rows(Child, [child.id])
        elif name == "query":
            assert tracker.track_query(sa.select(Child).where(Child.name == "ours")) == 1
        else:
            assert tracker.track_query(sa.select(Parent).where(Parent.kind == "child")) == 1
        assert tables(tracker) == {"parents": 1, "children": 1}
        CleanupManager(tracker).cleanup()
        bystanders.assert_untouched()


def test_a_query_owns_what_it_selects_and_nothing_beside(any_driver_zoo_engine):
    """Not the cats of strangers for our dogs: they live in one table."""
    engine = any_driver_zoo_engine
    bystanders = Bystanders(engine)
    bystanders.insert(
        Animal, {"kind": "cat", "name": "theirs"}, {"kind": "animal", "name": "theirs"}
    )
    bystanders.insert(Org, *({"name": f"theirs {n}"} for n in range(3)))
    committed(engine, Dog(name="b"), Dog(name="a"), Engineer(name="Ada"), Employee(name="Bob"))
    queries: list[tuple[Any, int, dict[str, int]]] = [
        (sa.select(Dog), 2, {"animals": 2}),
        (sa.select(Dog.id, Dog.name).where(Dog.name == "a"), 1, {"animals": 1}),
        (sa.select(Dog).order_by(Dog.name).limit(1), 1, {"animals": 1}),
        (sa.select(Cat).where(Cat.name == "ours"), 0, {}),
        (sa.select(Engineer), 1, {"persons": 1, "employees": 1, "engineers": 1}),
        (sa.select(Person), 2, {"persons": 2, "employees": 2, "engineers": 1}),
        (sa.select(Person.__table__), 2, {"persons": 2}),
        (sa.select(Org).join(User).where(User.email == "nobody"), 0, {}),
    ]
    for query, count, expected in queries:
        tracker = ResourceTracker(engine)
        assert (str(query), tracker.track_query(query)) == (str(query), count)
        assert (str(query), tables(tracker)) == (str(query), expected)
    tracker = ResourceTracker(engine)
    tracker.track_query(sa.select(Dog))
    tracker.track_query(sa.select(Person))
    CleanupManager(tracker).cleanup()
    bystanders.assert_untouched()


def test_a_query_looks_where_the_tracker_is_bound(database):
    """A sub-engine, a connection or a session with a schema of its own; the same keys elsewhere."""
    other = database.extra_schema()
    engine = database.engine()
    there = engine.execution_options(schema_translate_map={None: other})
    for each in (engine, there):
        Currency.__table__.create(each)
        with each.begin() as connection:
            connection.execute(
                sa.insert(Currency), [{"code": c, "name": "theirs"} for c in ("AAA", "BBB")]
            )
    with there.begin() as connection:
        connection.execute(sa.insert(Currency).values(code="XXX", name="ours"))
    with engine.begin() as connection:
        connection.execute(sa.insert(Currency).values(code="XXX", name="theirs"))
    connection = engine.connect().execution_options(schema_translate_map={None: other})
    binds: list[Any] = [there, connection, Session(there), sessionmaker(there)]
    ours = sa.select(Currency).where(Currency.name == "ours")
    for bind in binds:
        tracker = ResourceTracker(bind)
        assert tracker.track_query(ours) == 1
        tracker.track_rows(Currency, ["XXX"])
        assert [(row.table.schema, row.key) for row in tracker.rows()] == [(other, ("XXX",))]
    connection.close()
    before = snapshot(engine)
    CleanupManager(tracker).cleanup()
    lost = before.added_since(snapshot(engine))
    assert list(lost.values()) == [[("XXX", "ours")]]
    assert all(name.startswith(f"{other}.") for name in lost)


def test_what_is_named_and_then_rolled_back_is_nobodys_row(zoo_engine):
    bystanders = Bystanders(zoo_engine)
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker):
        with Session(zoo_engine) as session:
            session.add(Currency(code="XXX", name="ours"))
            session.flush()
            if zoo_engine.dialect.name != "sqlite":  # whose tables cannot be looked up meanwhile
                tracker.track_rows(Currency, ["XXX"])
            session.rollback()
        assert len(tracker) == 0
        bystanders.insert(Currency, {"code": "XXX", "name": "theirs"})
    bystanders.assert_untouched()


# --- asking


def test_mine_is_a_where_clause_for_rows_of_this_test(any_driver_zoo_engine):
    engine = any_driver_zoo_engine
    committed(engine, Org(name="theirs"), Dog(name="theirs"), Engineer(name="theirs"))
    committed(engine, Document(title="theirs"), Ticket(title="theirs"))
    committed(engine, OrderLine(line_no=1, sku="theirs", order=_order("theirs@example.test")))
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker), Session(engine) as session:
        session.add_all([Org(name="ours"), Dog(name="ours"), Engineer(name="ours")])
        session.add_all([Document(title="ours"), Ticket(title="ours")])
        session.commit()
        session.add(OrderLine(line_no=1, sku="ours", order=_order("ours@example.test")))
        session.flush()  # uncommitted ones count
        for model, attribute in (
            (Org, Org.name),
            (Dog, Dog.name),
            (Engineer, Engineer.name),
            (Document, Document.title),
            (Ticket, Ticket.title),
            (OrderLine, OrderLine.sku),
        ):
            found = session.scalars(sa.select(attribute).where(tracker.mine(model))).all()
            assert found == ["ours"] if model is not Org else set(found) == {"ours", "order"}
        assert session.scalars(sa.select(Cat).where(tracker.mine(Cat))).all() == []
        assert session.scalars(sa.select(Currency).where(tracker.mine(Currency))).all() == []
    _empty(engine)


def _order(email: str) -> Order:
    return Order(user=User(email=email, org=Org(name="order")))


def _empty(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        for table in reversed(Org.metadata.sorted_tables):
            if table.name in {"order_lines", "orders", "users", "orgs"}:
                connection.execute(sa.delete(table))


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
def test_explain_tells_what_is_known(zoo_engine):
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker):
        org, told = Org(name="ours"), Org(name="told")
        committed(zoo_engine, org)
        (row,) = tracker.rows()
        assert "its INSERT was committed" in tracker.explain(org)
        assert tracker.explain(row) == tracker.explain(org)
        tracker.track_rows(Org, [org.id + 1000])
        named = RowKey(row.table, (org.id + 1000,))
        assert "was told of it" in tracker.explain(named)
        assert "is not ours" in tracker.explain(RowKey(row.table, (-1,)))
        with Session(zoo_engine) as session:
            session.add(told)
            session.flush()
            assert "not committed" in tracker.explain(RowKey(row.table, (told.id,)))
        with pytest.raises(UntrackableRowError, match="no row yet"):
            tracker.explain(Org(name="transient"))
        with pytest.raises(UntrackableRowError, match="no mapped object"):
            tracker.explain("orgs")


VALUES: dict[str, tuple[Any, list[Any]]] = {
    "integer": (sa.Integer, [1, 2, 3]),
    "text": (sa.String(20), ["Straße", "it's 100%", 'a "b"']),
    "uuid": (sa.Uuid, [uuid.uuid4(), uuid.uuid4()]),
    "date": (sa.Date, [dt.date(2020, 1, 1), dt.date(2021, 1, 1)]),
    "datetime": (sa.DateTime, [dt.datetime(2020, 1, 1, 12), dt.datetime(2021, 1, 1)]),
    "numeric": (sa.Numeric(8, 2), [decimal.Decimal("1.50"), decimal.Decimal(2)]),
    "enum": (sa.Enum("red", "green", name="colour"), ["red", "green"]),
    "boolean": (sa.Boolean, [True, False]),
    "bytes": (sa.LargeBinary, [b"a", b"\xff\0"]),
    "decorated": (PublicIdType, ["pub_1", "pub_2"]),
}


@drivers_in_turn("any_driver_engine", kind=tuple(VALUES))
def test_rows_travel_as_json(any_driver_engine, kind):
    """Another process, which may not know the models, cleans exactly the same rows."""
    engine = any_driver_engine
    type_, values = VALUES[kind]
    if kind == "bytes" and engine.dialect.name == "mysql":
        type_ = sa.VARBINARY(20)
    metadata = sa.MetaData()
    single = sa.Table(
        "singles", metadata, sa.Column("a", type_, primary_key=True, autoincrement=False)
    )
    double = sa.Table(
        "doubles",
        metadata,
        sa.Column("a", type_),
        sa.Column("n", sa.Integer),
        # not in the order of the columns: the JSON must say which value is whose
        sa.PrimaryKeyConstraint("n", "a"),
    )
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(single), [{"a": values[0]}])
        connection.execute(sa.insert(double), [{"a": value, "n": 7} for value in values])
    before = snapshot(engine)
    tracker = ResourceTracker(engine).start()
    with engine.begin() as connection:
        connection.execute(sa.insert(single), [{"a": value} for value in values[1:]])
        connection.execute(sa.insert(double), [{"a": value, "n": 8} for value in values])
    tracker.stop()
    text = tracker.to_json()
    assert json.loads(text)["run"] == tracker.context.run_id
    twin = ResourceTracker.from_json(text, engine)
    assert len(twin) == len(tracker)
    assert twin.context == tracker.context
    again = ResourceTracker.from_json(twin.to_json(), engine)
    with engine.connect() as connection:
        found = connection.execute(sa.select(single).where(again.mine(single))).all()
        assert sorted(found, key=repr) == sorted(((v,) for v in values[1:]), key=repr)
    CleanupManager(again).cleanup()
    assert snapshot(engine) == before


# --- nonsense: each a TidyRowsError that names the object and the next step, and nothing is lost


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"tidyrows": 2}',
        '{"tidyrows": 2, CONTEXT}',
        '{"tidyrows": 2, CONTEXT, "entries": [{}]}',
        '{"tidyrows": 2, CONTEXT, "entries": [["rows", "main", "sqlite_schema", {}]]}',
        '{"tidyrows": 2, CONTEXT, "entries": [["odd", "main", "sqlite_schema", {"rows": []}]]}',
    ],
)
def test_no_json_of_ours(sqlite_engine, text):
    context = '"run": "r", "worker": "w", "worker_index": 0, "test": null, "workers": 1'
    text = text.replace("CONTEXT", context)
    with pytest.raises(TidyRowsError, match=r"not what ResourceTracker\.to_json"):
        ResourceTracker.from_json(text, sqlite_engine)
    for version in (1, 99):
        with pytest.raises(TidyRowsError, match=f"format {version}, and this tidyrows reads"):
            ResourceTracker.from_json(f'{{"tidyrows": {version}}}', sqlite_engine)


BINDS: dict[str, Any] = {
    "nothing": lambda: None,
    "a URL": lambda: "sqlite://",
    "a model": lambda: Org,
    "a session without an engine": Session,
    "a sessionmaker without an engine": sessionmaker,
    "an async engine": lambda: AsyncEngine.__new__(AsyncEngine),
}


@pytest.mark.parametrize("kind", BINDS)
def test_a_bind_that_leads_to_no_database(kind):
    with pytest.raises(NotBoundError, match=r"ResourceTracker\(engine\)|Session\(engine\)|Engine"):
        ResourceTracker(BINDS[kind]())


def test_sessions_that_find_their_engines_themselves_are_welcome(sqlite_engine):
    class Routing(Session):
        def get_bind(self, *_arguments: Any, **_options: Any) -> sa.Engine:
            return sqlite_engine

    later = sessionmaker(sqlite_engine)
    for bind in (Session(binds={Org: sqlite_engine}), Routing(), sessionmaker(class_=Routing)):
        ResourceTracker(bind)
    ResourceTracker(later)


def test_what_is_closed(sqlite_engine):
    connection = sqlite_engine.connect()
    tracker = ResourceTracker(connection)
    connection.close()
    with pytest.raises(SessionStateError, match=r"closed.*ResourceTracker\(engine\)"):
        tracker.start()
    with pytest.raises(SessionStateError, match="closed"):
        ResourceTracker(connection)
    session = Session(sqlite_engine, close_resets_only=False)
    tracker = ResourceTracker(session)
    session.close()
    with pytest.raises(SessionStateError, match="close_resets_only"):
        tracker.start()
    assert not tracker.active
    reusable = Session(sqlite_engine)
    reusable.close()
    ResourceTracker(reusable).start().stop()


KEYS: list[tuple[Any, Any, str]] = [
    (Org, ["1"], "no value of"),
    (Org, [True], "no value of"),
    (Org, [1.5], "no value of"),
    (Org, [None], "NULL"),
    (Org, [(1, 2)], "2 value"),
    (Org, [()], "0 value"),
    (Org, [[1], {}], "no value of"),
    (Org, 5, "one value"),
    (Org, None, "one value"),
    (Currency, "USD", "one value"),
    (Currency, [5], "no value of"),
    (Currency, [b"USD"], "no value of"),
    (Document, ["no uuid"], "no value of"),
    (Ticket, [17], "no value of"),
    (Ticket, ["17"], "no value of"),
    (OrderLine, [1], "1 value"),
    (OrderLine, [(1, None)], "NULL"),
    (OrderLine, [(1, "a")], "no value of"),
    (Engineer, ["Ada"], "no value of"),
]


@pytest.mark.parametrize(("model", "keys", "message"), KEYS)
def test_keys_of_the_wrong_shape(zoo_engine, model, keys, message):
    tracker = ResourceTracker(zoo_engine)
    tracker.track_rows(Org, [1])
    with pytest.raises(KeyShapeError, match=message) as caught:
        tracker.track_rows(model, keys)
    assert caught.value.table.endswith(
        {"engineers": "persons"}.get(model.__tablename__, model.__tablename__)
    )
    assert len(tracker) == 1
    assert CleanupManager(tracker).cleanup().total_deleted == 0


def test_objects_that_have_no_row(zoo_engine):
    tracker = ResourceTracker(zoo_engine)
    saved = Org(name="ours")
    committed(zoo_engine, saved)
    for nonsense in (Org(name="transient"), "orgs", Org, None):
        with pytest.raises(UntrackableRowError, match=r"no row yet|no mapped object"):
            tracker.track(saved, nonsense)
        assert len(tracker) == 0
    tracker.track(saved)
    CleanupManager(tracker).cleanup()


def test_tables_that_are_not_there(zoo_engine):
    class Elsewhere(DeclarativeBase):
        pass

    class Nowhere(Elsewhere):
        __tablename__ = "nowhere"
        id: Mapped[int] = mapped_column(primary_key=True)

    tracker = ResourceTracker(zoo_engine)
    for name in (Nowhere, Nowhere.__table__):
        with pytest.raises(UnknownTableError, match="has no table nowhere"):
            tracker.track_rows(name, [1])
    other_schema = sa.Table(
        "orgs", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), schema="not_there"
    )
    with pytest.raises(UnknownTableError, match="not_there"):
        tracker.track_rows(other_schema, [1])
    for nonsense in ("orgs", 5, object, aliased(Org)):
        with pytest.raises(UnknownTableError, match="neither a mapped class nor a Table"):
            tracker.track_rows(nonsense, [1])
        with pytest.raises(UnknownTableError):
            tracker.mine(nonsense)
    for query in (
        "SELECT 1",
        sa.text("SELECT 1"),
        sa.select(Org, User),
        sa.select(sa.literal(1)),
        sa.select(aliased(Org)),
    ):
        with pytest.raises(UnknownTableError, match=r"select\(User\)"):
            tracker.track_query(query)
    assert len(tracker) == 0


def test_tables_without_a_primary_key_are_refused_by_name_and_deleted_by_row(any_driver_engine):
    """Nobody can name such a row; what was inserted goes all the same."""
    engine = any_driver_engine
    metadata = sa.MetaData()
    heap = sa.Table("heap", metadata, sa.Column("name", sa.String(20)))
    keyed = sa.Table("keyed", metadata, sa.Column("id", sa.Integer, primary_key=True))
    metadata.create_all(engine)
    tracker = ResourceTracker(engine)
    with pytest.raises(NoPrimaryKeyError, match="heap"):
        tracker.track_rows(heap, [1])
    with pytest.raises(NoPrimaryKeyError, match="heap"):
        tracker.track_query(sa.select(heap))
    rows = [{"name": str(n)} for n in range(3)]
    with CleanupManager(tracker) as cleanup, engine.begin() as connection:
        connection.execute(sa.insert(heap).values(name="one"))
        connection.execute(sa.insert(heap), rows)
        connection.execute(sa.insert(heap).values(rows))
        connection.execute(sa.insert(keyed).values(id=1))
    assert cleanup.report.total_deleted == 8
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(heap)) == 0


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://u:secret@prod-db.example/app",
        "postgresql+psycopg://u:secret@db.example/app_production",
        "postgresql+psycopg://u:secret@/app?host=db.live.example",
        "postgresql+psycopg://u:secret@/?host=a&host=prod.example&dbname=app",
        "postgresql+psycopg://u:secret@/?service=prd",
        "mysql+pymysql://u:secret@live.example/app",
        "sqlite:////srv/production.db",
    ],
)
def test_what_looks_like_production_is_refused(url):
    engine = sa.create_engine(url)
    for bind in (engine, sessionmaker(engine), Session(engine)):
        with pytest.raises(ProductionDatabaseError, match="allow_production=True") as caught:
            ResourceTracker(bind)
        assert "secret" not in str(caught.value)
        assert caught.value.matched in {"prod", "prd", "production", "live"}
        ResourceTracker(bind, allow_production=True)


@pytest.mark.parametrize("database", ["reproduction", "alive", "deliver", "product", "probe"])
def test_words_that_only_resemble_production(database):
    ResourceTracker(sa.create_engine(f"sqlite:////srv/production/{database}.db"))


def test_a_session_that_turns_out_to_write_to_production_is_refused_at_its_first_use(tmp_path):
    """Its engine is known only when it begins; nothing is written by then."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'prod.db'}")
    Org.__table__.create(engine)
    maker = sessionmaker(binds={Org: engine})
    with CleanupManager(ResourceTracker(maker)), maker() as session:
        session.add(Org(name="never"))
        with pytest.raises(ProductionDatabaseError):
            session.commit()
        session.rollback()
        assert not snapshot(engine)["main.orgs"]
    engine.dispose()


def test_a_block_asks_once_which_table_a_name_means(zoo_engine, monkeypatch):
    """Not with each call; again after DDL, and where a listener may move the names."""
    dialect = capture_for(zoo_engine).dialect
    asked = []
    resolve = type(dialect).resolve

    def note(self, connection, schema, name):
        asked.append(name)
        return resolve(self, connection, schema, name)

    monkeypatch.setattr(type(dialect), "resolve", note)
    tracker = ResourceTracker(zoo_engine)
    for _block in range(2):
        asked.clear()
        with CleanupManager(tracker):
            for key in range(1000, 1005):
                tracker.track_rows(Org, [key])
                tracker.track_rows(User, [key])
            assert sorted(asked) == ["orgs", "users"]
    with CleanupManager(tracker):
        tracker.track_rows(Org, [1000])
        with zoo_engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE of_a_migration (id INTEGER PRIMARY KEY)")
        asked.clear()
        tracker.track_rows(Org, [1000])
        assert asked == ["orgs"]
        with zoo_engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE of_a_migration")
        sa.event.listen(zoo_engine, "checkout", lambda *_: None)
        asked.clear()
        for _call in range(3):
            tracker.track_rows(Org, [1000])
        assert len(asked) == 3


def test_a_name_that_means_another_table_now_is_asked_anew(postgresql_engine):
    """In a transaction of the session the database is asked each time: its path may have moved."""
    metadata = sa.MetaData()
    things = sa.Table("things", metadata, sa.Column("id", sa.Integer, primary_key=True))
    with postgresql_engine.begin() as connection:
        for schema in ("one", "two"):
            connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
            connection.exec_driver_sql(f"CREATE TABLE {schema}.things (id INTEGER PRIMARY KEY)")
    with Session(postgresql_engine) as session:
        tracker = ResourceTracker(session)
        for schema in ("one", "two", "one"):
            cursor = session.connection().connection.cursor()
            cursor.execute(f"SET search_path = {schema}")
            tracker.track_rows(things, [len(tracker) + 1])
        assert sorted(str(row.table) for row in tracker.rows()) == [
            "one.things",
            "one.things",
            "two.things",
        ]
        session.rollback()


@pytest.mark.parametrize("joined", [False, True])
def test_a_key_of_another_class_in_the_table_is_refused(zoo_engine, joined):
    """A row of another kind is somebody else's, and a subclass has no rows but its own."""

    class Base(DeclarativeBase):
        pass

    class Staff(Base):
        __tablename__ = "staff"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(sa.String(20))
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "staff"}  # noqa: RUF012 -- SQLAlchemy's way

    class Cook(Staff):
        if joined:
            __tablename__ = "cooks"
            id: Mapped[int] = mapped_column(sa.ForeignKey("staff.id"), primary_key=True)
        __mapper_args__ = {"polymorphic_identity": "cook"}  # noqa: RUF012 -- SQLAlchemy's way

    class Baker(Cook):
        __mapper_args__ = {"polymorphic_identity": "baker"}  # noqa: RUF012 -- SQLAlchemy's way

    Base.metadata.create_all(zoo_engine)
    with Session(zoo_engine) as session:
        session.add_all([Staff(id=1), Cook(id=2), Baker(id=3), Staff(id=4)])
        session.commit()
    tracker = ResourceTracker(zoo_engine)
    with pytest.raises(KeyShapeError, match=r"is of Staff.*track_rows\(Staff, \[4\]\)"):
        tracker.track_rows(Cook, [2, 4])
    assert len(tracker) == 0
    tracker.track_rows(Cook, [2, 3, 99])  # one that is not there yet may be a Cook
    tracker.track_rows(Staff, [4])
    CleanupManager(tracker).cleanup()
    with zoo_engine.connect() as connection:
        assert connection.execute(sa.select(Staff.id)).scalars().all() == [1]
