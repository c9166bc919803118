"""However a key comes about, the row that has it is tracked, or it is said that it is not."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import uuid
import warnings
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from harness.bystanders import Bystanders, snapshot
from harness.harmony import exactly_ours
from harness.pairs import drivers_in_turn, pairwise
from harness.targets import ALL_DRIVERS, on
from tidyrows import CleanupManager, ResourceTracker, UntrackedRowsWarning

EXECUTIONS: dict[str, Any] = {
    "one": lambda c, t, rows: [c.execute(sa.insert(t).values(row)) for row in rows],
    "parameters": lambda c, t, rows: [c.execute(sa.insert(t), row) for row in rows],
    "inline": lambda c, t, rows: [c.execute(sa.insert(t).values(row).inline()) for row in rows],
    "returning": lambda c, t, rows: [
        c.execute(sa.insert(t).values(row).returning(t.c.name)).all() for row in rows
    ],
    "many": lambda c, t, rows: c.execute(sa.insert(t), rows),
    "many returning": lambda c, t, rows: c.execute(sa.insert(t).returning(t.c.name), rows).all(),
    "several values": lambda c, t, rows: c.execute(sa.insert(t).values(rows)),
}
ROWS = [{"name": f"ours {n}"} for n in range(3)]


class Colour(enum.Enum):
    RED = "r"
    GREEN = "g"
    BLUE = "b"


def numbers_from_the_database(context: Any) -> int:
    """A default that executes SQL of its own on the same connection."""
    table = context.compiled.statement.table
    highest = context.root_connection.scalar(sa.select(sa.func.max(table.c.id)))
    return int(highest or 0) + 10 + hash(context.get_current_parameters()["name"]) % 1


def name(**options: Any) -> sa.Column[Any]:
    return sa.Column("name", sa.String(30), **options)


KEYS: dict[str, Any] = {
    "auto-increment": lambda: [sa.Column("id", sa.Integer, primary_key=True)],
    "identity": lambda: [sa.Column("id", sa.Integer, sa.Identity(start=50), primary_key=True)],
    "big": lambda: [
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True)
    ],
    "sequence": lambda: [
        sa.Column("id", sa.Integer, sa.Sequence("numbers", start=70), primary_key=True)
    ],
    "uuid by Python": lambda: [sa.Column("id", sa.Uuid, primary_key=True, default=uuid.uuid4)],
    "uuid as text": lambda: [
        sa.Column("id", sa.String(36), primary_key=True, default=lambda: str(uuid.uuid4()))
    ],
    "context-sensitive": lambda: [
        sa.Column(
            "id",
            sa.String(40),
            primary_key=True,
            default=lambda context: "of " + context.get_current_parameters()["name"],
        )
    ],
    "another column's key": lambda: [
        sa.Column("id", sa.String(40), primary_key=True, key="identifier", default=_text())
    ],
    "partly generated": lambda: [
        sa.Column("tenant", sa.Integer, primary_key=True, default=7, autoincrement=False),
        sa.Column("id", sa.String(40), primary_key=True, default=_text()),
    ],
    "sentinel": lambda: [
        sa.Column("id", sa.Integer, primary_key=True),
        sa.insert_sentinel("sentinel"),
    ],
}


def _text() -> Any:
    numbers = iter(range(1000))
    return lambda: f"key {next(numbers)}"


@drivers_in_turn("any_driver_engine", kind=tuple(KEYS))
def test_every_way_to_make_a_key_in_every_way_to_execute(any_driver_engine, kind):
    engine = any_driver_engine
    metadata = sa.MetaData()
    table = sa.Table("things", metadata, *KEYS[kind](), name())
    metadata.create_all(engine)
    for how, execute in EXECUTIONS.items():
        with exactly_ours(engine, 3) as connection:
            execute(connection, table, [dict(row) for row in ROWS]), how


MOMENT = dt.datetime(2024, 5, 6, 7, 8, 9, 654321)
ROUNDED: dict[str, tuple[Any, list[Any]]] = {
    "datetime": (sa.DateTime(), [MOMENT, MOMENT.replace(hour=8)]),
    "date of a datetime": (sa.Date(), [MOMENT, MOMENT.replace(day=7)]),
    "time": (sa.Time(), [MOMENT.time(), MOMENT.replace(hour=8).time()]),
    "interval": (sa.Interval(), [dt.timedelta(seconds=1.25), dt.timedelta(seconds=7.25)]),
    "numeric": (sa.Numeric(6, 2), [decimal.Decimal("1.235"), decimal.Decimal("7.339")]),
    "numeric of floats": (sa.Numeric(6, 2, asdecimal=False), [1.236, 7.331]),
    "float": (sa.REAL(), [0.1, 0.7]),
    "double": (sa.Double(), [0.1, 0.7]),
    "padded bytes": (
        sa.LargeBinary().with_variant(sa.BINARY(6), "mysql", "mariadb"),
        [b"ab", b"cd"],
    ),
    "timestamp": (
        sa.DateTime()
        .with_variant(postgresql.TIMESTAMP(precision=0), "postgresql")
        .with_variant(mysql.TIMESTAMP(), "mysql", "mariadb"),
        [MOMENT, MOMENT.replace(hour=8)],
    ),
    "time with a zone": (
        sa.Time().with_variant(postgresql.TIME(timezone=True, precision=0), "postgresql"),
        [MOMENT.time(), MOMENT.replace(hour=8).time()],
    ),
    "interval in seconds": (
        sa.Interval().with_variant(postgresql.INTERVAL(precision=0), "postgresql"),
        [dt.timedelta(seconds=1.25), dt.timedelta(seconds=7.25)],
    ),
    "blanks": (sa.CHAR(6), ["ab ", "cd"]),
}
ORM: dict[str, Any] = {
    "flush": lambda s, m, rows: (s.add_all([m(**row) for row in rows]), s.flush()),
    "flush of one": lambda s, m, rows: [(s.add(m(**row)), s.flush()) for row in rows],
    "bulk": lambda s, m, rows: s.execute(sa.insert(m), rows),
    "bulk returning": lambda s, m, rows: s.execute(sa.insert(m).returning(m.name), rows).all(),
    "bulk objects": lambda s, m, rows: s.scalars(sa.insert(m).returning(m), rows).all(),
}


def _can_be_read(target: str, kind: str, how: str, defaults: bool) -> bool:
    """SQLAlchemy refuses to flush several rows whose keys come back as others.

    Of a REAL in SQLite it reads as many digits as the type says.
    """
    if how in {"bulk returning", "bulk objects"} and target.startswith("sqlite"):
        return not kind.startswith("numeric")
    return how != "flush" or not defaults


@pairwise(
    any_driver_engine=ALL_DRIVERS,
    kind=tuple(ROUNDED),
    how=(*EXECUTIONS, *ORM),
    defaults=[False, True],
    allowed=_can_be_read,
)
def test_a_key_is_tracked_as_the_column_stores_it(any_driver_engine, kind, how, defaults):
    """A column may store less than was sent: no row has the key that Python knows."""
    engine = any_driver_engine
    key, values = ROUNDED[kind]
    registry = orm.registry()
    columns = [sa.Column("id", key, primary_key=True, autoincrement=False), name()]
    if defaults:
        columns.append(sa.Column("made", sa.Integer, server_default=sa.text("5")))
    table = sa.Table("readings", registry.metadata, *columns)
    model = type("Reading", (), {})
    registry.map_imperatively(model, table)
    registry.metadata.create_all(engine)
    rows = [{"id": value, "name": "ours"} for value in values]
    with exactly_ours(engine, 2) as connection:
        if how in ORM:
            with Session(connection) as session:
                ORM[how](session, model, rows)
                session.commit()
        else:
            EXECUTIONS[how](connection, table, rows)


TRIGGERS: dict[str, tuple[str, ...]] = {
    "postgresql": (
        """CREATE FUNCTION move() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN NEW.id := 'stored ' || NEW.id; RETURN NEW; END $$""",
        "CREATE TRIGGER move BEFORE INSERT ON things FOR EACH ROW EXECUTE FUNCTION move()",
    ),
    "mysql": (
        """CREATE TRIGGER move BEFORE INSERT ON things FOR EACH ROW
        SET NEW.id = CONCAT('stored ', NEW.id)""",
    ),
}


@pairwise(
    any_driver_engine=[each for each in ALL_DRIVERS if not each.startswith("sqlite")],
    how=(*EXECUTIONS, *ORM),
    defaults=[False, True],
    late=[False, True],
    allowed=lambda _target, how, defaults, _late: not (how == "flush" and defaults),
)
def test_a_key_that_a_trigger_changes(any_driver_engine, how, defaults, late):
    """Nobody has told the model of it; a row of somebody else has the key that was sent.

    SQLite's triggers cannot change a new row before it is stored.
    """
    engine = any_driver_engine
    registry = orm.registry()
    columns = [sa.Column("id", sa.String(40), primary_key=True), name()]
    if defaults:
        columns.append(sa.Column("made", sa.Integer, server_default=sa.text("5")))
    table = sa.Table("things", registry.metadata, *columns)
    model = type("Thing", (), {})
    registry.map_imperatively(model, table)
    registry.metadata.create_all(engine)
    rows = [{"id": f"ours {number}", "name": "ours"} for number in range(2)]
    with engine.begin() as connection:
        connection.execute(table.insert(), [{**row, "name": "theirs"} for row in rows])
    if late:  # the table is known by then, as one without a trigger
        with exactly_ours(engine, 1) as connection:
            connection.execute(table.insert().values(id="early", name="ours"))
    with engine.begin() as connection:
        for statement in TRIGGERS[engine.dialect.name.replace("mariadb", "mysql")]:
            connection.execute(sa.DDL(statement.replace("%", "%%")))
    with exactly_ours(engine, 2) as connection:
        if how in ORM:
            with Session(connection) as session:
                ORM[how](session, model, rows)
                session.commit()
        else:
            EXECUTIONS[how](connection, table, rows)


@pairwise(any_driver_engine=ALL_DRIVERS, how=tuple(EXECUTIONS), composite=[False, True])
def test_the_caller_sees_the_key_as_it_was_sent(any_driver_engine, how, composite):
    """The stored key is read behind the caller's back."""
    engine = any_driver_engine
    metadata = sa.MetaData()
    columns = [sa.Column("at", sa.DateTime, primary_key=True), name()]
    if composite:
        columns[:0] = [sa.Column("id", sa.Integer, primary_key=True, autoincrement=False)]
    table = sa.Table("readings", metadata, *columns)
    metadata.create_all(engine)
    row = {"at": MOMENT, "name": "ours"} | ({"id": 7} if composite else {})
    told = []

    def insert(connection: sa.Connection) -> None:
        result = EXECUTIONS[how](connection, table, [row])
        result = result[0] if isinstance(result, list) else result
        if isinstance(result, sa.CursorResult):
            one = not result.context.executemany and how != "several values"
            key = tuple(result.inserted_primary_key) if one else None
            told.append((result.returns_rows, key))
        else:
            told.append(result)

    with engine.begin() as connection:
        insert(connection)
        connection.execute(table.delete())
    with exactly_ours(engine, 1) as connection:
        insert(connection)
    without, with_us = told[: len(told) // 2], told[len(told) // 2 :]
    assert with_us == without


@pytest.mark.parametrize("key", ["counted", "computed"])
def test_the_caller_sees_the_key_that_the_database_made(database, key):
    """Also where the stored row is read behind the caller's back, since a trigger may change it."""
    engine = database.engine()
    registry = orm.registry()
    backend = engine.dialect.name.replace("mariadb", "mysql")
    made = {"postgresql": "gen_random_uuid()::text", "mysql": "(uuid())"}.get(
        backend, "(hex(randomblob(9)))"
    )
    column = sa.Column("id", sa.Integer, primary_key=True)
    if key == "computed":
        column = sa.Column("id", sa.String(40), primary_key=True, server_default=sa.text(made))
    table = sa.Table("things", registry.metadata, column, name(unique=True))
    model = type("Thing", (), {})
    registry.map_imperatively(model, table)
    registry.metadata.create_all(engine)
    with engine.begin() as connection:
        for statement in TRIGGERS.get(backend, ()):
            connection.execute(sa.DDL(statement.replace("NEW.id", "NEW.name").replace("%", "%%")))

    def told(connection: sa.Connection) -> dict[str, bool]:
        seen = {}
        inserts = {
            "one": table.insert().values(name="one"),
            "parameters": table.insert(),
            "inline": table.insert().values(name="inline").inline(),
        }
        if backend != "mysql":
            upsert = {"postgresql": postgresql, "sqlite": sqlite}[backend].insert(table)
            inserts["upsert"] = upsert.values(name="upsert").on_conflict_do_nothing()
        for how, insert in inserts.items():
            result = connection.execute(insert, {"name": how} if how == "parameters" else None)
            seen[how] = result.inserted_primary_key[0]
            if key == "counted" and backend != "postgresql":
                seen[f"last {how}"] = result.lastrowid
        with Session(connection) as session:
            session.add(thing := model(name="flush"))
            session.flush()
            seen["flush"] = thing.id
            session.commit()
        names = {row.id: row.name for row in connection.execute(table.select())}
        return {how: names.get(key, "").endswith(how.split()[-1]) for how, key in seen.items()}

    with engine.begin() as connection:
        without = told(connection)
        connection.execute(table.delete())
    assert without["flush"]
    with exactly_ours(engine, sum("last" not in how for how in without)) as connection:
        assert told(connection) == without


@drivers_in_turn("any_driver_engine", how=["one", "parameters", "many", "many returning"])
def test_a_default_that_executes_sql_on_the_same_connection(any_driver_engine, how):
    metadata = sa.MetaData()
    table = sa.Table(
        "things",
        metadata,
        sa.Column(
            "id",
            sa.Integer,
            primary_key=True,
            autoincrement=False,
            default=numbers_from_the_database,
        ),
        name(),
    )
    metadata.create_all(any_driver_engine)
    rows = ROWS[:1] if "many" in how else ROWS  # else all would get the same number
    with exactly_ours(any_driver_engine, len(rows)) as connection:
        EXECUTIONS[how](connection, table, rows)


def _can_be_computed(target: str, kind: str, how: str) -> bool:
    """SQL expressions are no parameters; the trigger is written for PostgreSQL."""
    if kind == "trigger":
        return target.startswith("postgresql")
    return (kind, how) != ("sql value", "many")


@pairwise(
    any_driver_engine=ALL_DRIVERS,
    kind=["server default", "sql default", "sql value", "trigger"],
    how=["one", "many", "several values"],
    allowed=_can_be_computed,
)
def test_keys_that_sql_computes(any_driver_engine, kind, how):
    """MariaDB tells them too, since 10.5 has RETURNING; what is not told must be said."""
    engine = any_driver_engine
    backend = engine.dialect.name
    metadata = sa.MetaData()
    options: dict[str, Any] = {
        "server default": {"server_default": sa.text("('made by the server')")},
        "sql default": {"default": sa.func.concat("made ", "by sql")},
        "sql value": {},
        "trigger": {"server_default": sa.FetchedValue()},
    }[kind]
    if kind == "sql default" and backend == "sqlite":
        options = {"default": sa.literal("made ") + "by sql"}
    table = sa.Table(
        "things", metadata, sa.Column("id", sa.String(40), primary_key=True, **options), name()
    )
    metadata.create_all(engine)
    row: dict[str, Any] = {"name": "ours"}
    if kind == "sql value":
        row["id"] = sa.func.lower("MADE BY SQL")
    if kind == "trigger":
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "CREATE FUNCTION make() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN NEW.id := 'made ' || random(); RETURN NEW; END $$"
            )
            connection.exec_driver_sql(
                "CREATE TRIGGER make BEFORE INSERT ON things FOR EACH ROW EXECUTE FUNCTION make()"
            )
    with exactly_ours(engine, 1) as connection:
        EXECUTIONS[how](connection, table, [row])


@pairwise(
    database=["mysql+pymysql", "mysql+mysqldb"],
    how=tuple(EXECUTIONS),
    keys=[(0, 0), (None, None), (7, 0), (7, None)],
)
def test_zero_and_null_are_generated_on_mariadb(database, how, keys):
    """An explicit auto-increment key 0 becomes a new number; no row of ours has the key 0."""
    engine = database.engine()
    metadata = sa.MetaData()
    table = sa.Table("things", metadata, sa.Column("id", sa.Integer, primary_key=True), name())
    metadata.create_all(engine)
    with engine.begin() as stranger:
        stranger.exec_driver_sql("SET sql_mode = 'NO_AUTO_VALUE_ON_ZERO'")
        stranger.exec_driver_sql("INSERT INTO things VALUES (0, 'theirs')")
    engine.dispose()
    before = snapshot(engine)
    tracker = ResourceTracker(engine)
    rows = [{"id": key, "name": "ours"} for key in keys]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with CleanupManager(tracker):
            with engine.begin() as connection:
                EXECUTIONS[how](connection, table, rows)
            assert 0 not in [row.key[0] for row in tracker.rows()]
            untracked = len(rows) - len(tracker)
    assert bool(untracked) is bool(said)
    if untracked:
        assert "is not tracked" in str(said[0].message)
        with engine.begin() as connection:
            connection.execute(sa.delete(table).where(table.c.name == "ours"))
    assert snapshot(engine) == before


@on("sqlite", "mysql+pymysql")
def test_a_null_among_given_keys_is_generated(engine):
    metadata = sa.MetaData()
    table = sa.Table("things", metadata, sa.Column("id", sa.Integer, primary_key=True), name())
    metadata.create_all(engine)
    with exactly_ours(engine, 3) as connection:
        connection.execute(
            sa.insert(table), [{"id": key, "name": "ours"} for key in (5, None, None)]
        )


VALUES: dict[str, tuple[Any, list[Any]]] = {
    "date": (sa.Date, [dt.date(2020, 1, day) for day in (1, 2, 3)]),
    "datetime": (sa.DateTime, [dt.datetime(2020, 1, day, 12, 30) for day in (1, 2, 3)]),
    "numeric": (sa.Numeric(10, 2), [decimal.Decimal(text) for text in ("1.50", "2", "3.25")]),
    "enum": (sa.Enum(Colour), list(Colour)),
    "bytes": (sa.LargeBinary(20), [b"a", b"\0b", b"\xff"]),
    "boolean": (sa.Boolean(), [True, False]),
    "big integer": (sa.BigInteger, [2**62, -(2**62), 5]),
    "text": (sa.String(20), ["Straße", "it's 100%", 'a "b"']),
    "uuid": (sa.Uuid, [uuid.uuid4() for _ in range(3)]),
    "uuid as text": (sa.Uuid(as_uuid=False), [str(uuid.uuid4()) for _ in range(3)]),
}


@drivers_in_turn("any_driver_engine", kind=tuple(VALUES))
def test_keys_of_every_type_are_tracked_and_cleaned(any_driver_engine, kind):
    type_, values = VALUES[kind]
    if kind == "bytes" and any_driver_engine.dialect.name == "mysql":
        type_ = sa.VARBINARY(20)
    metadata = sa.MetaData()
    table = sa.Table(
        "things",
        metadata,
        sa.Column("key", type_, primary_key=True, autoincrement=False),
        name(),
    )
    metadata.create_all(any_driver_engine)
    rows = [{"key": value, "name": "ours"} for value in values]
    for how in ("one", "many", "many returning"):
        with exactly_ours(any_driver_engine, len(rows)) as connection:
            EXECUTIONS[how](connection, table, rows)


@on("postgresql+psycopg", "postgresql+psycopg2")
def test_a_key_that_no_set_can_hold_is_said_and_the_insert_succeeds(engine):
    metadata = sa.MetaData()
    table = sa.Table(
        "things",
        metadata,
        sa.Column("key", postgresql.ARRAY(sa.Integer), primary_key=True),
        name(),
    )
    metadata.create_all(engine)
    tracker = ResourceTracker(engine)
    with pytest.warns(UntrackedRowsWarning, match="no DELETE can name it"):
        with CleanupManager(tracker), engine.begin() as connection:
            connection.execute(sa.insert(table).values(key=[1, 2], name="ours"))
    with engine.begin() as connection:
        assert connection.execute(sa.delete(table)).rowcount == 1


def test_joined_inheritance_whose_tables_name_their_keys_differently(any_driver_engine):
    class Base(DeclarativeBase):
        pass

    class Base1(Base):
        __tablename__ = "parents"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(sa.String(10))
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "p"}  # noqa: RUF012 -- SQLAlchemy's way

    class Child(Base1):
        __tablename__ = "children"
        parent_id: Mapped[int] = mapped_column(sa.ForeignKey("parents.id"), primary_key=True)
        name: Mapped[str] = mapped_column(sa.String(20))
        __mapper_args__ = {"polymorphic_identity": "c"}  # noqa: RUF012 -- SQLAlchemy's way

    Base.metadata.create_all(any_driver_engine)
    with exactly_ours(any_driver_engine, 8) as connection, Session(connection) as session:
        session.add_all([Child(name="ours"), Child(name="ours too")])
        session.flush()
        session.execute(sa.insert(Child), [{"name": "in bulk"}, {"name": "in bulk too"}])
        session.commit()


@on("sqlite")
def test_tables_whose_constraints_ignore_or_replace(engine):
    """What such a table swallows is not ours, whatever the driver says of its last row id."""
    metadata = sa.MetaData()
    ignoring = sa.Table(
        "ignoring",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("code", sa.String(5), unique=True, sqlite_on_conflict_unique="IGNORE"),
    )
    undeclared = sa.Table(
        "undeclared",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("code", sa.String(5)),
    )
    ignoring.create(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE undeclared (id INTEGER PRIMARY KEY, code TEXT UNIQUE ON CONFLICT IGNORE)"
        )
    bystanders = Bystanders(engine)
    for table in (ignoring, undeclared):
        bystanders.insert(table, {"id": 5, "code": "a"})
        with CleanupManager(ResourceTracker(engine)) as cleanup:
            with engine.begin() as connection:
                connection.execute(sa.insert(table).values(code="b"))
                connection.execute(sa.insert(table).values(code="a"))
                connection.execute(sa.insert(table).values(id=77, code="a"))
        assert cleanup.report.total_deleted == 1
        bystanders.assert_untouched()


@on("sqlite")
@pytest.mark.parametrize("how", ["one", "many", "several values"])
def test_a_trigger_that_swallows_the_row(engine, how):
    metadata = sa.MetaData()
    table = sa.Table("things", metadata, sa.Column("id", sa.Integer, primary_key=True), name())
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER swallow BEFORE INSERT ON things WHEN NEW.name = 'no' "
            "BEGIN SELECT RAISE(IGNORE); END"
        )
    bystanders = Bystanders(engine)
    bystanders.insert(table, {"id": 1, "name": "theirs"})
    with CleanupManager(ResourceTracker(engine)) as cleanup, engine.connect() as connection:
        connection.execute(sa.insert(table).values(name="yes"))
        EXECUTIONS[how](connection, table, [{"name": "no"}])
        connection.commit()
    assert cleanup.report.total_deleted == 1
    bystanders.assert_untouched()


@on("postgresql+psycopg", "postgresql+psycopg2")
@pytest.mark.parametrize("how", ["one", "many", "several values", "many returning"])
def test_a_trigger_that_swallows_a_row_of_many_on_postgresql(engine, how):
    metadata = sa.MetaData()
    table = sa.Table("things", metadata, sa.Column("id", sa.String(9), primary_key=True), name())
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN IF NEW.name = 'no' THEN RETURN NULL; END IF; RETURN NEW; END $$"
        )
        connection.exec_driver_sql(
            "CREATE TRIGGER s BEFORE INSERT ON things FOR EACH ROW EXECUTE FUNCTION swallow()"
        )
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with CleanupManager(tracker):
            with engine.begin() as connection:
                EXECUTIONS[how](
                    connection, table, [{"id": "a", "name": "no"}, {"id": "b", "name": "yes"}]
                )
            bystanders.insert(table, {"id": "a", "name": "theirs"})
            assert ("a",) not in [row.key for row in tracker.rows()]
            tracked = len(tracker)
    assert tracked == 1 or "is not tracked" in str(said[0].message)
    with engine.begin() as connection:
        connection.execute(sa.delete(table).where(table.c.id == "b"))
    bystanders.assert_untouched()


@pytest.mark.parametrize("how", ["pages", "pages returning"])
def test_an_insert_that_is_sent_in_pages_is_tracked_as_a_whole(any_driver_engine, how):
    """SQLAlchemy sends it in pieces, and the driver counts those of the last one."""
    things = sa.Table(
        "things", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), name()
    )
    things.metadata.create_all(any_driver_engine)
    rows = [{"id": 1000 + n, "name": f"ours {n}"} for n in range(1010)]
    paged = any_driver_engine.execution_options(insertmanyvalues_page_size=1)
    insert = sa.insert(things).return_defaults(things.c.id, sort_by_parameter_order=True)
    if how == "pages returning":  # as many pages as Python has frames
        insert = sa.insert(things).returning(things.c.name)
    with CleanupManager(tracker := ResourceTracker(any_driver_engine)):
        with paged.begin() as connection:
            connection.execute(insert, rows)
        assert len(tracker) == len(rows)
    with any_driver_engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(things)) == 0


@on("postgresql+psycopg", "postgresql+psycopg2")
@pytest.mark.parametrize("obstacle", ["right", "rule", "policy"])
@pytest.mark.parametrize("how", ["many", "several values", "inline"])
def test_an_insert_to_which_returning_cannot_be_added_succeeds_and_is_said(engine, obstacle, how):
    """Where its user may insert and not read, it is not the tracker that makes it fail."""
    metadata = sa.MetaData()
    table = sa.Table("things", metadata, sa.Column("id", sa.Integer, primary_key=True), name())
    metadata.create_all(engine)
    role = f"tidy_{uuid.uuid4().hex[:8]}"
    setup = {
        "right": [f"GRANT INSERT ON things TO {role}"],
        "rule": [
            "CREATE TABLE heap (LIKE things)",
            "CREATE RULE r AS ON INSERT TO things DO INSTEAD INSERT INTO heap VALUES (NEW.id, '')",
            f"GRANT ALL ON things, heap TO {role}",
        ],
        "policy": [
            "ALTER TABLE things ENABLE ROW LEVEL SECURITY",
            "CREATE POLICY p ON things FOR INSERT WITH CHECK (true)",
            f"GRANT ALL ON things TO {role}",
        ],
    }[obstacle]
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role}")
        for statement in [*setup, f"GRANT USAGE ON SEQUENCE things_id_seq TO {role}"]:
            connection.exec_driver_sql(statement)
    try:
        with pytest.warns(UntrackedRowsWarning, match="may not read its rows"):
            with CleanupManager(ResourceTracker(engine)) as cleanup, engine.connect() as connection:
                connection.exec_driver_sql(f"SET ROLE {role}")
                EXECUTIONS[how](connection, table, ROWS)
                connection.exec_driver_sql("RESET ROLE")
                connection.commit()
        assert cleanup.report.total_deleted == 0
        assert sum(map(len, snapshot(engine).values())) == 3
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {role}")
            connection.exec_driver_sql(f"DROP ROLE {role}")
