"""Everything inserted is captured, in every form SQLAlchemy has; nothing else is."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import Session

from harness.bystanders import Bystanders, snapshot
from harness.models import (
    Base,
    Cat,
    Currency,
    Document,
    Dog,
    Engineer,
    Group,
    Order,
    OrderLine,
    Org,
    Ticket,
    User,
    user_groups,
)
from harness.pairs import pairwise
from harness.targets import ALL_DRIVERS
from tidyrows import CleanupManager, ResourceTracker, UntrackedRowsWarning


@pytest.fixture
def bystanders(any_driver_zoo_engine: sa.Engine) -> Bystanders:
    strangers = Bystanders(any_driver_zoo_engine)
    strangers.insert(Org, {"name": "theirs"}, {"name": "theirs too"})
    strangers.insert(Group, {"name": "theirs"})
    strangers.insert(Currency, {"code": "USD", "name": "theirs"})
    return strangers


def counts(tracker: ResourceTracker) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in tracker.rows():
        found[row.table.name] = found.get(row.table.name, 0) + 1
    return found


def in_session(engine: sa.Engine, work: Any, bystanders: Bystanders) -> dict[str, int]:
    """Do something in a block of its own; what was tracked, after everything is as before."""
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker):
        with Session(engine) as session:
            work(session)
            session.commit()
        found = counts(tracker)
    bystanders.assert_untouched()
    return found


def test_objects_with_their_cascades_and_association_rows(any_driver_zoo_engine, bystanders):
    def work(session: Session) -> None:
        boss = User(email="boss@example.test", org=Org(name="ours"))
        user = User(email="user@example.test", org=boss.org, manager=boss)
        user.groups = [Group(name="a"), Group(name="b")]
        user.orders = [Order(lines=[OrderLine(line_no=n, sku="kettle") for n in (1, 2, 3)])]
        session.add(user)

    assert in_session(any_driver_zoo_engine, work, bystanders) == {
        "orgs": 1,
        "users": 2,
        "groups": 2,
        "user_groups": 2,
        "orders": 1,
        "order_lines": 3,
    }


def test_joined_inheritance_in_every_table_and_single_table_once(any_driver_zoo_engine, bystanders):
    def work(session: Session) -> None:
        session.add_all(
            [Engineer(name="Ada"), Engineer(name="Grace"), Dog(name="D"), Cat(name="C")]
        )

    assert in_session(any_driver_zoo_engine, work, bystanders) == {
        "persons": 2,
        "employees": 2,
        "engineers": 2,
        "animals": 2,
    }


def test_uuid_text_and_decorated_keys(any_driver_zoo_engine, bystanders):
    def work(session: Session) -> None:
        session.add_all([Document(title=str(n)) for n in range(3)])
        session.add_all([Ticket(title=str(n)) for n in range(3)])
        session.add_all([Currency(code=code, name="ours") for code in ("XXX", "XTS")])

    assert in_session(any_driver_zoo_engine, work, bystanders) == {
        "documents": 3,
        "tickets": 3,
        "currencies": 2,
    }


NAMES = [{"name": f"core {n}"} for n in range(3)]

CORE_FORMS: dict[str, Any] = {
    "one": lambda s: s.connection().execute(sa.insert(Org.__table__).values(name="one")),
    "one with parameters": lambda s: s.connection().execute(sa.insert(Org), NAMES[0]),
    "one with returning": lambda s: _check(
        s.connection().execute(sa.insert(Org).values(name="one").returning(Org.name)), ["one"]
    ),
    "one with a given key": lambda s: s.connection().execute(
        sa.insert(Org).values(id=-1, name="one")
    ),
    "a given key and returning of something else": lambda s: _check(
        s.connection().execute(sa.insert(Org).values(id=-2, name="one").returning(Org.name)),
        ["one"],
    ),
    "many": lambda s: s.connection().execute(sa.insert(Org.__table__), NAMES),
    "many with given keys": lambda s: s.connection().execute(
        sa.insert(Org), [{"id": -10 + n, "name": "many"} for n in range(3)]
    ),
    "many with returning of the key": lambda s: (
        len(s.connection().execute(sa.insert(Org).returning(Org.id), NAMES).all()) == 3
        or pytest.fail("rows")
    ),
    "many with returning of something else": lambda s: _check(
        s.connection().execute(sa.insert(Org).returning(Org.name), NAMES),
        [row["name"] for row in NAMES],
    ),
    "multi values": lambda s: s.connection().execute(sa.insert(Org).values(NAMES)),
    "multi values with returning": lambda s: _check(
        s.connection().execute(sa.insert(Org).values(NAMES).returning(Org.name)),
        [row["name"] for row in NAMES],
    ),
    "from select": lambda s: s.connection().execute(
        sa.insert(Org).from_select(
            ["name"], sa.select(sa.literal("from select")).select_from(Group).limit(1)
        )
    ),
    "orm bulk insert": lambda s: s.execute(sa.insert(Org), NAMES),
    "orm bulk insert returning the entity": lambda s: (
        len(s.scalars(sa.insert(Org).returning(Org), NAMES).all()) == 3 or pytest.fail("rows")
    ),
    "orm bulk insert returning a column": lambda s: _check(
        s.execute(sa.insert(Org).returning(Org.name), NAMES), [row["name"] for row in NAMES]
    ),
    "orm insert values": lambda s: s.execute(sa.insert(Org).values(name="orm")),
    "bulk_save_objects": lambda s: s.bulk_save_objects([Org(**row) for row in NAMES]),
    "bulk_save_objects with keys": lambda s: s.bulk_save_objects(
        [Org(**row) for row in NAMES], return_defaults=True
    ),
    "bulk_insert_mappings": lambda s: s.bulk_insert_mappings(sa.inspect(Org), NAMES),
    "return_defaults": lambda s: s.connection().execute(
        sa.insert(Org).return_defaults(Org.id), NAMES
    ),
}
ROWS = {name: 3 for name in CORE_FORMS if "one" not in name.split()} | {
    "from select": 1,
    "orm insert values": 1,
    "a given key and returning of something else": 1,
}


def _check(result: Any, expected: list[str]) -> None:
    """The caller gets what it asked for, and nothing that was added behind its back."""
    assert list(result.keys()) == ["name"]
    assert sorted(tuple(row) for row in result) == sorted((name,) for name in expected)


@pytest.mark.parametrize("form", CORE_FORMS)
def test_core_inserts_in_every_form(any_driver_zoo_engine, bystanders, form):
    assert in_session(any_driver_zoo_engine, CORE_FORMS[form], bystanders) == {
        "orgs": ROWS.get(form, 1)
    }


@pytest.mark.parametrize("form", ["many", "multi values", "from select"])
def test_the_first_statement_of_a_connection_is_tracked_too(zoo_engine, form):
    """It begins the transaction between the event before it and the one after it."""
    bystanders = Bystanders(zoo_engine)
    bystanders.insert(Group, {"name": "theirs"})
    with CleanupManager(ResourceTracker(zoo_engine)) as cleanup, zoo_engine.connect() as connection:
        if form == "many":
            connection.execute(sa.insert(Org), NAMES)
        elif form == "multi values":
            connection.execute(sa.insert(Org).values(NAMES))
        else:
            connection.execute(sa.insert(Org).from_select(["name"], sa.select(Group.name)))
        connection.commit()
    assert cleanup.report.total_deleted == (1 if form == "from select" else len(NAMES))
    bystanders.assert_untouched()


def test_a_rewritten_statement_gives_its_caller_the_rowcount_and_no_rows(
    any_driver_zoo_engine, bystanders
):
    def work(session: Session) -> None:
        result = session.connection().execute(sa.insert(Org), NAMES)
        assert not result.returns_rows
        assert result.rowcount == len(NAMES)
        result = session.connection().execute(sa.insert(Org).values(NAMES))
        assert not result.returns_rows
        assert result.rowcount == len(NAMES)

    assert in_session(any_driver_zoo_engine, work, bystanders) == {"orgs": 6}


def test_keys_that_are_given_in_the_parameters_of_many_rows(any_driver_zoo_engine, bystanders):
    def work(session: Session) -> None:
        connection = session.connection()
        connection.execute(
            sa.insert(Document), [{"id": uuid.uuid4(), "title": "given"} for _ in range(3)]
        )
        connection.execute(sa.insert(Document), [{"title": "by default"} for _ in range(3)])
        connection.execute(
            sa.insert(Currency), [{"code": code, "name": "ours"} for code in ("XXX", "XTS")]
        )

    assert in_session(any_driver_zoo_engine, work, bystanders) == {
        "documents": 6,
        "currencies": 2,
    }


def test_association_rows_by_core(any_driver_zoo_engine, bystanders):
    def work(session: Session) -> None:
        user = User(email="a@example.test", org=Org(name="ours"))
        group = Group(name="ours")
        session.add_all([user, group])
        session.flush()
        session.execute(sa.insert(user_groups), [{"user_id": user.id, "group_id": group.id}])

    assert in_session(any_driver_zoo_engine, work, bystanders)["user_groups"] == 1


def test_rows_deleted_through_the_session_are_forgotten_when_that_commits(zoo_engine):
    bystanders = Bystanders(zoo_engine)
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker) as cleanup:
        with Session(zoo_engine) as session:
            currency = Currency(code="XTS", name="ours")
            session.add(currency)
            session.commit()
            session.delete(currency)
            session.flush()
            assert len(tracker) == 1
            session.rollback()
            session.delete(session.get_one(Currency, "XTS"))
            session.commit()
            assert len(tracker) == 0
        bystanders.insert(Currency, {"code": "XTS", "name": "theirs"})
    assert cleanup.report.total_deleted == 0
    bystanders.assert_untouched()


def test_a_row_made_and_deleted_in_one_transaction_leaves_nothing(zoo_engine):
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker), Session(zoo_engine) as session:
        currency = Currency(code="XTS", name="ours")
        session.add(currency)
        session.flush()
        session.delete(currency)
        session.commit()
        assert len(tracker) == 0
        session.execute(sa.delete(Currency).where(Currency.code == "nobody"))
        session.rollback()


def test_a_key_changed_through_the_session_is_followed(zoo_engine):
    bystanders = Bystanders(zoo_engine)
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker):
        with Session(zoo_engine) as session:
            currency = Currency(code="XXX", name="ours")
            session.add(currency)
            session.commit()
            currency.code = "XTS"
            session.commit()
        bystanders.insert(Currency, {"code": "XXX", "name": "theirs"})
        assert [row.key for row in tracker.rows()] == [("XTS",)]
    bystanders.assert_untouched()


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO orgs (name) VALUES ('raw')",
        "/* c */ insert into orgs (name) select 'raw'",
    ],
)
def test_raw_inserts_are_noticed_and_said(zoo_engine, sql):
    with (
        pytest.warns(UntrackedRowsWarning, match="orgs"),
        CleanupManager(ResourceTracker(zoo_engine)),
    ):
        with zoo_engine.begin() as connection:
            connection.execute(sa.text(sql))
    with (
        pytest.warns(UntrackedRowsWarning, match="orgs"),
        CleanupManager(ResourceTracker(zoo_engine)),
    ):
        with zoo_engine.begin() as connection:
            connection.exec_driver_sql(sql)
    with zoo_engine.begin() as connection:
        connection.execute(sa.delete(Org))


def test_an_insert_in_a_cte_is_noticed_and_said(zoo_database):
    if zoo_database.backend != "postgresql":
        pytest.skip("only PostgreSQL has data-modifying CTEs")
    engine = zoo_database.engine()
    with pytest.warns(UntrackedRowsWarning, match="orgs"), CleanupManager(ResourceTracker(engine)):
        with engine.begin() as connection:
            made = sa.insert(Org).values(name="cte").returning(Org.id).cte("made")
            connection.execute(sa.select(made.c.id)).all()


# --- upserts: the reported key may be a stranger's


UPSERTS = {
    "sqlite": ("update", "nothing", "ignore", "replace"),
    "postgresql": ("update", "nothing"),
    "mysql": ("update", "ignore"),
}


def _upsert(engine: sa.Engine, kind: str, rows: list[dict[str, Any]]) -> sa.Insert:
    name = engine.dialect.name
    if name == "sqlite" and kind in {"ignore", "replace"}:
        return sa.insert(Currency).prefix_with(f"OR {kind.upper()}").values(rows)
    if name in {"mysql", "mariadb"}:
        if kind == "update":
            insert = mysql.insert(Currency).values(rows)
            return insert.on_duplicate_key_update(name=insert.inserted.name)
        return sa.insert(Currency).prefix_with("IGNORE").values(rows)
    module: Any = {"postgresql": postgresql, "sqlite": sqlite}[name]
    insert = module.insert(Currency).values(rows)
    if kind == "update":
        return insert.on_conflict_do_update(
            index_elements=["code"], set_={"name": Currency.__table__.c.name}
        )
    return insert.on_conflict_do_nothing()


@pytest.mark.filterwarnings("ignore::tidyrows.UntrackedRowsWarning")
@pairwise(
    any_driver_zoo_engine=ALL_DRIVERS,
    kind=["update", "nothing", "ignore", "replace"],
    codes=["USD", "XTS", "USD XTS"],
    allowed=lambda target, kind, _codes: kind in UPSERTS[target.partition("+")[0]],
)
def test_upserts_never_register_a_strangers_row(any_driver_zoo_engine, kind, codes):
    engine = any_driver_zoo_engine
    bystanders = Bystanders(engine)
    bystanders.insert(Currency, {"code": "USD", "name": "theirs"})
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker):
        insert = _upsert(engine, kind, [{"code": c, "name": "theirs"} for c in codes.split()])
        with engine.begin() as connection:
            connection.execute(insert)
        assert ("USD",) not in [row.key for row in tracker.rows()]
    with engine.begin() as connection:
        connection.execute(sa.delete(Currency).where(Currency.code == "XTS"))
    bystanders.assert_untouched()


def test_what_an_upsert_provably_inserted_is_ours(zoo_database):
    engine = zoo_database.engine()
    kinds = {"postgresql": ["update", "nothing"], "sqlite": ["nothing", "ignore"]}
    for kind in kinds.get(zoo_database.backend, []):
        before = snapshot(engine)
        tracker = ResourceTracker(engine)
        with CleanupManager(tracker), engine.begin() as connection:
            result = connection.execute(
                _upsert(engine, kind, [{"code": c, "name": "ours"} for c in ("XXX", "XTS")])
            )
            assert not result.returns_rows
            assert result.rowcount == 2
        assert snapshot(engine) == before


def test_an_upsert_that_cannot_prove_anything_says_so(zoo_database):
    engine = zoo_database.engine()
    kind = {"postgresql": None, "sqlite": "update", "mysql": "update"}[zoo_database.backend]
    if kind is None:
        pytest.skip("PostgreSQL proves its upserts")
    with (
        pytest.warns(UntrackedRowsWarning, match="upsert"),
        CleanupManager(ResourceTracker(engine)),
    ):
        with engine.begin() as connection:
            connection.execute(_upsert(engine, kind, [{"code": "XTS", "name": "ours"}]))


# --- the real table


def test_schema_translate_map_and_the_same_table_in_two_schemas(database):
    other = database.extra_schema()
    engine = database.engine()
    metadata = sa.MetaData()
    table = sa.Table("things", metadata, sa.Column("id", sa.Integer, primary_key=True))
    metadata.create_all(engine)
    there = engine.execution_options(schema_translate_map={None: other})
    metadata.create_all(there)
    bystanders = Bystanders(engine, outside=there)
    with engine.begin() as stranger:
        stranger.execute(sa.insert(table), [{"id": 1}, {"id": 2}])
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup, there.begin() as connection:
        connection.execute(sa.insert(table).values(id=1))
        connection.execute(sa.insert(table), [{"id": 2}, {"id": 3}])
        connection.commit()
        assert {row.table.schema for row in tracker.rows()} == {other}
        assert len(tracker) == 3
    assert cleanup.report.total_deleted == 3
    bystanders.assert_untouched()


def test_a_search_path_that_is_set_in_the_transaction_is_where_the_rows_are(database):
    if database.backend != "postgresql":
        pytest.skip("only PostgreSQL has a search_path")
    other = database.extra_schema()
    engine = database.engine()
    metadata = sa.MetaData()
    table = sa.Table("things", metadata, sa.Column("id", sa.Integer, primary_key=True))
    metadata.create_all(engine)
    metadata.create_all(engine.execution_options(schema_translate_map={None: other}))
    with engine.begin() as connection:
        connection.execute(sa.insert(table), [{"id": n} for n in range(10)])
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup, engine.connect() as connection:
        connection.execute(sa.text(f'SET LOCAL search_path TO "{other}"'))
        connection.execute(sa.insert(table).values(id=1))
        connection.execute(sa.text("SET LOCAL search_path TO public"))
        connection.execute(sa.insert(table).values(id=100))
        connection.commit()
        connection.execute(sa.insert(table).values(id=101))  # SET LOCAL is over
        connection.commit()
        schemas = sorted((row.table.schema, row.key) for row in tracker.rows())
        assert schemas == [(other, (1,)), ("public", (100,)), ("public", (101,))]
    assert cleanup.report.total_deleted == 3
    bystanders.assert_untouched()


def test_use_changes_the_database_that_names_mean(database):
    if database.backend != "mysql":
        pytest.skip("only the MySQL family has USE")
    other = database.extra_schema()
    engine = database.engine()
    metadata = sa.MetaData()
    table = sa.Table("things", metadata, sa.Column("id", sa.Integer, primary_key=True))
    metadata.create_all(engine)
    metadata.create_all(engine.execution_options(schema_translate_map={None: other}))
    with engine.begin() as connection:
        connection.execute(sa.insert(table), [{"id": n} for n in range(1, 10)])
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker), engine.connect() as connection:
        home = connection.scalar(sa.text("SELECT DATABASE()"))
        connection.execute(sa.text(f"USE `{other}`"))
        connection.execute(sa.insert(table).values(id=1))
        connection.commit()
        connection.execute(sa.text(f"USE `{home}`"))
        assert [row.table.schema for row in tracker.rows()] == [other]
        connection.rollback()
    bystanders.assert_untouched()


def test_rows_of_temporary_tables_are_nobodys_business(zoo_engine):
    table = sa.Table(
        "passing",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        prefixes=["TEMPORARY"],
    )
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker), zoo_engine.connect() as connection:
        table.create(connection)
        connection.execute(sa.insert(table).values(id=1))
        connection.commit()
        assert len(tracker) == 0
        table.drop(connection)
        connection.commit()


def test_a_null_in_a_key_is_never_a_target(sqlite_engine):
    """SQLite allows NULL in a primary key that is no INTEGER PRIMARY KEY."""
    table = sa.Table(
        "loose",
        sa.MetaData(),
        sa.Column("a", sa.String, primary_key=True, nullable=True),
        sa.Column("b", sa.String, primary_key=True, nullable=True),
    )
    table.create(sqlite_engine)
    with (
        pytest.warns(UntrackedRowsWarning, match="NULL"),
        CleanupManager(ResourceTracker(sqlite_engine)) as cleanup,
    ):
        with sqlite_engine.begin() as connection:
            connection.execute(sa.insert(table), [{"a": None, "b": "x"}, {"a": "y", "b": "x"}])
    assert cleanup.report.total_deleted == 1


def test_ddl_that_commits_on_its_own_makes_rows_ours(mysql_engine):
    metadata = sa.MetaData()
    table = sa.Table("things", metadata, sa.Column("id", sa.Integer, primary_key=True))
    metadata.create_all(mysql_engine)
    tracker = ResourceTracker(mysql_engine)
    with CleanupManager(tracker), mysql_engine.connect() as connection:
        connection.execute(sa.insert(table).values(id=5))
        connection.execute(sa.text("CREATE TABLE another (id INT PRIMARY KEY)"))
        connection.rollback()  # too late: CREATE has committed
        assert len(tracker) == 1
    assert not any(rows for rows in snapshot(mysql_engine).values())


def test_a_role_that_may_insert_and_not_select(database):
    if database.backend != "postgresql":
        pytest.skip("RETURNING needs the SELECT right on PostgreSQL")
    owner = database.engine()
    Base.metadata.create_all(owner, tables=[Currency.__table__])
    role = f"tidy_writer_{uuid.uuid4().hex[:8]}"
    with owner.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role}")
        connection.exec_driver_sql(f"GRANT INSERT ON currencies TO {role}")
    tracker = ResourceTracker(owner)
    try:
        with CleanupManager(tracker), owner.connect() as connection:
            connection.exec_driver_sql(f"SET ROLE {role}")
            connection.execute(
                sa.insert(Currency), [{"code": c, "name": "ours"} for c in ("XXX", "XTS")]
            )
            connection.commit()
            connection.exec_driver_sql("RESET ROLE")
            connection.commit()
            assert len(tracker) == 2
    finally:
        with owner.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {role}")
            connection.exec_driver_sql(f"DROP ROLE {role}")
