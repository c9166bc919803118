"""What looks like production is refused, wherever it says so, unless its very name is allowed."""

from __future__ import annotations

import os
import re
import sqlite3
import uuid
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from tidyrows import CleanupManager, Ledger, ProductionDatabaseError, ResourceTracker
from tidyrows.production import ENVIRONMENT_VARIABLES, refuse_production

SAFE = sa.make_url("postgresql+psycopg://db.example/app_test")
ALLOW = "TIDYROWS_ALLOW_PRODUCTION"


class Base(DeclarativeBase):
    pass


class Org(Base):
    __tablename__ = "orgs"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(40), default="acme")


def refused(url, allowed=False, **environ):
    """What is refused, as pairs; nothing of this process's own environment counts."""
    try:
        refuse_production(sa.make_url(url), allowed, environ)
    except ProductionDatabaseError as error:
        return error.found
    return ()


YES = [
    "prod",
    "PRODUCTION",
    "app_prod",
    "prod-db-1.internal",
    "db.live.example",
    "go-live",
    "production2",
    "2prod",
    "eu.prd",
    "shop.settings.production",
    "ShopProduction",
    "ProdSettings",
    "config.LiveConfig",
    "proddb",
    "PRODDB",
    "prodserver1",
    "ProdUsers",
    "myprod",
    "myPROD",
    "dbprod",
    "shopprd",
    "prddb",
    "productiondb",
    "shopproduction",
    "livedb",
    "LIVEDB",
    "mylive",
]
NO = [
    "product_catalog",
    "products",
    "productions",
    "producer",
    "deliver",
    "reproduction",
    "reprod",
    "coproduction",
    "preproduction",
    "nonproduction",
    "non-prod",
    "pre_prod",
    "PreProd",
    "productivity",
    "Productivity",
    "PRODUCTS",
    "ProductDB",
    "product-db",
    "byproducts",
    "prodigy",
    "prodromal",
    "delivery",
    "livestream",
    "livestock",
    "lively",
    "clive",
    "relive",
    "believe",
    "alive",
    "olive",
    "Livery",
    "probe",
    "prds",
    "nonprod",
    "preprod",
    "staging",
    "test",
]


@pytest.mark.parametrize("name", YES)
def test_a_word_for_production_is_refused_in_a_host_a_database_and_an_environment(name):
    assert refused(f"postgresql+psycopg://{name}/app") == (("host", name),)
    assert refused(f"postgresql+psycopg://db/{name}") == (("database", name),)
    assert refused(f"sqlite:////srv/{name}.db") == (("database", f"{name}.db"),)
    for variable in ENVIRONMENT_VARIABLES:
        assert refused(SAFE, **{variable: name}) == ((variable, name),)


@pytest.mark.parametrize("name", NO)
def test_a_word_that_only_resembles_production_is_none(name):
    assert not refused(f"postgresql+psycopg://{name}/{name}", APP_ENV=name, ENV=name)


@pytest.mark.parametrize(
    "name",
    ["22_live_server", "live_server", "LiveServer", "shop_live_view", "live-stream", "livetests"],
)
def test_another_thing_that_is_called_live_is_none_except_in_a_hosts_name(name):
    assert not refused(f"postgresql+psycopg://db/{name}", APP_ENV=name)
    assert not refused(f"sqlite:////srv/{name}.db")
    if name != "livetests":
        assert refused(f"postgresql+psycopg://{name}/app") == (("host", name.lower()),) or refused(
            sa.URL.create("postgresql", host=name, database="app")
        ) == (("host", name),)


def test_each_of_several_environments_of_one_variable_counts():
    profiles = {"SPRING_PROFILES_ACTIVE": "eu,prod,prod-eu"}
    assert refused(SAFE, **profiles) == (
        ("SPRING_PROFILES_ACTIVE", "prod"),
        ("SPRING_PROFILES_ACTIVE", "prod-eu"),
    )
    allow = "prod,SPRING_PROFILES_ACTIVE=prod-eu"
    assert not refused(SAFE, **profiles, **{ALLOW: allow})


@pytest.mark.parametrize(
    "host",
    [
        "app.c1a2b3.eu-west-1.rds.amazonaws.com",
        "app.postgres.database.azure.com",
        "ep-cool-1.eu-central-1.aws.neon.tech",
        "db.abcdef.supabase.co",
        "/cloudsql/shop:europe-west1:main",
    ],
)
def test_a_managed_host_is_not_production_by_itself(host):
    assert not refused(f"postgresql+psycopg://u:p@/app?host={host}")


def test_a_variable_of_another_name_says_nothing():
    assert not refused(SAFE, GREETING="production", PATH="/opt/prod/bin", APP_ENVIRON="live")


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("postgresql+psycopg://u:p@/app?host=a&host=prod.example", ("host", "prod.example")),
        ("postgresql+psycopg://u:p@/app?host=a,prod-2:5432", ("host", "prod-2:5432")),
        ("postgresql+psycopg://u:p@/?dbname=app_live", ("dbname", "app_live")),
        ("postgresql+psycopg://u:p@/?service=prd", ("service", "prd")),
        ("mysql+pymysql://u:p@/app?unix_socket=/run/prod.sock", ("unix_socket", "/run/prod.sock")),
        ("sqlite:///file:/srv/prod.db?mode=ro&uri=true", ("database", "prod.db")),
    ],
)
def test_what_a_url_says_in_its_parameters_counts(url, found):
    assert refused(url) == (found,)


def test_the_users_name_and_the_folders_of_a_file_say_nothing():
    assert not refused("postgresql+psycopg://app_prod:live@db/app")
    assert not refused("sqlite:////srv/production/test.db")


def test_the_parameters_of_a_files_uri_say_nothing():
    """One of them may be the key of an encrypted database."""
    assert not refused(sa.URL.create("sqlite", database="file:/srv/test.db?key=live"))


@pytest.mark.parametrize("page", ["guide.md", "errors.md"])
def test_the_docs_name_every_variable(page):
    said = (Path(__file__).parents[1] / "docs" / page).read_text(encoding="utf-8")
    assert [
        each for each in (*ENVIRONMENT_VARIABLES, ALLOW) if not re.search(rf"\b{each}\b", said)
    ] == []


# --- allowed


def test_true_allows_everything():
    url = "postgresql+psycopg://prod-1/app_prod"
    assert not refused(url, allowed=True, APP_ENV="production")


def test_every_match_needs_a_permission_of_its_own():
    """A database's name must not let a host through that nobody thought of."""
    url = "postgresql+psycopg://u:p@prod-1/app_prod"
    environ = {"APP_ENV": "production", "ENV": "live"}
    all_four = (
        ("host", "prod-1"),
        ("database", "app_prod"),
        ("APP_ENV", "production"),
        ("ENV", "live"),
    )
    assert refused(url, **environ) == all_four
    assert refused(url, ["app_prod"], **environ) == (all_four[0], *all_four[2:])
    assert refused(url, {"app_prod", "prod-1"}, **environ) == all_four[2:]
    assert refused(url, ("app_prod", "prod-1", "production"), **environ) == all_four[3:]
    assert not refused(url, ["app_prod", "prod-1", "production", "live"], **environ)


def test_a_name_is_allowed_only_exactly():
    for name in ("app", "prod", "App_Prod", "app_prod2", "app_*", ""):
        assert refused("postgresql+psycopg://db/app_prod", [name]), name


def test_one_variable_is_allowed_without_the_others():
    environ = {"NODE_ENV": "production", "APP_ENV": "production"}
    assert refused(SAFE, ["NODE_ENV=production"], **environ) == (("APP_ENV", "production"),)
    assert refused("postgresql://production/a", ["NODE_ENV=production"], NODE_ENV="production") == (
        ("host", "production"),
    )
    assert not refused(SAFE, ["production"], **environ)


def test_the_environment_allows_names_too():
    url = "postgresql+psycopg://prod-1/app_prod"
    assert refused(url, **{ALLOW: "app_prod"}) == (("host", "prod-1"),)
    assert not refused(url, **{ALLOW: " app_prod , prod-1,"})
    assert not refused(url, ["prod-1"], **{ALLOW: "app_prod"})
    assert not refused(SAFE, APP_ENV="live", **{ALLOW: "APP_ENV=live"})


@pytest.mark.parametrize("blanket", ["1", "true", "True", "yes", "on", "*", ""])
def test_the_environment_has_no_word_that_allows_everything(blanket):
    """It would be exported once and forgotten."""
    assert refused("postgresql+psycopg://db/app_prod", **{ALLOW: blanket})


@pytest.mark.parametrize(
    "nonsense", ["app_prod", b"app_prod", 1, None, [b"app_prod"], [1], iter(["a"])]
)
def test_what_is_no_list_of_names_is_a_type_error(nonsense):
    """A string is a collection, of letters: it would allow nothing, and say so nowhere."""
    engine = sa.create_engine("sqlite://")
    for bind in (engine, sessionmaker(binds={Org: engine})):  # where no engine is known yet, too
        with pytest.raises(TypeError, match=r"write allow_production=\['app_prod'\]"):
            ResourceTracker(bind, allow_production=nonsense)


def test_no_names_allow_nothing():
    assert refused("postgresql+psycopg://db/prod", [])
    assert refused("postgresql+psycopg://db/prod", ())


# --- what is said


def test_the_error_says_where_it_is_and_what_to_write():
    url = sa.make_url("postgresql+psycopg://joe:secret@prod-1/app_live?sslpassword=hidden")
    with pytest.raises(ProductionDatabaseError) as caught:
        refuse_production(url, environ={"DJANGO_SETTINGS_MODULE": "shop.settings.production"})
    assert str(caught.value) == (
        "The host 'prod-1' looks like production (it contains 'prod'); the database 'app_live' "
        "looks like production (it contains 'live'); the environment variable "
        "DJANGO_SETTINGS_MODULE='shop.settings.production' looks like production (it contains "
        "'production'), and tidyrows deletes rows. If it is for tests all the same, add "
        "allow_production=['prod-1', 'app_live', "
        "'DJANGO_SETTINGS_MODULE=shop.settings.production'] to the call that was refused, or set "
        "TIDYROWS_ALLOW_PRODUCTION=prod-1,app_live,"
        "DJANGO_SETTINGS_MODULE=shop.settings.production; allow_production=True allows everything."
    )
    assert caught.value.matched == "prod"


def test_what_the_error_says_to_write_is_enough():
    url = sa.make_url("postgresql+psycopg://u:p@prod-1/app_live?host=a,prod-2:1&service=prd")
    environ = dict.fromkeys(ENVIRONMENT_VARIABLES, "ShopProd")
    with pytest.raises(ProductionDatabaseError) as caught:
        refuse_production(url, environ=environ)
    told = str(caught.value)
    listed = eval(told.partition("allow_production=")[2].partition(" to ")[0])
    refuse_production(url, listed, environ)
    variable = told.partition(f"{ALLOW}=")[2].partition(";")[0]
    refuse_production(url, environ={**environ, ALLOW: variable})


def test_a_connection_string_in_the_place_of_a_name_is_not_shown():
    for hidden in ("host=prod password=secret", "postgresql://joe:secret@prod-1/app"):
        url = sa.URL.create("postgresql", query={"dbname": hidden})
        with pytest.raises(ProductionDatabaseError) as caught:
            refuse_production(url, environ={})
        assert "secret" not in str(caught.value)
        assert caught.value.found == (("dbname", "prod"),)


# --- trackers


def test_a_tracker_looks_at_the_environment_of_its_process(sqlite_engine, monkeypatch):
    ResourceTracker(sqlite_engine)
    monkeypatch.setitem(os.environ, "APP_ENV", "production")
    with pytest.raises(ProductionDatabaseError, match="APP_ENV='production'"):
        ResourceTracker(sqlite_engine)
    ResourceTracker(sqlite_engine, allow_production=["production"])
    monkeypatch.setitem(os.environ, ALLOW, "APP_ENV=production")
    ResourceTracker(sqlite_engine)


def test_names_are_allowed_to_a_tracker_that_comes_by_json(tmp_path):
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'prod.db'}")
    Base.metadata.create_all(engine)
    text = ResourceTracker(engine, allow_production=["prod.db"]).to_json()
    with pytest.raises(ProductionDatabaseError):
        ResourceTracker.from_json(text, engine)
    ResourceTracker.from_json(text, engine, allow_production=["prod.db"])
    engine.dispose()


def test_a_session_that_has_begun_before_the_tracker_is_refused_too(tmp_path):
    """It has no one engine, so nobody could look when the tracker was made."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'prod.db'}")
    Base.metadata.create_all(engine)
    with Session(binds={Org: engine}) as session:
        session.scalars(sa.select(Org)).all()
        with pytest.raises(ProductionDatabaseError):
            ResourceTracker(session).start()
        tracker = ResourceTracker(session, allow_production=["prod.db"]).start()
        tracker.stop()
    engine.dispose()


def test_each_engine_is_looked_at_once(tmp_path, monkeypatch):
    """Reading the environment at every transaction would cost a tenth of a small one."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'test.db'}")
    Base.metadata.create_all(engine)
    looks = []
    monkeypatch.setattr(
        "tidyrows.tracking.binding.refuse_production", lambda *args: looks.append(args)
    )
    maker = sessionmaker(engine)
    tracker = ResourceTracker(maker).start()
    try:
        for _ in range(3):
            with maker() as session:
                session.scalars(sa.select(Org)).all()
    finally:
        tracker.stop()
    assert len(looks) == 1
    engine.dispose()


# --- another door


def wrote(engine, base=Base, table=Org, **options):
    """What is refused at the latest when the first row is written; nothing is left of it then."""
    try:
        tracker = ResourceTracker(engine, **options)
        with CleanupManager(tracker), Session(engine) as session:
            session.add(table())
            session.commit()
    except ProductionDatabaseError as error:
        return error.found
    return ()


def test_the_file_behind_a_symbolic_link_counts(tmp_path):
    real, link = tmp_path / "shop_prod.db", tmp_path / "test.db"
    Base.metadata.create_all(sa.create_engine(f"sqlite:///{real}"))
    link.symlink_to(real)
    with pytest.raises(ProductionDatabaseError, match=r"'shop_prod\.db'"):
        ResourceTracker(sa.create_engine(f"sqlite:///{link}"))
    with pytest.raises(ProductionDatabaseError, match=r"'shop_prod\.db'"):
        Ledger(sa.create_engine(f"sqlite:///{link}"))


def test_the_file_that_a_creator_opens_counts(tmp_path):
    path = tmp_path / "shop_prod.db"
    Base.metadata.create_all(sa.create_engine(f"sqlite:///{path}"))
    engine = sa.create_engine("sqlite:///test.db", creator=lambda: sqlite3.connect(path))
    assert wrote(engine) == (("database", "shop_prod.db"),)
    assert not wrote(engine, allow_production=["shop_prod.db"])
    with pytest.raises(ProductionDatabaseError):  # the engine is known now
        ResourceTracker(engine)
    with pytest.raises(ProductionDatabaseError):
        Ledger(engine).install()
    engine.dispose()


def test_a_row_in_an_attached_file_counts(tmp_path):
    for name in ("shop_prod", "other"):
        engine = sa.create_engine(f"sqlite:///{tmp_path / 'test.db'}")
        sa.event.listen(
            engine,
            "connect",
            lambda driver, _record, name=name: driver.execute(
                f"ATTACH '{tmp_path / name}.db' AS elsewhere"
            ),
        )
        things = sa.Table(
            "things", sa.MetaData(schema="elsewhere"), sa.Column("id", sa.Integer, primary_key=True)
        )
        things.metadata.create_all(engine)
        assert bool(wrote_into(engine, things)) is (name == "shop_prod")
        engine.dispose()


def wrote_into(engine, table, before=()):
    tracker = ResourceTracker(engine)
    try:
        with CleanupManager(tracker), engine.begin() as connection:
            for statement in before:
                connection.exec_driver_sql(statement)
            connection.execute(sa.insert(table), [{"id": 1}])
    except ProductionDatabaseError as error:
        with engine.connect() as connection:
            for statement in before:
                connection.exec_driver_sql(statement)
            assert connection.scalar(sa.select(sa.func.count()).select_from(table)) == 0
        return error.found
    return ()


@pytest.mark.parametrize("variable", ["PGHOST", "PGHOSTADDR", "PGDATABASE", "PGSERVICE"])
def test_what_the_driver_takes_from_the_environment_counts(variable, monkeypatch):
    for each in ("PGHOST", "PGHOSTADDR", "PGDATABASE", "PGSERVICE"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(variable, "shop_prod")
    for name in ("psycopg", "psycopg2", "asyncpg"):
        engine = sa.create_engine(f"postgresql+{name}://")
        with pytest.raises(ProductionDatabaseError, match=f"{variable}='shop_prod'"):
            ResourceTracker(engine)
        ResourceTracker(engine, allow_production=["shop_prod"])
        ResourceTracker(engine, allow_production=[f"{variable}=shop_prod"])
    if variable != "PGSERVICE":
        ResourceTracker(sa.create_engine("postgresql+psycopg://db/app"))


@pytest.fixture
def production(request, any_driver_engine):
    """The URL of a database on the same server that looks like production."""
    name = f"shop_prod_{uuid.uuid4().hex[:8]}"
    engine = any_driver_engine
    if engine.dialect.name == "sqlite":
        pytest.skip("the others have databases")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    url = engine.url.set(database=name)
    made = sa.create_engine(url)
    Base.metadata.create_all(made)
    made.dispose()
    yield url
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name}")


def test_the_database_that_the_connection_leads_to_counts(any_driver_engine, production):
    doors = [sa.create_engine(any_driver_engine.url) for _ in range(2)]
    keywords = any_driver_engine.dialect.create_connect_args(production)[1]
    doors += [
        sa.create_engine(any_driver_engine.url, connect_args={key: production.database})
        for key in keywords.keys() & {"dbname", "database", "db"}
    ]

    @sa.event.listens_for(doors[0], "do_connect")
    def do_connect(dialect, _record, cargs, cparams):
        cparams.update(keywords)

    made = sa.create_engine(production)
    doors[1] = sa.create_engine(any_driver_engine.url, creator=made.pool._creator)
    for engine in doors:
        with engine.connect():  # the pool has one already
            pass
        assert wrote(engine) == (("database", production.database),), engine
        with made.connect() as connection:
            assert connection.scalar(sa.select(sa.func.count()).select_from(Org)) == 0
        with pytest.raises(ProductionDatabaseError):
            ResourceTracker(engine)
        assert not wrote(engine, allow_production=[production.database])
    for engine in (*doors, made):
        engine.dispose()


def test_a_connection_older_than_the_tracker_counts(any_driver_engine, production):
    made = sa.create_engine(production)
    engine = sa.create_engine(any_driver_engine.url, creator=made.pool._creator)
    with engine.connect() as connection:
        connection.rollback()
        tracker = ResourceTracker(engine)
        with pytest.raises(ProductionDatabaseError), CleanupManager(tracker):
            connection.execute(sa.insert(Org))
        connection.rollback()
        assert connection.scalar(sa.select(sa.func.count()).select_from(Org)) == 0
    engine.dispose()
    made.dispose()


def test_a_row_in_another_database_of_the_server_counts(any_driver_engine, production):
    if any_driver_engine.dialect.name not in {"mysql", "mariadb"}:
        pytest.skip("a schema is no database there")
    columns = sa.Column("id", sa.Integer, primary_key=True)
    there = sa.Table("orgs", sa.MetaData(schema=production.database), columns)
    found = (("database", production.database),)
    assert wrote_into(any_driver_engine, there) == found
    assert wrote_into(any_driver_engine, there) == found  # not only once
    unnamed = sa.Table("orgs", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    assert wrote_into(any_driver_engine, unnamed, [f"USE {production.database}"]) == found
    tracker = ResourceTracker(any_driver_engine)
    with pytest.raises(ProductionDatabaseError):
        tracker.track_rows(there, [1])
    ResourceTracker(any_driver_engine, allow_production=[production.database]).track_rows(there, [])
