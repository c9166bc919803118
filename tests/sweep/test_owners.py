"""Entries that cannot be read, or that name what is never a target, stop nobody else's sweep."""

from __future__ import annotations

import json
import secrets
import time
from importlib import import_module

import pytest
import sqlalchemy as sa

from harness.ledgers import dead_worker, entries, family, ids, numbered, orphans, sweep
from tidyrows import CleanupError, CleanupManager, Ledger, LedgerError, ResourceTracker

pytestmark = pytest.mark.slow

UNREADABLE = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "no object": "[]",
    "no columns": "{}",
    "numbers for columns": '{"columns": [5], "keys": [[1]]}',
    "a key of two": '{"columns": ["id"], "keys": [[1, 2]]}',
    "no list": '{"columns": ["id"], "keys": 7}',
    "a list for a value": '{"columns": ["id"], "keys": [[[1]]]}',
    "a number for a UUID": '{"columns": ["id"], "keys": [[{"uuid": 5}]]}',
    "a text for a number": '{"columns": ["id"], "keys": [["abc"]]}',
    "a billion rows": '{"columns": ["id"], "ranges": [1, 1000000000]}',
    "a backward range": '{"columns": ["id"], "ranges": [2, 1]}',
    "an odd range": '{"columns": ["id"], "ranges": [1, 2, 3]}',
    "fractions in a range": '{"columns": ["id"], "ranges": [1.0, 2.0]}',
    "a range beyond all columns": f'{{"columns": ["id"], "ranges": [{10**30}, {10**30}]}}',
    "a key beyond all columns": f'{{"columns": ["id"], "keys": [[{10**30}]]}}',
    "text in a range": '{"columns": ["id"], "ranges": ["1", "2"]}',
    "short hashes": json.dumps(
        {
            "columns": ["id"],
            "ranges": [1, 2],
            "looks": {"columns": ["name"], "references": [], "hashes": "AAAAAAAAAAA="},
        }
    ),
}


def write(engine, **values):
    """An entry that tidyrows did not write, of an owner without a process."""
    row = {
        "maker": "00000000000000bd",
        "seq": 1,
        "owner": "00000000000000bd",
        "scope": 1,
        "kind": "rows",
        "schema_name": sa.inspect(engine).default_schema_name,
        "table_name": "parents",
        "run": "bad",
        "worker": "gw6",
        "body": '{"columns": ["id"], "ranges": [1, 2]}',
        "written": 0,
    }
    table = sa.table("tidyrows_ledger", *map(sa.column, row))
    with engine.begin() as connection:
        connection.execute(sa.insert(table), row | values)
    return (row | values)["owner"]


def left(engine, **options):
    """The one owner that a sweep leaves, as text, and the report of the sweep."""
    with pytest.raises(CleanupError) as caught:
        sweep(engine, **options)
    (leftover,) = caught.value.leftovers
    assert str(leftover) in str(caught.value)
    return str(leftover), caught.value.report


@pytest.mark.parametrize("body", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_named_and_everybody_elses_rows_go(database, outside, ledgers, body):
    parents, _children = family(outside)
    with outside.begin() as connection:
        connection.execute(sa.insert(parents), numbered([1, 2], name="stranger"))
    dead_worker(database, ledgers, (parents, numbered([5, 6])), name="gw0")
    owner = write(outside, body=body)
    dead_worker(database, ledgers, (parents, numbered([7])), name="gw1")
    started = time.monotonic()
    (bad,) = [each for each in orphans(outside) if each.unreadable]
    assert bad.owner == owner
    assert owner in str(bad)
    said, report = left(outside)
    assert time.monotonic() - started < 30
    assert report.total_deleted == 3
    assert ids(outside, parents) == [1, 2]
    for word in (owner, "worker gw6 of run bad", "parents", f"forget=['{owner}']"):
        assert word in said
    assert ("too deep" in said) == (body == UNREADABLE["deep"])
    assert [each["owner"] for each in entries(outside)] == [owner]
    report = sweep(outside, forget=[bad.owner])
    assert report.forgotten == {owner: 1}
    assert "1 entries forgotten" in str(report)
    assert ids(outside, parents) == [1, 2]
    assert not entries(outside)
    with pytest.raises(LedgerError, match="no entries of an owner"):
        sweep(outside, forget=owner)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "unheard-of"}, "its kind is unknown"),
        ({"owner": "nobody"}, "No process has such an id"),
        ({"owner": "0x000000000000bd"}, "No process has such an id"),
        (
            {"table_name": "tidyrows_ledger", "body": '{"columns": ["maker", "seq"], "keys": []}'},
            "is a ledger, which is never a target",
        ),
        ({"kind": "external", "body": '{"kind": "x"}'}, "external resource cannot be read"),
        ({"kind": "external", "body": "["}, "external resource cannot be read"),
        (
            {"kind": "external", "body": '{"kind": "x", "payload": 1, "after": [5], "before": []}'},
            "external resource cannot be read",
        ),
    ],
)
def test_what_no_tidyrows_wrote_is_left_where_it_is(database, outside, ledgers, values, said):
    parents, _children = family(outside)
    dead_worker(database, ledgers, (parents, numbered([5])))
    owner = write(outside, **values)
    assert [each.owner for each in orphans(outside) if each.unreadable] == [owner]
    text, report = left(outside)
    assert said in text
    assert report.total_deleted == 1
    assert [each["owner"] for each in entries(outside)] == [owner]


LONG = '{"columns": ["id"], "ranges": [1, 2]}' + " " * 2000


@pytest.mark.parametrize(
    "bound",
    [
        ("sweep.owners", "MOST_ENTRIES", 3, ["{}"] * 4, "It has 4 entries of"),
        ("sweep.owners", "MOST_CHARACTERS", 2000, [LONG], "It has 1 entries of 20"),
        ("ledger.entry_checks", "LONGEST", 2000, [LONG], "its body has more than"),
        ("ledger.entries", "MOST_ROWS", 3, [LONG.rstrip()] * 2, "name more than 3 rows"),
    ],
)
def test_what_one_owner_may_have_written_is_bounded(database, outside, ledgers, monkeypatch, bound):
    module, name, most, bodies, said = bound
    parents, _children = family(outside)
    with outside.begin() as connection:
        connection.execute(sa.insert(parents), numbered([1, 2], name="stranger"))
    dead_worker(database, ledgers, (parents, numbered([5])))
    for number, body in enumerate(bodies, 1):
        owner = write(outside, seq=number, body=body)
    monkeypatch.setattr(import_module(f"tidyrows.{module}"), name, most)
    text, report = left(outside)
    assert said in text
    assert report.total_deleted == 1
    assert {each["owner"] for each in entries(outside)} == {owner}


def test_a_table_that_cannot_be_read_keeps_nobody_elses_rows(database, outside, ledgers):
    if database.backend == "postgresql":
        pytest.skip("PostgreSQL keeps the table of a view")
    parents, _children = family(outside)
    dead_worker(database, ledgers, (parents, numbered([5])))
    with outside.begin() as connection:
        for statement in (
            "CREATE TABLE once (id int)",
            "CREATE VIEW broken AS SELECT * FROM once",
            "DROP TABLE once",
        ):
            connection.exec_driver_sql(statement)
    write(outside, table_name="broken")
    text, report = left(outside)
    assert "Its entries cannot be read" in text
    assert report.total_deleted == 1
    with outside.begin() as connection:
        connection.exec_driver_sql("DROP VIEW broken")


def test_the_catalogue_is_never_a_target(database, outside, ledgers):
    family(outside)
    ledgers.installed(outside)
    place = {
        "postgresql": ("pg_catalog", "pg_description", ["objoid", "classoid", "objsubid"]),
        "mysql": ("mysql", "help_topic", ["help_topic_id"]),
        "sqlite": ("main", "sqlite_master", ["name"]),
    }[database.backend]
    body = json.dumps({"columns": place[2], "keys": [[1] * len(place[2])]})
    write(outside, schema_name=place[0], table_name=place[1], body=body)
    said, _report = left(outside)
    assert "never a target" in said


@pytest.mark.parametrize("how", ["widened", "renamed", "another type"])
def test_a_migration_of_a_key_leaves_the_rows_of_its_old_form(database, outside, ledgers, how):
    parents, children = family(outside)
    dead_worker(database, ledgers, (parents, numbered([1, 2])), name="gw0")
    dead_worker(database, ledgers, (children, numbered([1])), name="gw1")
    children.drop(outside)
    parents.drop(outside)
    columns = {
        "widened": (sa.Column("id", sa.Integer), sa.Column("tenant", sa.Integer)),
        "renamed": (sa.Column("number", sa.Integer),),
        "another type": (sa.Column("id", sa.String(20)),),
    }[how]
    names = [column.name for column in columns]
    new = sa.Table("parents", sa.MetaData(), *columns, sa.PrimaryKeyConstraint(*names))
    new.metadata.create_all(outside)
    row = dict.fromkeys(names, 1 if how != "another type" else "1x")
    with outside.begin() as connection:
        connection.execute(sa.insert(new), [row])
    said, _report = left(outside)
    assert "parents" in said
    assert {
        "widened": "the primary key is (id, tenant) by now, not id",
        "renamed": "the table has no column id any more",
        "another type": "the column id has another type by now",
    }[how] in said
    with outside.connect() as connection:
        assert len(connection.execute(sa.select(new)).all()) == 1


def test_columns_of_a_type_that_sqlalchemy_does_not_know(database, outside, ledgers):
    """A warning of SQLAlchemy's is an error here, and would keep everybody's rows."""
    odd = {"postgresql": "pg_catalog.line", "mysql": "point", "sqlite": "weird"}[database.backend]
    keys = "id integer PRIMARY KEY, odd " + odd
    references = "parent_id integer NOT NULL REFERENCES strange (id)"
    with outside.begin() as connection:
        connection.exec_driver_sql(f"CREATE TABLE strange ({keys})")
        connection.exec_driver_sql(f"CREATE TABLE stranger ({keys}, {references})")
    strange = sa.Table("strange", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    with CleanupManager(ResourceTracker(outside)) as cleanup:
        with outside.begin() as connection:
            connection.execute(sa.insert(strange), numbered([1]))
        with database.engine().begin() as connection:
            connection.exec_driver_sql("INSERT INTO stranger (id, parent_id) VALUES (5, 1)")
    assert cleanup.report.total_deleted == len(cleanup.report.dependents) == 1
    dead_worker(database, ledgers, (strange, numbered([1, 2])))
    assert len(orphans(outside)) == 1
    assert sweep(outside, trust_keys=True).total_deleted == 2


def test_numbers_longer_than_any_integer_are_entered_and_swept(database, outside, ledgers):
    """A sweep enters the rows again as its own, and knows no types of their keys."""
    if database.backend == "sqlite":
        pytest.skip("SQLite has no exact numbers of this length")
    longest = sa.Table(
        "longest", sa.MetaData(), sa.Column("id", sa.Numeric(40, 0), primary_key=True)
    )
    longest.create(outside)
    ledgers.installed(outside)
    with outside.begin() as connection:
        connection.execute(sa.insert(longest), numbered([10**30, 10**30 + 1]))
    write(
        outside,
        table_name="longest",
        body=json.dumps({"columns": ["id"], "keys": [[10**30], [10**30 + 1]]}),
    )
    assert sweep(outside).total_deleted == 2
    assert not ids(outside, longest)


def test_a_key_whose_columns_have_another_order_by_now_names_the_same_row(
    database, outside, ledgers
):
    def pairs(*key):
        return sa.Table(
            "pairs",
            sa.MetaData(),
            sa.Column("a", sa.Integer, autoincrement=False),
            sa.Column("b", sa.Integer, autoincrement=False),
            sa.PrimaryKeyConstraint(*key),
        )

    pairs("b", "a").create(outside)
    with outside.begin() as connection:
        connection.execute(sa.insert(pairs("a", "b")), [{"a": 2, "b": 1}])
    dead_worker(database, ledgers, (pairs("a", "b"), [{"a": 1, "b": 2}]))
    assert sweep(outside, trust_keys=True).total_deleted == 1
    with outside.connect() as connection:
        assert connection.execute(sa.select(pairs("a", "b"))).all() == [(2, 1)]


def test_a_claim_that_cannot_be_read_holds_the_rows_that_it_may_name(database, outside, ledgers):
    parents, children = family(outside, nullable=False)
    ledger = Ledger(outside)
    ledgers.installed(outside)
    write(outside, table_name="children", body="{")
    with CleanupManager(ResourceTracker(outside, ledger=ledger)) as cleanup:
        with outside.begin() as connection:
            connection.execute(sa.insert(parents), numbered([1]))
        with database.engine().begin() as connection:
            connection.execute(sa.insert(children), numbered([1], parent_id=1))
    assert [each.by for each in cleanup.report.held] == ["worker gw6 of run bad"]
    assert ids(outside, children) == [1]
    ledger.close()


@pytest.fixture
def lesser(database):
    """An engine of a role that is no superuser, and may do all with the tables of the database."""
    if database.backend == "sqlite":
        pytest.skip("SQLite has no roles")
    name = f"lesser_{secrets.token_hex(4)}"
    quoted = f"'{name}'@'%'" if database.backend == "mysql" else name
    begin = {
        "mysql": (
            f"CREATE USER {quoted} IDENTIFIED BY 'lesser'",
            f"GRANT ALL ON `{database.url.database}`.* TO {quoted}",
        ),
        "postgresql": (
            f"CREATE ROLE {name} LOGIN PASSWORD 'lesser'",
            f"GRANT ALL ON SCHEMA public TO {name}",
            f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON TABLES TO {name}",
        ),
    }[database.backend]
    end = {
        "mysql": (f"DROP USER {quoted}",),
        "postgresql": (f"DROP OWNED BY {name}", f"DROP ROLE {name}"),
    }[database.backend]
    owner = database.engine()
    with owner.begin() as connection:
        for statement in begin:
            connection.execute(sa.text(statement))
    engine = sa.create_engine(database.url.set(username=name, password="lesser"))
    yield engine
    engine.dispose()
    with owner.begin() as connection:
        for statement in end:
            connection.execute(sa.text(statement))


def test_a_superuser_does_not_carry_out_what_lesser_roles_may_have_written(
    database, lesser, outside, ledgers
):
    """Whoever may INSERT into the ledger could else have any row of the server deleted."""
    parents, _children = family(outside)
    with outside.begin() as connection:
        connection.execute(sa.insert(parents), numbered([1, 2], name="stranger"))
    ledgers.installed(outside)
    assert not sweep(outside).total_deleted  # nothing to sweep is no reason
    write(lesser, schema_name=sa.inspect(outside).default_schema_name)
    with pytest.raises(LedgerError, match="This role is a superuser") as refused:
        sweep(outside)
    assert lesser.url.username in str(refused.value)
    assert ids(outside, parents) == [1, 2]
    assert len(entries(outside)) == 1
    assert len(orphans(outside)) == 1
    assert sweep(lesser, trust_keys=True).total_deleted == 2
    with outside.begin() as connection:
        connection.execute(sa.insert(parents), numbered([1, 2, 3], name="stranger"))
    write(lesser, schema_name=sa.inspect(outside).default_schema_name)
    assert sweep(outside, as_superuser=True).total_deleted == 2
    assert ids(outside, parents) == [3]


def test_control_characters_of_names_are_escaped(database, outside, ledgers, caplog):
    parents, _children = family(outside)
    ugly = "a\x1b[2J\r\n\u202eb"
    context = {"run": ugly + "2", "name": ugly, "test": ugly}
    dead_worker(database, ledgers, (parents, numbered([5])), **context)
    write(outside, run=ugly, worker=ugly, body="{")
    with caplog.at_level("DEBUG", logger="tidyrows"):
        shown = "".join(map(str, orphans(outside)))
        shown += "".join(left(outside)[0].splitlines())
    shown += "".join(caplog.messages)
    assert r"a\x1b[2J\r\n\u202eb" in shown
    assert not any(each in shown for each in "\x1b\r\n\u202e")


@pytest.mark.parametrize("forget", ["", [""], [None]])
def test_a_name_that_names_nobody_is_refused(forget):
    with pytest.raises(ValueError, match="forget="):
        sweep("sqlite://", forget=forget)
