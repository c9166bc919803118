"""Every way to insert a row, on every database and driver: the row is deleted, or it is said.

The outcomes are those of the guide's table: ``deleted``; ``named``, a warning that names the table;
``said``, a warning without the table, where the database tells only how many rows there are.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from harness.bystanders import Bystanders, snapshot
from harness.factories import OrgFactory
from harness.models import Currency, Group, Org, User
from harness.targets import DRIVERS
from tidyrows import CleanupManager, ResourceTracker, UntrackedRowsWarning

EVERY_DRIVER = True  # drivers differ here

if TYPE_CHECKING:
    from collections.abc import Callable

QUOTED = """INSERT INTO orgs (name) VALUES ("raw")"""
ALL, PG, MARIA, LITE = ("sqlite", "postgresql", "mysql"), ("postgresql",), ("mysql",), ("sqlite",)
ROWS = [{"name": f"way {n}"} for n in range(3)]
ORGS = sa.Table("orgs", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True),
                sa.Column("name", sa.String(40)))  # fmt: skip
RAW = "INSERT INTO orgs (name) VALUES ('raw')"


@dataclass(frozen=True)
class Way:
    name: str
    outcome: str
    insert: Callable[[sa.Engine], Any]
    backends: tuple[str, ...] = ALL
    drivers: tuple[str, ...] = ()  # all
    setup: tuple[str, ...] = ()


def in_session(work: Callable[[Session], Any]) -> Callable[[sa.Engine], Any]:
    def insert(engine: sa.Engine) -> None:
        with Session(engine) as session:
            work(session)
            session.commit()

    return insert


def on_connection(work: Callable[[sa.Connection], Any]) -> Callable[[sa.Engine], Any]:
    def insert(engine: sa.Engine) -> None:
        with engine.begin() as connection:
            work(connection)

    return insert


def raw(*statements: str) -> Callable[[sa.Engine], Any]:
    return on_connection(lambda c: [c.exec_driver_sql(each) for each in statements])


def driver_sql(*statements: str) -> Callable[[sa.Engine], Any]:
    def work(connection: sa.Connection) -> None:
        cursor = connection.connection.cursor()
        for each in statements:
            cursor.execute(each)
        cursor.close()

    return on_connection(work)


def driver_many(connection: sa.Connection) -> None:
    mark = "?" if connection.dialect.paramstyle == "qmark" else "%s"
    cursor = connection.connection.cursor()
    cursor.executemany(f"INSERT INTO orgs (name) VALUES ({mark})", [("a",), ("b",)])
    cursor.close()


def cursor_before_and_after(engine: sa.Engine) -> None:
    """A cursor that is kept while SQLAlchemy inserts, too."""
    with engine.begin() as connection:
        cursor = connection.connection.cursor()
        connection.execute(sa.insert(Group), [{"name": "seen"}, {"name": "seen"}])
        cursor.execute(RAW)
        connection.execute(sa.insert(Group).values(name="seen"))
        cursor.close()


def cursor_after_rollback(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        cursor = connection.connection.cursor()
        cursor.execute(RAW)
        connection.rollback()
        connection.execute(sa.select(1))
        cursor.execute(RAW)
        connection.commit()
        cursor.close()


def cursor_of_the_second_transaction(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        connection.execute(sa.insert(Group).values(name="seen"))
        connection.commit()
        connection.execute(sa.select(1))
        cursor = connection.connection.cursor()
        cursor.execute(RAW)
        cursor.close()
        connection.commit()


def raw_connection(engine: sa.Engine) -> None:
    connection = engine.raw_connection()
    cursor = connection.cursor()
    cursor.execute(RAW)
    cursor.close()
    connection.commit()
    connection.close()


def raw_connection_committed_by_the_driver(engine: sa.Engine) -> None:
    connection = engine.raw_connection()
    driver = connection.driver_connection
    cursor = driver.cursor()
    cursor.execute(RAW)
    cursor.close()
    driver.commit()
    connection.close()


def in_a_script(engine: sa.Engine) -> None:
    connection = engine.raw_connection()
    connection.executescript(f"{RAW}; {RAW};")
    connection.close()


def copy(connection: sa.Connection) -> None:
    cursor = connection.connection.cursor()
    with cursor.copy("COPY orgs (name) FROM STDIN") as lines:
        lines.write_row(("Ulm",))
        lines.write_row(("Bonn",))
    cursor.close()


def copy_expert(connection: sa.Connection) -> None:
    cursor = connection.connection.cursor()
    cursor.copy_expert("COPY orgs (name) FROM STDIN", io.StringIO("Ulm\nBonn\n"))
    cursor.close()


def execute_values(connection: sa.Connection) -> None:
    cursor = connection.connection.cursor()
    pytest.importorskip("psycopg2.extras").execute_values(
        cursor, "INSERT INTO orgs (name) VALUES %s", [("Ulm",), ("Bonn",)]
    )
    cursor.close()


def autocommit(engine: sa.Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.insert(Org).values(name="ours"))


def savepoint(session: Session) -> None:
    with session.begin_nested():
        session.add(Org(name="kept"))
    with session.begin_nested() as undone:
        session.add(Org(name="undone"))
        session.flush()
        undone.rollback()


def from_select(connection: sa.Connection) -> None:
    names = sa.select(sa.literal("from select"))
    connection.execute(sa.insert(Org).from_select(["name"], names))


def on_flush(session: Session) -> None:
    @sa.event.listens_for(session, "after_flush", once=True)
    def more(session: Session, _context: Any) -> None:
        session.execute(sa.insert(Org).values(name="by a listener"))

    session.add(Group(name="ours"))


def on_commit(engine: sa.Engine) -> None:
    """By a listener that comes after tidyrows' own."""

    def late(connection: sa.Connection) -> None:
        connection.execute(sa.insert(Org).values(name="late"))

    sa.event.listen(engine, "commit", late)
    try:
        with engine.begin() as connection:
            connection.execute(sa.insert(Org).values(name="first"))
        with Session(engine) as session:
            session.add(Org(name="again"))
            session.commit()
    finally:
        sa.event.remove(engine, "commit", late)


def found_by_a_savepoint(engine: sa.Engine, *, past: bool = True) -> None:
    """What was rolled back has been counted by the database, and is no row."""
    with Session(engine) as session:
        session.add(Currency(code="AAA", name="ours"))
        session.flush()
        if past:
            cursor = session.connection().connection.cursor()
            cursor.execute("SELECT 1")
            cursor.fetchall()
            cursor.close()
        else:
            session.execute(sa.text("SELECT soundex('a')" if MARIA[0] == engine.dialect.name
                                    else "SELECT quote_literal('a')"))  # fmt: skip
        for code in ("AAA", "BBB"):
            with contextlib.suppress(sa.exc.IntegrityError), session.begin_nested() as undone:
                session.execute(sa.insert(Currency), [{"code": code, "name": "again"}])
                session.execute(sa.insert(Org), ROWS)
                undone.rollback()
        session.add(Org(name="ours"))
        session.commit()


FUNCTION = {
    "postgresql": (
        "CREATE FUNCTION way() RETURNS int LANGUAGE sql AS "
        "$$ INSERT INTO orgs (name) VALUES ('f') RETURNING id $$"
    ),
    "mysql": (
        "CREATE FUNCTION way() RETURNS int MODIFIES SQL DATA "
        "BEGIN INSERT INTO orgs (name) VALUES ('f'); RETURN 1; END"
    ),
}
PROCEDURE = {
    "postgresql": f"CREATE PROCEDURE way() LANGUAGE sql AS $$ {RAW} $$",
    "mysql": f"CREATE PROCEDURE way() {RAW}",
}
WITH = "WITH w AS (INSERT INTO orgs (name) VALUES ('w') RETURNING id) SELECT * FROM w"
MERGE = (
    "MERGE INTO orgs USING (SELECT 1) AS s ON false "
    "WHEN NOT MATCHED THEN INSERT (name) VALUES ('merged')"
)

WAYS = [
    # through the ORM
    Way("add", "deleted", in_session(lambda s: s.add(Org(name="a")))),
    Way("add_all", "deleted", in_session(lambda s: s.add_all([Org(**row) for row in ROWS]))),
    Way("cascade", "deleted", in_session(
        lambda s: s.add(User(email="way@example.test", org=Org(name="a"))))),
    Way("association table", "deleted", in_session(lambda s: s.add(
        User(email="way@example.test", org=Org(name="a"), groups=[Group(name="g")])))),
    Way("merge", "deleted", in_session(lambda s: s.merge(Org(name="a")))),
    Way("bulk_save_objects", "deleted", in_session(
        lambda s: s.bulk_save_objects([Org(**row) for row in ROWS]))),
    Way("bulk_insert_mappings", "deleted", in_session(
        lambda s: s.bulk_insert_mappings(sa.inspect(Org), ROWS))),
    Way("ORM bulk insert", "deleted", in_session(lambda s: s.execute(sa.insert(Org), ROWS))),
    Way("a savepoint", "deleted", in_session(savepoint)),
    Way("a flush listener", "deleted", in_session(on_flush)),
    Way("a commit listener", "deleted", on_commit),
    Way("a factory", "deleted", lambda _engine: OrgFactory.create_batch(2)),
    # through Core
    Way("insert", "deleted", on_connection(lambda c: c.execute(sa.insert(Org).values(name="a")))),
    Way("insert of another Table", "deleted", on_connection(
        lambda c: c.execute(sa.insert(ORGS).values(name="a")))),
    Way("executemany", "deleted", on_connection(lambda c: c.execute(sa.insert(Org), ROWS))),
    Way("multiple values", "deleted", on_connection(
        lambda c: c.execute(sa.insert(Org).values(ROWS)))),
    Way("returning", "deleted", on_connection(
        lambda c: c.execute(sa.insert(Org).returning(Org.name), ROWS).all())),
    Way("insert from select", "deleted", on_connection(from_select)),
    Way("AUTOCOMMIT", "deleted", autocommit),
    # raw SQL
    Way("text", "named", on_connection(lambda c: c.execute(sa.text(RAW)))),
    Way("text, executemany", "named", on_connection(
        lambda c: c.execute(sa.text("INSERT INTO orgs (name) VALUES (:name)"), ROWS))),
    Way("exec_driver_sql", "named", raw(RAW)),
    Way("raw insert from select", "named", raw("INSERT INTO orgs (name) SELECT 'a'")),
    Way("INSERT behind a comment", "named", raw(f"/* a */ {RAW}")),
    Way("REPLACE INTO", "named", raw("REPLACE INTO orgs (name) VALUES ('a')"), MARIA + LITE),
    Way("REPLACE", "named", raw("REPLACE orgs (name) VALUES ('a')"), MARIA),
    Way("INSERT OR IGNORE", "named", raw("INSERT OR IGNORE INTO orgs (name) VALUES ('a')"), LITE),
    Way("INSERT IGNORE", "named", raw("INSERT IGNORE orgs (name) VALUES ('a')"), MARIA),
    Way("raw INSERT in a WITH", "named", raw(WITH), PG),
    Way("INSERT in the WITH of a select", "named", on_connection(lambda c: c.execute(
        sa.select(sa.insert(Org).values(name="w").returning(Org.id).cte()))), PG),
    Way("MERGE", "named", raw(MERGE), PG),
    Way("EXPLAIN ANALYZE INSERT", "named", raw(f"EXPLAIN ANALYZE {RAW}"), PG),
    Way("ANALYZE INSERT", "named", raw(f"ANALYZE {RAW}"), MARIA),
    Way("SELECT 1; INSERT", "named", raw(f"SELECT 1; {RAW}"), PG),
    Way("SET STATEMENT FOR INSERT", "named", raw(
        f"SET STATEMENT max_statement_time = 9 FOR {RAW}"), MARIA),
    Way("a compound statement", "named", raw(f"BEGIN NOT ATOMIC {RAW}; END"), MARIA),
    Way("DO", "named", raw(f"DO $$ BEGIN {RAW}; END $$"), PG),
    Way("EXECUTE IMMEDIATE", "named", raw(f"EXECUTE IMMEDIATE '{QUOTED}'"), MARIA),
    Way("COPY FROM PROGRAM", "named", raw("COPY orgs (name) FROM PROGRAM 'echo a'"), PG),
    # code of the database
    Way("EXECUTE, PostgreSQL", "named", raw(f"PREPARE way AS {RAW}", "EXECUTE way"), PG),
    Way("EXECUTE, MariaDB", "said", raw(
        f"PREPARE way FROM '{QUOTED}'", "EXECUTE way"), MARIA),
    Way("CALL, PostgreSQL", "named", raw("CALL way()"), PG, setup=(PROCEDURE["postgresql"],)),
    Way("CALL, MariaDB", "said", raw("CALL way()"), MARIA, setup=(PROCEDURE["mysql"],)),
    Way("a function in raw SQL, PostgreSQL", "named", raw("SELECT way()"), PG,
        setup=(FUNCTION["postgresql"],)),
    Way("a function in raw SQL, MariaDB", "said", raw("SELECT way()"), MARIA,
        setup=(FUNCTION["mysql"],)),
    Way("a function in select(), PostgreSQL", "named", in_session(
        lambda s: s.scalar(sa.select(sa.func.way()))), PG, setup=(FUNCTION["postgresql"],)),
    Way("a function in select(), MariaDB", "said", in_session(
        lambda s: s.scalar(sa.select(sa.func.way()))), MARIA, setup=(FUNCTION["mysql"],)),
    # past SQLAlchemy
    Way("a cursor that only reads, and savepoints", "deleted", found_by_a_savepoint),
    Way("a function that only reads, and savepoints", "deleted",
        functools.partial(found_by_a_savepoint, past=False), PG + MARIA),
    Way("the driver's cursor, PostgreSQL", "named", driver_sql(RAW), PG),
    Way("the driver's cursor", "said", driver_sql(RAW), MARIA + LITE),
    Way("the driver's executemany, PostgreSQL", "named", on_connection(driver_many), PG),
    Way("the driver's executemany", "said", on_connection(driver_many), MARIA + LITE),
    Way("a cursor that is kept, PostgreSQL", "named", cursor_before_and_after, PG),
    Way("a cursor that is kept", "said", cursor_before_and_after, MARIA + LITE),
    Way("a cursor after a rollback, PostgreSQL", "named", cursor_after_rollback, PG),
    Way("a cursor after a rollback", "said", cursor_after_rollback, MARIA + LITE),
    Way("a cursor later, PostgreSQL", "named", cursor_of_the_second_transaction, PG),
    Way("a cursor later", "said", cursor_of_the_second_transaction, MARIA + LITE),
    Way("raw_connection, PostgreSQL", "named", raw_connection, PG),
    Way("raw_connection", "said", raw_connection, MARIA + LITE),
    Way("a COMMIT of the driver, PostgreSQL", "named", raw_connection_committed_by_the_driver, PG),
    Way("a COMMIT of the driver", "said", raw_connection_committed_by_the_driver, MARIA + LITE),
    Way("a script", "said", in_a_script, LITE),
    Way("the connection's execute, SQLite", "said", on_connection(
        lambda c: c.connection.execute(RAW).close()), LITE),
    Way("the connection's execute, psycopg", "named", on_connection(
        lambda c: c.connection.execute(RAW)), PG, ("postgresql+psycopg",)),
    Way("the connection's query", "said", on_connection(
        lambda c: c.connection.query(RAW)), MARIA, ("mysql+pymysql",)),
    Way("COPY of psycopg", "named", on_connection(copy), PG, ("postgresql+psycopg",)),
    Way("COPY of psycopg2", "named", on_connection(copy_expert), PG, ("postgresql+psycopg2",)),
    Way("execute_values of psycopg2", "named", on_connection(execute_values), PG,
        ("postgresql+psycopg2",)),
]  # fmt: skip  # one way per line, as far as it goes

CASES = [
    pytest.param(driver, way, id=f"{way.name}-{driver}")
    for way in WAYS
    for backend in way.backends
    for driver in DRIVERS[backend]
    if not way.drivers or driver in way.drivers
]


def added(engine: sa.Engine, before: Any) -> dict[str, int]:
    rows = snapshot(engine).added_since(before)
    return {name.rpartition(".")[2]: len(each) for name, each in rows.items() if each}


def check(outcome: str, told: list[str], left: dict[str, int]) -> None:
    if outcome == "deleted":
        assert (told, left) == ([], {})
    elif outcome == "named":
        assert left.keys() == {"orgs"}
        assert all("orgs" in each for each in told)
        assert told
    else:
        assert left.keys() == {"orgs"}
        assert [each.partition(" ")[0] for each in told] == [str(left["orgs"])]


def warned(caught: list[warnings.WarningMessage]) -> list[str]:
    assert all(issubclass(each.category, UntrackedRowsWarning) for each in caught)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("any_driver_zoo_engine", "way"), CASES, indirect=["any_driver_zoo_engine"]
)
def test_a_row_is_deleted_or_said(any_driver_zoo_engine, way):
    engine = any_driver_zoo_engine
    with engine.begin() as connection:
        for each in way.setup:
            connection.exec_driver_sql(each)
    try:
        strangers = Bystanders(engine)
        strangers.insert(Org, {"name": "theirs"})
        before = snapshot(engine)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with CleanupManager(ResourceTracker(engine)):
                way.insert(engine)
        check(way.outcome, warned(caught), added(engine, before))
    finally:
        with engine.begin() as connection:
            for each in way.setup:
                kind = each.split()[1]
                connection.exec_driver_sql(f"DROP {kind} way")
