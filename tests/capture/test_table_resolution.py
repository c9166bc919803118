"""Which real table was it? Names move, and a row of the same key stands in the other table."""

from __future__ import annotations

import gc
import pickle
import threading
import uuid
import weakref
from collections.abc import Callable
from contextlib import closing, nullcontext
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.event import listen
from sqlalchemy.orm import Session, registry, sessionmaker

from harness.bystanders import Bystanders, snapshot
from harness.databases import Database
from harness.ledgers import closing_all
from harness.targets import on
from tidyrows import CleanupManager, Ledger, ResourceTracker, UntrackedRowsWarning
from tidyrows.capture.engine import capture_for

metadata = sa.MetaData()
things = sa.Table(
    "things",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(20)),
)


class Thing:
    pass


registry().map_imperatively(Thing, things)
POSTGRESQL = ("postgresql+psycopg", "postgresql+psycopg2")


class TwoPlaces:
    """The same table in the default schema and in another, each with the same strangers."""

    def __init__(self, database: Database) -> None:
        self.other = database.extra_schema()
        self.engine = database.engine()
        self.there = self.engine.execution_options(schema_translate_map={None: self.other})
        for engine in (self.engine, self.there):
            metadata.create_all(engine)
            with engine.begin() as connection:
                for number in range(1, 10):
                    connection.execute(sa.insert(things).values(id=number, name="theirs"))
        with self.engine.connect() as connection:
            inspector = sa.inspect(connection)
            self.home = str(inspector.default_schema_name)
        self.bystanders = Bystanders(self.engine)

    def delete_from(self, schema: str, *keys: int) -> None:
        """Strangers make room for a key."""
        place = sa.table("things", sa.column("id"), schema=schema)
        with self.engine.begin() as connection:
            connection.execute(sa.delete(place).where(place.c.id.in_(keys)))
        self.bystanders = Bystanders(self.engine)


@pytest.fixture
def places(database: Database) -> TwoPlaces:
    return TwoPlaces(database)


def found(tracker: ResourceTracker) -> list[tuple[str, int]]:
    return sorted((row.table.schema, row.key[0]) for row in tracker.rows())


Opener = Callable[[TwoPlaces], Any]


def _session(places: TwoPlaces) -> Any:
    session = Session(places.engine)
    session.connection(execution_options={"schema_translate_map": {None: places.other}})
    return session


LEVELS: dict[str, Opener] = {
    "engine": lambda p: p.there.connect(),
    "connection": lambda p: p.engine.connect().execution_options(
        schema_translate_map={None: p.other}
    ),
    "session": _session,
    "session of the engine": lambda p: Session(p.there),
}


@pytest.mark.parametrize("level", LEVELS)
def test_a_schema_translate_map_on_every_level(places, level):
    places.delete_from(places.other, 1, 2, 3)
    tracker = ResourceTracker(places.engine)
    with CleanupManager(tracker):
        with LEVELS[level](places) as source:
            source.execute(sa.insert(things).values(id=1, name="ours"))
            source.execute(sa.insert(things), [{"id": n, "name": "ours"} for n in (2, 3)])
            source.commit()
        assert found(tracker) == [(places.other, n) for n in (1, 2, 3)]
    places.bystanders.assert_untouched()


def test_a_schema_translate_map_of_single_statements(places):
    places.delete_from(places.other, 1, 2)
    places.delete_from(places.home, 3)
    tracker = ResourceTracker(places.engine)
    options: dict[str, Any] = {"schema_translate_map": {None: places.other}}
    with CleanupManager(tracker):
        with Session(places.engine) as session:
            connection = session.connection()
            connection.execute(
                sa.insert(things).values(id=1, name="ours"), execution_options=options
            )
            connection.execute(
                sa.insert(things).values(id=2, name="ours").execution_options(**options)
            )
            session.execute(sa.insert(things).values(id=3, name="ours"))
            session.commit()
        assert found(tracker) == sorted([(places.other, 1), (places.other, 2), (places.home, 3)])
        with Session(places.engine) as session:  # and a delete finds the one that is meant
            session.execute(sa.delete(things).where(things.c.id == 3), execution_options=options)
            session.rollback()
            session.execute(sa.delete(things).where(things.c.id == 1), execution_options=options)
            session.commit()
        assert found(tracker) == sorted([(places.other, 2), (places.home, 3)])
    places.bystanders.assert_untouched()


def _in_options(places: TwoPlaces) -> sa.Engine:
    option = f"-csearch_path={places.other}"
    return sa.create_engine(places.engine.url, connect_args={"options": option})


def _at_connect(places: TwoPlaces) -> sa.Engine:
    engine = sa.create_engine(places.engine.url)

    @sa.event.listens_for(engine, "connect", insert=True)
    def set_path(connection: Any, _record: Any) -> None:
        connection.cursor().execute(f"SET search_path TO {places.other}")
        connection.commit()

    return engine


def _at_checkout(places: TwoPlaces) -> sa.Engine:
    """Tenants: at each checkout another one, past SQLAlchemy's statements."""
    engine = sa.create_engine(places.engine.url, pool_size=1)
    paths = iter([places.home])

    @sa.event.listens_for(engine, "checkout")
    def set_path(connection: Any, _record: Any, _proxy: Any) -> None:
        connection.cursor().execute(f"SET search_path TO {next(paths, places.other)}")
        connection.commit()

    return engine


def _by_role(places: TwoPlaces) -> sa.Engine:
    role = f"tidy_{uuid.uuid4().hex[:8]}"
    with places.engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN SUPERUSER")
        connection.exec_driver_sql(f"ALTER ROLE {role} SET search_path = {places.other}")
    return sa.create_engine(places.engine.url.set(username=role))


@on(*POSTGRESQL)
@pytest.mark.parametrize("how", [_in_options, _at_connect, _at_checkout, _by_role])
def test_a_search_path_that_no_statement_sets(places, how):
    places.delete_from(places.other, 1, 2)
    engine = how(places)
    try:
        tracker = ResourceTracker(engine)
        with CleanupManager(tracker):
            with engine.connect() as connection:  # what is learnt here is not kept too long
                connection.execute(sa.insert(things).values(id=50, name="rolled back"))
            for number in (1, 2):
                with engine.begin() as connection:
                    connection.execute(sa.insert(things).values(id=number, name="ours"))
            assert found(tracker) == [(places.other, 1), (places.other, 2)]
        places.bystanders.assert_untouched()
    finally:
        engine.dispose()
        if how is _by_role:
            with places.engine.begin() as connection:
                connection.exec_driver_sql(f"DROP ROLE {engine.url.username}")


SETTERS: dict[str, Callable[[Any, str], Any]] = {
    "text": lambda c, path: c.execute(sa.text(f'SET LOCAL search_path TO "{path}"')),
    "driver": lambda c, path: c.exec_driver_sql(f'SET LOCAL search_path TO "{path}"'),
    "without parameters": lambda c, path: c.exec_driver_sql(
        f'SET LOCAL search_path TO "{path}"', execution_options={"no_parameters": True}
    ),
    "function": lambda c, path: c.execute(
        sa.select(sa.func.set_config("search_path", path, sa.true()))
    ),
    "text function": lambda c, path: c.execute(
        sa.text("SELECT set_config('search_path', :path, true)"), {"path": path}
    ),
}


@on(*POSTGRESQL)
@pytest.mark.parametrize("how", SETTERS)
def test_a_search_path_of_one_transaction(places, how):
    places.delete_from(places.other, 1)
    places.delete_from(places.home, 2, 3)
    tracker = ResourceTracker(places.engine)
    with CleanupManager(tracker), places.engine.connect() as connection:
        connection.execute(sa.insert(things).values(id=3, name="ours"))
        SETTERS[how](connection, places.other)
        connection.execute(sa.insert(things).values(id=1, name="ours"))
        connection.commit()
        connection.execute(sa.insert(things).values(id=2, name="ours"))
        connection.commit()
        assert found(tracker) == sorted([(places.other, 1), (places.home, 2), (places.home, 3)])
    places.bystanders.assert_untouched()


@on(*POSTGRESQL)
@pytest.mark.parametrize("end", ["session savepoint", "text savepoint", "rollback", "text"])
def test_a_search_path_that_is_rolled_back(places, end):
    """ROLLBACK TO SAVEPOINT brings back the path that was there before."""
    places.delete_from(places.home, 1)
    tracker = ResourceTracker(places.engine)
    with CleanupManager(tracker), places.engine.connect() as connection:
        connection.execute(sa.select(things)).all()
        nested = connection.begin_nested() if end == "session savepoint" else None
        if end == "text savepoint":
            connection.execute(sa.text("SAVEPOINT before"))
        connection.exec_driver_sql(f'SET search_path TO "{places.other}"')
        connection.execute(sa.insert(things).values(id=100, name="never"))
        if nested is not None:
            nested.rollback()
        elif end == "text savepoint":
            connection.execute(sa.text("ROLLBACK TO SAVEPOINT before"))
        elif end == "text":
            connection.execute(sa.text("ROLLBACK"))
        else:
            connection.rollback()
        connection.execute(sa.insert(things).values(id=1, name="ours"))
        connection.commit()
        assert found(tracker) == [(places.home, 1)]
    places.bystanders.assert_untouched()


@on(*POSTGRESQL)
def test_a_schema_that_is_renamed_and_a_table_that_moves(places):
    """DDL on another connection makes old all that was learnt on this one."""
    tracker = ResourceTracker(places.engine)
    with CleanupManager(tracker), places.engine.connect() as connection:
        connection.execute(sa.insert(things).values(id=100, name="rolled back"))
        connection.rollback()
        with places.engine.begin() as other:
            other.exec_driver_sql(f'DROP TABLE "{places.other}".things')
            other.exec_driver_sql(f'ALTER TABLE things SET SCHEMA "{places.other}"')
            other.exec_driver_sql(f'ALTER SCHEMA "{places.other}" RENAME TO elsewhere')
        with places.engine.begin() as other:
            other.exec_driver_sql("SET LOCAL search_path TO elsewhere")
            other.execute(sa.insert(things).values(id=101, name="ours"))
        connection.exec_driver_sql("SET search_path TO elsewhere")
        connection.execute(sa.insert(things).values(id=102, name="ours"))
        connection.commit()
        connection.exec_driver_sql("RESET search_path")
        connection.commit()
        assert found(tracker) == [("elsewhere", 101), ("elsewhere", 102)]
    assert len(snapshot(places.engine)["elsewhere.things"]) == 9


@on("mysql+pymysql", "mysql+mysqldb")
def test_use_that_a_pooled_connection_keeps(places):
    places.delete_from(places.other, 1, 2)
    tracker = ResourceTracker(places.engine)
    with CleanupManager(tracker), places.engine.connect() as connection:
        connection.exec_driver_sql(f"USE `{places.other}`")
        connection.execute(sa.insert(things).values(id=1, name="ours"))
        connection.commit()
        connection.execute(sa.insert(things).values(id=2, name="ours"))
        connection.commit()
        connection.exec_driver_sql(f"USE `{places.home}`")
        assert found(tracker) == [(places.other, 1), (places.other, 2)]
    places.bystanders.assert_untouched()


def _by_function(connection: sa.Connection, schema: str) -> None:
    connection.execute(sa.select(sa.func.enter(schema))).all()


def _by_cursor(connection: sa.Connection, schema: str) -> None:
    with closing(connection.connection.cursor()) as cursor:
        cursor.execute(f'SET search_path TO "{schema}"')


def _by_driver(connection: sa.Connection, schema: str) -> None:
    with closing(connection.connection.dbapi_connection.cursor()) as cursor:
        cursor.execute(f'SET search_path TO "{schema}"')


def _by_second_statement(connection: sa.Connection, schema: str) -> None:
    connection.exec_driver_sql(f'SELECT 1; SET search_path TO "{schema}"')


def _by_temporary_table(connection: sa.Connection, schema: str) -> None:
    with closing(connection.connection.cursor()) as cursor:
        cursor.execute("CREATE TEMP TABLE numbered (id serial PRIMARY KEY, name text)")


@on(*POSTGRESQL)
@pytest.mark.parametrize(
    "move", [_by_function, _by_cursor, _by_driver, _by_second_statement, _by_temporary_table]
)
@pytest.mark.parametrize("before", ["in an earlier transaction", "in this transaction"])
def test_a_name_that_comes_to_mean_another_table_past_sqlalchemy(places, move, before):
    """The database tells of each RETURNING which table it reads."""
    numbered = sa.Table(
        "numbered",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(20)),
    )
    for engine in (places.engine, places.there):
        numbered.create(engine)
    with places.engine.begin() as connection:
        rows = [{"name": "theirs"} for _ in range(9)]
        connection.execute(sa.insert(numbered), rows)
        connection.exec_driver_sql(
            "CREATE FUNCTION enter(place text) RETURNS text LANGUAGE sql "
            "AS $$ SELECT set_config('search_path', place, false) $$"
        )
    places.bystanders = Bystanders(places.engine)
    tracker = ResourceTracker(places.engine)
    with CleanupManager(tracker), places.engine.connect() as connection:
        connection.execute(sa.insert(numbered).values(name="ours"))
        if before == "in an earlier transaction":
            connection.commit()
        move(connection, places.other)
        for _ in range(3):
            connection.execute(sa.insert(numbered).values(name="ours"))
        connection.execute(sa.insert(numbered), [{"name": "ours"}, {"name": "ours"}])
        connection.commit()
        temporary = move is _by_temporary_table
        moved = [] if temporary else [(places.other, number) for number in range(1, 6)]
        assert [row for row in found(tracker) if row != (places.home, 10)] == moved
    places.bystanders.assert_untouched()


@on(*POSTGRESQL, "mysql+pymysql", "mysql+mysqldb")
def test_a_cursor_that_is_kept_and_moves_names_between_inserts(places):
    """Nothing is remembered of names while other code uses the driver."""
    places.delete_from(places.other, 1)
    enter = 'SET search_path TO "{}"' if places.engine.dialect.name == "postgresql" else "USE `{}`"
    tracker = ResourceTracker(places.engine)
    with CleanupManager(tracker), places.engine.connect() as connection:
        connection.execute(sa.insert(things).values(id=50, name="ours"))
        connection.commit()
        with closing(connection.connection.cursor()) as cursor:
            connection.execute(sa.insert(things).values(id=51, name="ours"))
            cursor.execute(enter.format(places.other))
            connection.execute(sa.insert(things).values(id=1, name="ours"))
            cursor.execute(enter.format(places.home))
            connection.execute(sa.insert(things).values(id=52, name="ours"))
            connection.commit()
        moved = [(places.other, 1)]
        assert found(tracker) == sorted([(places.home, key) for key in (50, 51, 52)] + moved)
    places.bystanders.assert_untouched()


@pytest.mark.filterwarnings("ignore:.*past SQLAlchemy")  # MariaDB counts them, and not where
@on(*POSTGRESQL, "mysql+pymysql", "mysql+mysqldb")
def test_a_temporary_table_that_a_function_makes(places):
    """It hides the table of its name; its rows go with the connection."""
    making = "CREATE TEMPORARY TABLE things (id INT PRIMARY KEY, name VARCHAR(20));"
    if places.engine.dialect.name == "postgresql":
        body = f"RETURNS int LANGUAGE plpgsql AS $$ BEGIN {making} RETURN 1; END $$"
    else:
        body = f"RETURNS INT BEGIN {making} RETURN 1; END"
    with places.engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE FUNCTION hide() {body}")
    tracker = ResourceTracker(places.engine)
    with CleanupManager(tracker), places.engine.connect() as connection:
        connection.execute(sa.insert(things).values(id=50, name="ours"))
        connection.commit()
        connection.execute(sa.select(sa.func.hide())).all()
        for key in (1, 2):
            connection.execute(sa.insert(things).values(id=key, name="hidden"))
        connection.commit()
        assert found(tracker) == [(places.home, 50)]
        connection.invalidate()
    places.bystanders.assert_untouched()


@on("mysql+pymysql", "mysql+mysqldb")
@pytest.mark.parametrize("how", ["select_db", "of the driver", "cursor of the driver", "comment"])
def test_a_database_that_no_statement_uses(places, how):
    places.delete_from(places.other, 1)
    places.delete_from(places.home, 2)
    tracker = ResourceTracker(places.engine)
    with CleanupManager(tracker), places.engine.connect() as connection:
        connection.execute(sa.insert(things).values(id=2, name="ours"))
        connection.commit()
        connection.execute(sa.insert(things).values(id=50, name="ours"))
        if how == "comment":
            connection.exec_driver_sql(f"/*! USE `{places.other}` */")
        elif how == "select_db":
            connection.connection.select_db(places.other)
        elif how == "cursor of the driver":
            with closing(connection.connection.dbapi_connection.cursor()) as cursor:
                cursor.execute(f"USE `{places.other}`")
        else:
            connection.connection.dbapi_connection.select_db(places.other)
        connection.execute(sa.insert(things).values(id=1, name="ours"))
        connection.commit()
        connection.exec_driver_sql(f"USE `{places.home}`")
        assert found(tracker) == sorted([(places.home, 2), (places.home, 50), (places.other, 1)])
    places.bystanders.assert_untouched()


@on("sqlite", *POSTGRESQL, "mysql+pymysql")
def test_a_view_is_what_it_is_called(places):
    """An updatable view takes rows by their keys; where no key is told, that is said."""
    engine = places.engine
    view = sa.Table(
        "things_view",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("name", sa.String(20)),
    )
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE VIEW things_view AS SELECT id, name FROM things")
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql(
                "CREATE TRIGGER i INSTEAD OF INSERT ON things_view BEGIN"
                " INSERT INTO things VALUES (NEW.id, NEW.name); END"
            )
            connection.exec_driver_sql(
                "CREATE TRIGGER d INSTEAD OF DELETE ON things_view BEGIN"
                " DELETE FROM things WHERE id = OLD.id; END"
            )
    tracker = ResourceTracker(engine)
    untold = engine.dialect.name == "sqlite"  # it counts no rows that a trigger makes
    expected = pytest.warns(UntrackedRowsWarning, match="things_view") if untold else nullcontext()
    with expected, CleanupManager(tracker) as cleanup, engine.begin() as connection:
        connection.execute(sa.insert(view).values(id=100, name="ours"))
    assert cleanup.report.total_deleted == (0 if untold else 1)
    if untold:
        with engine.begin() as connection:
            assert connection.execute(sa.delete(things).where(things.c.id == 100)).rowcount == 1
    places.bystanders.assert_untouched()


@on("sqlite")
def test_a_view_that_makes_its_own_keys(places):
    """The last row id is some other row's, a stranger's as like as not."""
    engine = places.engine
    view = sa.Table(
        "things_view",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(20)),
    )
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE VIEW things_view AS SELECT id, name FROM things")
        connection.exec_driver_sql(
            "CREATE TRIGGER i INSTEAD OF INSERT ON things_view BEGIN"
            " INSERT INTO things (name) VALUES (NEW.name); END"
        )
        connection.exec_driver_sql(
            "CREATE TRIGGER d INSTEAD OF DELETE ON things_view BEGIN"
            " DELETE FROM things WHERE id = OLD.id; END"
        )
    tracker = ResourceTracker(engine)
    with pytest.warns(UntrackedRowsWarning, match="things_view is not tracked"):
        with CleanupManager(tracker), engine.begin() as connection:
            connection.execute(sa.insert(view).values(name="ours"))
    with engine.begin() as connection:
        assert connection.execute(sa.delete(things).where(things.c.name == "ours")).rowcount == 1
    places.bystanders.assert_untouched()


@on(*POSTGRESQL)
def test_partitioned_tables(places):
    engine = places.engine
    parted = sa.Table(
        "parted",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("name", sa.String(20)),
        postgresql_partition_by="LIST (id)",
    )
    parted.create(engine)
    with engine.begin() as connection:
        for number in (1, 2):
            connection.exec_driver_sql(
                f"CREATE TABLE parted_{number} PARTITION OF parted"
                f" FOR VALUES IN ({number}, 1{number})"
            )
        connection.execute(sa.insert(parted), [{"id": n, "name": "theirs"} for n in (1, 2)])
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup, engine.begin() as connection:
        connection.execute(sa.insert(parted), [{"id": n, "name": "ours"} for n in (11, 12)])
    assert cleanup.report.total_deleted == 2
    bystanders.assert_untouched()


def test_tables_that_no_table_object_describes_are_said(places):
    light = sa.table("things", sa.column("id"), sa.column("name"))
    with pytest.warns(UntrackedRowsWarning, match="things is not tracked"):
        with CleanupManager(ResourceTracker(places.engine)):
            with places.engine.begin() as connection:
                connection.execute(sa.insert(light).values(id=100, name="ours"))
    with places.engine.begin() as connection:
        connection.execute(sa.delete(things).where(things.c.id == 100))
    places.bystanders.assert_untouched()


@on(*POSTGRESQL)
def test_an_insert_beside_an_insert_is_said(places):
    """The statement's own rows are tracked, those of a CTE cannot be."""
    tracker = ResourceTracker(places.engine)
    made = sa.insert(things).values(id=100, name="cte").returning(things.c.id).cte("made")
    statement = sa.insert(things).from_select(
        ["id", "name"], sa.select(made.c.id + 1, sa.literal("ours"))
    )
    with pytest.warns(UntrackedRowsWarning, match="things"):
        with CleanupManager(tracker), places.engine.begin() as connection:
            connection.execute(statement)
    with places.engine.begin() as connection:
        assert connection.execute(sa.delete(things).where(things.c.id == 100)).rowcount == 1
    places.bystanders.assert_untouched()


def test_reserved_and_strange_names(database):
    engine = database.engine()
    own = sa.MetaData()
    strange = sa.Table(
        'Order "by" 100% of',
        own,
        sa.Column("select", sa.Integer, primary_key=True),
        sa.Column("a b", sa.String(20)),
    )
    own.create_all(engine)
    bystanders = Bystanders(engine)
    bystanders.insert(strange, {"a b": "theirs"})
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker):
        with engine.begin() as connection:
            connection.execute(sa.insert(strange).values({"a b": "ours"}))
            connection.execute(sa.insert(strange), [{"a b": "ours"}, {"a b": "too"}])
            connection.execute(sa.insert(strange).values([{"a b": "ours"}, {"a b": "too"}]))
        assert len(tracker) == 5
    bystanders.assert_untouched()


@on(*POSTGRESQL)
def test_an_aborted_transaction_raises_its_own_error_first(places):
    """Asking which table it is fails there too; the caller must get SQLAlchemy's error."""
    maker = sessionmaker(places.engine)
    with CleanupManager(ResourceTracker(places.engine)):
        for form in (
            lambda c: c.execute(sa.insert(things), [{"id": 100}, {"id": 101}]),
            lambda c: c.execute(sa.insert(things).values(id=100).returning(things.c.id)),
        ):
            with maker() as session:
                connection = session.connection()
                with pytest.raises(sa.exc.ProgrammingError):
                    connection.exec_driver_sql("SELECT nothing")
                connection.info.clear()
                with pytest.raises(sa.exc.InternalError):
                    form(connection)
    places.bystanders.assert_untouched()


@on("postgresql+psycopg", "postgresql+psycopg2", "mysql+pymysql", "mysql+mysqldb")
def test_a_dead_connection_raises_its_own_error_first(places):
    for form in (
        lambda c: c.execute(sa.insert(things), [{"id": 100}, {"id": 101}]),
        lambda c: c.execute(sa.insert(things).values([{"id": 100}, {"id": 101}])),
        lambda c: c.execute(sa.insert(things).values(id=100)),
    ):
        with CleanupManager(ResourceTracker(places.engine)):
            connection = places.engine.connect()
            raw = connection.connection.driver_connection
            if places.engine.dialect.name == "postgresql":
                end = f"SELECT pg_terminate_backend({raw.info.backend_pid})"
            else:
                end = f"KILL {raw.thread_id()}"
            with places.engine.connect() as killer:
                killer.exec_driver_sql(end)
            connection.info.clear()
            with pytest.raises(sa.exc.OperationalError) as caught:
                form(connection)
            assert caught.value.connection_invalidated
            connection.rollback()
            connection.close()
    places.bystanders.assert_untouched()


def test_a_table_is_asked_for_once_and_not_in_every_transaction(places, monkeypatch):
    """Our own listener at the pool's checkout moves no search_path."""
    places.delete_from(places.home, 1, 2, 3)
    dialect = type(capture_for(places.engine).dialect)
    asked: list[str] = []
    resolve = dialect.resolve

    def counted(self: Any, connection: Any, schema: Any, name: str) -> Any:
        asked.append(name)
        return resolve(self, connection, schema, name)

    monkeypatch.setattr(dialect, "resolve", counted)
    with CleanupManager(ResourceTracker(places.engine)):
        for number in (1, 2, 3):
            with places.engine.begin() as connection:
                connection.execute(sa.insert(things).values(id=number, name="ours"))
        assert asked == ["things"]


# -- a Table that knows less than the database -----------------------------------------------------


def _known_by_less(database: Database, key: str) -> sa.Engine:
    """A table that a Table of one column stands for, with a stranger's row for each of ours."""
    engine = database.engine()
    with engine.begin() as connection:
        full = sa.Table(
            "parcels",
            sa.MetaData(),
            sa.Column("depot", sa.Integer, primary_key=key == "composite", autoincrement=False),
            sa.Column("id", sa.Integer, primary_key=key != "none"),
            sa.Column("name", sa.String(20)),
            sa.Column("note", sa.String(20), server_default="ours"),
        )
        full.create(connection)
        for number, name in enumerate("abcde"):
            row: dict[str, Any] = {"name": name, "note": "theirs"}
            if key == "composite":
                row |= {"depot": number, "id": number}
            connection.execute(full.insert(), row)
    return engine


@pytest.mark.parametrize("ledger", [False, True], ids=["no ledger", "ledger"])
@pytest.mark.parametrize("key", ["number", "none"])
def test_a_table_that_knows_neither_key_nor_all_columns(database, key, ledger):
    """As pandas.DataFrame.to_sql() makes it: equal in what it knows, rows differ in the rest."""
    engine = _known_by_less(database, key)
    known = sa.Table("parcels", sa.MetaData(), sa.Column("name", sa.String(20)))
    with closing_all() as ledgers:
        held = ledgers.installed(engine) if ledger else None
        strangers = [rows for table, rows in snapshot(engine).items() if "parcels" in table]
        with CleanupManager(ResourceTracker(engine, ledger=held)) as cleanup:
            with engine.begin() as connection:
                connection.execute(known.insert(), {"name": "a"})
                connection.execute(known.insert(), [{"name": "b"}, {"name": "c"}])
                connection.execute(known.insert().values([{"name": "b"}, {"name": "d"}]))
                names = connection.scalars(known.insert().returning(known.c.name), {"name": "e"})
                assert names.all() == ["e"]
    assert cleanup.report.total_deleted == 6
    left = [rows for table, rows in snapshot(engine).items() if "parcels" in table]
    assert left == strangers


def test_a_table_that_knows_its_key_for_a_column_like_others(database):
    """Rows are found by the key of the database, in its order, and are followed as always."""
    engine = _known_by_less(database, "composite")
    strangers = snapshot(engine)
    known = sa.Table(
        "parcels",
        sa.MetaData(),
        sa.Column("name", sa.String(20)),
        sa.Column("id", sa.Integer, key="number"),
        sa.Column("depot", sa.Integer),
    )
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker):
        with engine.begin() as connection:
            rows = [{"number": n, "depot": 10 + n, "name": "a"} for n in range(4)]
            connection.execute(known.insert(), rows[0])
            connection.execute(known.insert(), rows[1:])
            where = sa.and_(known.c.number == 1, known.c.depot == 11)
            connection.execute(known.delete().where(where))
            where = sa.and_(known.c.number == 2, known.c.depot == 12)
            connection.execute(known.update().where(where).values(number=20))
        assert sorted(row.key for row in tracker.rows()) == [(10, 0), (12, 20), (13, 3)]
    assert snapshot(engine) == strangers


@pytest.mark.parametrize("ledger", [False, True], ids=["no ledger", "ledger"])
def test_table_objects_of_ended_tests_are_forgotten(database, ledger):
    """A suite that makes or reflects its tables in each test makes thousands of them."""
    engine = database.engine(query_cache_size=0)  # SQLAlchemy's own cache would keep 500
    statements: list[str] = []

    def heard(*args: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # not of the ledger's heartbeat
            statements.append(args[2])

    listen(engine, "before_cursor_execute", heard)

    def made(*, key: bool = True) -> sa.Table:
        key_column = sa.Column("id", sa.Integer, primary_key=key, autoincrement=False)
        return sa.Table("parcels", sa.MetaData(), key_column, sa.Column("name", sa.String(20)))

    def one_test(number: int, held: Ledger | None) -> tuple[weakref.ref[sa.Table], int]:
        parcels = made(key=number % 2 == 0)
        statements.clear()
        with CleanupManager(ResourceTracker(engine, ledger=held)) as cleanup:
            with engine.begin() as connection:
                connection.execute(parcels.insert(), [{"id": number}, {"id": -number}])
                connection.execute(parcels.insert(), {"id": 0, "name": "one"})
        assert cleanup.report.total_deleted == 3
        return weakref.ref(parcels), len(statements)

    made().create(engine)
    with closing_all() as ledgers:
        held = ledgers.installed(engine) if ledger else None
        ended = [one_test(number, held) for number in range(1, 27)]
    gc.collect()
    alive = [table for table, _count in ended if table() is not None]
    assert len(alive) <= 8  # the foreign keys of eight MetaData are remembered
    assert len({count for _table, count in ended[10::2]}) == 1
    assert len({count for _table, count in ended[11::2]}) == 1


def test_what_is_known_of_a_table_is_neither_copied_nor_pickled(places):
    """A copy of a Table is another one, and a pickled MetaData is read without tidyrows."""
    places.delete_from(places.home, 1, 2, 3)
    copied = things
    with CleanupManager(ResourceTracker(places.engine)) as cleanup:
        for number in (1, 2, 3):
            with places.engine.begin() as connection:
                connection.execute(sa.insert(copied).values(id=number, name="ours"))
            copied = copied.to_metadata(sa.MetaData())
            assert b"tidyrows." not in pickle.dumps(things)
    assert cleanup.report.total_deleted == 3
    places.bystanders.assert_untouched()
