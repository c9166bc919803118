"""Transactions that end past SQLAlchemy: by a statement that commits, or by the driver itself.

What is tracked afterwards is what the database holds. What nobody can know is in doubt: it is left,
and named. A row that was rolled back is no target, though a stranger has its key by now.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from harness import asynchronous
from harness.databases import Database
from harness.models import Currency
from harness.targets import ALL_DRIVERS
from tidyrows import CleanupError, CleanupManager, ResourceTracker

EVERY_DRIVER = True  # drivers differ here

INSERT, INSERT_MANY, COMMIT, ROLLBACK = "insert", "insert many", "commit", "rollback"
NEST, RELEASE, UNNEST = "begin_nested", "its commit", "its rollback"
DRIVER_COMMIT, DRIVER_ROLLBACK = "driver.commit()", "driver.rollback()"
CURSOR = "cursor: "
"""In front of what the driver's own cursor executes; any other step is a string."""

PROCEDURES = (
    "CREATE PROCEDURE saves() COMMIT",
    "CREATE PROCEDURE undoes() ROLLBACK",
    "CREATE PROCEDURE shows() SELECT 1",
    "CREATE PROCEDURE saves_and_shows() BEGIN COMMIT; SELECT 1; END",
    "CREATE PROCEDURE saves_and_goes_on() BEGIN COMMIT; UPDATE orgs SET name = 'x'; END",
)
MARIADB_SAVES = (
    "ANALYZE TABLE orgs",
    "CHECK TABLE orgs",
    "REPAIR TABLE orgs",
    "FLUSH TABLES",
    "CALL saves()",
    "CALL saves_and_shows()",
    "CALL saves_and_goes_on()",
    "EXECUTE IMMEDIATE 'commit'",
    "/*! commit */",
    "COMMIT AND CHAIN",
    "SET autocommit = 1",
    "CREATE TABLE IF NOT EXISTS made (id INT)",
)
MARIADB_KEEPS = (
    "CREATE TEMPORARY TABLE IF NOT EXISTS made (id INT)",
    "DROP TEMPORARY TABLE IF EXISTS made",
    "SET @x = 1",
    "CALL shows()",
    "HANDLER orgs OPEN",
    "SELECT 1",
)
MARIADB_UNDOES = (
    "CALL undoes()",
    "EXECUTE IMMEDIATE 'rollback'",
    "/*!50000 rollback */",
    "ROLLBACK AND CHAIN",
)
POSTGRESQL_SAVES = ("COMMIT AND CHAIN", "/* why */ COMMIT", "END WORK")
POSTGRESQL_KEEPS = ("CREATE TABLE IF NOT EXISTS made (id INT)", "DO 'BEGIN NULL; END'", "SELECT 1")
POSTGRESQL_UNDOES = ("ROLLBACK AND CHAIN", "/* why */ ROLLBACK", "ABORT")
MARIADB = ("mysql+pymysql", "mysql+mysqldb", "mysql+aiomysql", "mysql+asyncmy")
POSTGRESQL = ("postgresql+psycopg", "postgresql+psycopg2", "postgresql+asyncpg")
TELLING = (
    "sqlite",
    *POSTGRESQL,
    "mysql+pymysql",
    "mysql+aiomysql",
    "mysql+asyncmy",
)
"""Drivers that know whether a transaction is open."""


class Played:
    """A connection that does one step after the other, and the codes that it has inserted."""

    def __init__(self, connection: sa.Connection) -> None:
        self.connection = connection
        self.codes: list[str] = []
        self._nested: list[Any] = []

    def insert(self, count: int) -> None:
        """Rows with keys that anybody may have."""
        first = len(self.codes)
        fresh = [f"{chr(65 + n // 26)}{chr(65 + n % 26)}" for n in range(first, first + count)]
        self.codes += fresh
        rows = [{"code": code, "name": "ours"} for code in fresh]
        self.connection.execute(sa.insert(Currency), rows if count > 1 else rows[0])

    def step(self, step: str) -> None:
        """Do it; a step that fails is one more thing that must not lead astray."""
        try:
            if step in {INSERT, INSERT_MANY}:
                self.insert(1 if step == INSERT else 3)
            elif step in {COMMIT, ROLLBACK}:
                self._nested.clear()
                getattr(self.connection, step)()
            elif step in {NEST, RELEASE, UNNEST}:
                self._nest(step)
            elif step in {DRIVER_COMMIT, DRIVER_ROLLBACK}:
                driver: Any = self.connection.connection
                (driver.commit if step == DRIVER_COMMIT else driver.rollback)()
            elif step.startswith(CURSOR):
                with closing(self.connection.connection.cursor()) as cursor:
                    cursor.execute(step.removeprefix(CURSOR))
            else:
                result = self.connection.exec_driver_sql(step)
                if result.returns_rows:
                    result.all()
        except (sa.exc.SQLAlchemyError, self.connection.dialect.loaded_dbapi.Error):
            self._nested.clear()
            self.connection.rollback()

    def _nest(self, step: str) -> None:
        if step == NEST:
            self._nested.append(self.connection.begin_nested())
        elif self._nested:
            nested = self._nested.pop()
            (nested.commit if step == RELEASE else nested.rollback)()


def codes(engine: sa.Engine) -> dict[str, str]:
    """Whose row each is."""
    with engine.connect() as connection:
        rows = connection.execute(sa.select(Currency.__table__.c["code", "name"]))
        return {code.strip(): name for code, name in rows}


class Game:
    """Do the steps, let strangers take every key that is free, and clean up.

    Attributes:
        tracked: the codes that were tracked at the end of the steps.
        there: the codes that were in the database then.
        left: the codes that the cleanup has named.
    """

    def __init__(self, database: Database, driver: str, steps: Sequence[str]) -> None:
        self._outside = database.engine()
        self._steps = steps
        self.tracked: set[str] = set()
        self.there: set[str] = set()
        self.left: set[str] = set()
        self._taken: set[str] = set()
        if driver in ALL_DRIVERS:
            self._play(database, driver)
        else:
            asynchronous.run(database, driver, self._play_async)
        assert self.tracked <= self.there
        found = codes(self._outside)
        assert {code for code, name in found.items() if name == "theirs"} == self._taken
        assert {code for code, name in found.items() if name == "ours"} <= self.left

    def _play(self, database: Database, driver: str) -> None:
        engine = database.engine()
        if driver != "sqlite":
            engine = sa.create_engine(database.url.set(drivername=driver), poolclass=NullPool)
        tracker = ResourceTracker(engine)
        tracker.start()
        with engine.connect() as connection:
            self._work(connection, tracker)
        tracker.stop()
        try:
            CleanupManager(tracker).cleanup()
        except CleanupError as error:
            self._note(error)

    async def _play_async(self, engine: Any) -> None:
        tracker = ResourceTracker(engine)
        tracker.start()
        async with engine.connect() as connection:
            await connection.run_sync(self._work, tracker)
        tracker.stop()
        try:
            await CleanupManager(tracker).cleanup_async()
        except CleanupError as error:
            self._note(error)

    def _note(self, error: CleanupError) -> None:
        self.left = {each.row.key[0] for each in error.leftovers}

    def _work(self, connection: sa.Connection, tracker: ResourceTracker) -> None:
        played = Played(connection)
        for step in self._steps:
            played.step(step)
        connection.rollback()
        self.there = set(codes(self._outside))
        self.tracked = {row.key[0] for row in tracker.rows() if row.table.name == "currencies"}
        self._taken = {*played.codes} - self.there
        with self._outside.begin() as strangers:
            for code in self._taken:
                strangers.execute(sa.insert(Currency.__table__).values(code=code, name="theirs"))


def over(*drivers: str) -> Callable[[Any], Any]:
    """Run a test with the fixture ``zoo_database`` over these drivers."""
    plain = {"mysql": "mysql+pymysql", "postgresql": "postgresql+psycopg", "sqlite": "sqlite"}
    cases = [(plain[driver.partition("+")[0]], driver) for driver in drivers]
    return pytest.mark.parametrize(
        ("zoo_database", "driver"), cases, indirect=["zoo_database"], ids=drivers
    )


@pytest.fixture
def place(zoo_database):
    """The zoo, with procedures on MariaDB."""
    if zoo_database.backend == "mysql":
        with zoo_database.engine().begin() as connection:
            for procedure in PROCEDURES:
                connection.exec_driver_sql(procedure)
    return zoo_database


@over(*MARIADB)
@pytest.mark.parametrize("sql", MARIADB_SAVES)
def test_a_statement_that_commits_makes_rows_tracked_whatever_follows(place, driver, sql):
    game = Game(place, driver, [INSERT, sql, ROLLBACK])
    assert game.tracked == game.there == {"AA"}
    assert game.left == set()


@over(*MARIADB)
@pytest.mark.parametrize("sql", MARIADB_UNDOES)
def test_a_statement_that_rolls_back_makes_no_row_tracked(place, driver, sql):
    game = Game(place, driver, [INSERT, sql, INSERT, COMMIT])
    assert game.tracked == game.there == {"AB"}


@over(*MARIADB)
@pytest.mark.parametrize("sql", MARIADB_KEEPS)
@pytest.mark.parametrize("end", [COMMIT, ROLLBACK])
def test_a_statement_that_ends_nothing_changes_nothing(place, driver, sql, end):
    game = Game(place, driver, [INSERT, sql, INSERT_MANY, end])
    assert game.tracked == game.there
    assert len(game.there) == (4 if end == COMMIT else 0)
    assert game.left == set()


@over(*POSTGRESQL)
@pytest.mark.parametrize("sql", [*POSTGRESQL_SAVES, *POSTGRESQL_KEEPS, *POSTGRESQL_UNDOES])
@pytest.mark.parametrize("end", [COMMIT, ROLLBACK])
def test_on_postgresql_the_server_tells_what_became_of_a_transaction(place, driver, sql, end):
    game = Game(place, driver, [INSERT, sql, INSERT, end])
    assert game.tracked == game.there
    assert game.left == set()


@over("postgresql+psycopg", "postgresql+psycopg2")
def test_several_statements_in_one_string(place, driver):
    steps = [INSERT, "SELECT 1; COMMIT; BEGIN", INSERT, ROLLBACK]
    steps += [INSERT, "SELECT 1; ROLLBACK; BEGIN", INSERT, COMMIT]
    game = Game(place, driver, steps)
    assert game.tracked == game.there == {"AA", "AD"}
    assert game.left == set()


@over(*TELLING)
@pytest.mark.parametrize("undo", [DRIVER_ROLLBACK, CURSOR + "ROLLBACK"])
@pytest.mark.parametrize("insert", [INSERT, INSERT_MANY])
@pytest.mark.parametrize("then", [[], [INSERT]], ids=["", "then insert"])
def test_rows_that_the_driver_itself_rolled_back_are_no_targets(place, driver, undo, insert, then):
    """They are in doubt: the strangers who have their keys are named, and left."""
    game = Game(place, driver, [insert, undo, *then, COMMIT])
    assert game.tracked == game.there
    assert len(game.there) == len(then)


@over(*TELLING)
@pytest.mark.parametrize("save", [DRIVER_COMMIT, CURSOR + "COMMIT"])
@pytest.mark.parametrize("then", [[], [INSERT]], ids=["", "then insert"])
def test_rows_that_the_driver_itself_committed_are_named(place, driver, save, then):
    """That they were not rolled back nobody knows: they are named, and left."""
    game = Game(place, driver, [INSERT, save, *then, ROLLBACK])
    assert game.left == {"AA"}
    # psycopg2 does not notice a COMMIT by its cursor, and begins no new transaction.
    assert game.tracked == game.there - {"AA"}


SAVEPOINTS = ("SAVEPOINT a", "ROLLBACK TO SAVEPOINT a", "RELEASE SAVEPOINT a")
ENDS = (COMMIT, ROLLBACK, NEST, RELEASE, UNNEST, *SAVEPOINTS, "COMMIT", "ROLLBACK")
STRINGS = {
    "mysql": (*MARIADB_SAVES, *MARIADB_KEEPS, *MARIADB_UNDOES, "OPTIMIZE TABLE orgs", "BEGIN"),
    "postgresql": (*POSTGRESQL_SAVES, *POSTGRESQL_KEEPS, *POSTGRESQL_UNDOES, "not SQL"),
    "sqlite": ("BEGIN", "/* why */ COMMIT", "/* why */ ROLLBACK", "CREATE TABLE made (id INT)"),
}
BY_DRIVER = (DRIVER_COMMIT, DRIVER_ROLLBACK, CURSOR + "COMMIT", CURSOR + "ROLLBACK")


@over(*TELLING, "mysql+mysqldb", "sqlite+aiosqlite")
@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(n, marks=pytest.mark.soak) for n in range(4, 300))]
)
def test_whatever_ends_transactions_what_is_tracked_is_there(place, driver, seed):
    """Statements of all kinds in any order: no stranger's row is harmed, none of ours is silent."""
    drawn = random.Random(f"{driver} {seed}")
    others = (*ENDS, *STRINGS[place.backend])
    if driver != "mysql+mysqldb":  # which does not tell what was done with it past SQLAlchemy
        others += BY_DRIVER
    Game(
        place,
        driver,
        [drawn.choice((INSERT, INSERT_MANY, *[drawn.choice(others)] * 3)) for _ in range(14)],
    )
