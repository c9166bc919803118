"""Rows travel as JSON, whatever their keys are: one process creates, another cleans."""

from __future__ import annotations

import datetime as dt
import enum
import ipaddress
import json
import math
import sys
import uuid
import zoneinfo
from decimal import Decimal

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import mysql, postgresql, sqlite

from harness import forks
from harness.bystanders import snapshot
from harness.keykinds import Colour, Doubled, Wrapped, keyed
from tidyrows import CleanupManager, ResourceTracker, TidyRowsError, key_json
from tidyrows.capture.changes import Inserted
from tidyrows.key_json import keys_from_json, keys_to_json, row_to_json

pytestmark = pytest.mark.slow


class Size(enum.IntEnum):
    SMALL = 1
    LARGE = 2
    HUGE = 3


class Word(enum.StrEnum):
    ONE = "one"
    TWO = "it's two"
    THREE = 'th"ree\\'


class Text(str):
    __slots__ = ()


class HexBytes(sa.TypeDecorator[bytes]):
    """Its Python value is bytes, the database's is text."""

    impl = sa.String(40)
    cache_ok = True

    def process_bind_param(self, value, dialect):
        return None if value is None else value.hex()

    def process_result_value(self, value, dialect):
        return None if value is None else bytes.fromhex(value)


class TextDate(sa.TypeDecorator[str]):
    """Its Python value is text, the database's is a date."""

    impl = sa.Date
    cache_ok = True

    def process_bind_param(self, value, dialect):
        return None if value is None else dt.date.fromisoformat(value)

    def process_result_value(self, value, dialect):
        return None if value is None else value.isoformat()


class Uuid16(sa.TypeDecorator[uuid.UUID]):
    """A UUID as sixteen bytes."""

    impl = sa.LargeBinary().with_variant(mysql.BINARY(16), "mysql", "mariadb")
    cache_ok = True

    def process_bind_param(self, value, dialect):
        return None if value is None else value.bytes

    def process_result_value(self, value, dialect):
        return None if value is None else uuid.UUID(bytes=bytes(value))


def mysql_or(kind, other):
    return kind.with_variant(other, "mysql", "mariadb")


UTC = dt.UTC
EAST = dt.timezone(dt.timedelta(hours=5, minutes=45))
UUIDS = [uuid.UUID(int=n * 7**40, version=4) for n in (1, 2, 3)]
MOMENTS = [
    dt.datetime(2020, 2, 29, 23, 59, 59, 999999),
    dt.datetime(1970, 1, 1),
    dt.datetime(2038, 1, 1, 0, 0, 0, 1),
]
MOMENTS_6 = mysql_or(sa.DateTime(), mysql.DATETIME(fsp=6))
EXACT = ["sqlite"]  # where Numeric is a float

# kind: (type, a stranger's value and two of ours, backends where the type is no key)
KINDS = {
    "integer": (sa.Integer(), [-1, 0, 2**31 - 1], []),
    "biginteger": (sa.BigInteger(), [-(2**63), 2**63 - 1, 5], []),
    "unsigned": (mysql.BIGINT(unsigned=True), [1, 2**64 - 1, 2**63], ["postgresql", "sqlite"]),
    "big numeric": (sa.Numeric(40, 0), [1, 10**39, -(2**64)], EXACT),
    "numeric": (
        sa.Numeric(38, 10),
        [Decimal("-1.5"), Decimal("1E+2"), Decimal("-1234567890123456789012345678.0123456789")],
        EXACT,
    ),
    "numeric as float": (sa.Numeric(12, 3), [Decimal("-1.5"), Decimal("1E+2"), Decimal(3)], []),
    "no decimals": (sa.Numeric(12, 3, asdecimal=False), [-1.5, 100.0, 0.125], []),
    "float": (sa.Double(), [0.1, -1e-300, 1.7976931348623157e308], []),
    "boolean": (sa.Boolean(), [True, False], []),
    "text": (sa.String(60), ["", "Straße \U0001f600 \x01\x7f\u2028", "a'b\"c\\d{e},%s:f\t\n"], []),
    "text like a number": (sa.String(60), ["1", "01", "1E+2"], []),
    "subclass of text": (sa.String(60), [Text("a"), Text("b"), Text("c")], []),
    "text enum in text": (sa.String(60), [Word.ONE, Word.TWO, Word.THREE], []),
    "int enum in integer": (sa.Integer(), [Size.SMALL, Size.LARGE, Size.HUGE], []),
    "enum by name": (sa.Enum(Colour, name="colour_1"), list(Colour)[1:], []),
    "enum by value": (
        sa.Enum(Colour, name="colour_2", values_callable=lambda kind: [e.value for e in kind]),
        list(Colour)[1:],
        [],
    ),
    "enum in text": (sa.Enum(Colour, native_enum=False), list(Colour)[1:], []),
    "int enum by name": (sa.Enum(Size, name="size_1"), list(Size), []),
    "text enum by name": (sa.Enum(Word, name="word_1"), list(Word), []),
    "words": (sa.Enum("a", "it's", 'q"', name="word_2"), ["a", "it's", 'q"'], []),
    "uuid": (sa.Uuid(), UUIDS, []),
    "uuid in char": (sa.Uuid(native_uuid=False), UUIDS, []),
    "uuid as text": (sa.Uuid(as_uuid=False), [str(each) for each in UUIDS], []),
    "uuid as bytes": (Uuid16(), UUIDS, []),
    "bytes": (
        mysql_or(sa.LargeBinary(), mysql.VARBINARY(20)),
        [b"\x00'\\\xff", b'"%s{}', b""],
        [],
    ),
    "date": (sa.Date(), [dt.date(1970, 1, 1), dt.date(9999, 12, 31), dt.date(1000, 2, 3)], []),
    "datetime": (MOMENTS_6, MOMENTS, []),
    "datetime with zone": (
        sa.DateTime(timezone=True),
        [
            dt.datetime(2020, 1, 1, 1, 2, 3, 4, tzinfo=UTC),
            dt.datetime(2020, 1, 1, 1, 2, 3, 4, tzinfo=EAST),
            dt.datetime(2020, 10, 25, 2, 30, tzinfo=UTC),
        ],
        ["mysql", "sqlite"],  # neither keeps a zone
    ),
    "time": (
        mysql_or(sa.Time(), mysql.TIME(fsp=6)),
        [dt.time(0), dt.time(23, 59, 59, 999999), dt.time(1, 2, 3)],
        [],
    ),
    "time with zone": (
        sa.Time(timezone=True),
        [dt.time(0, tzinfo=UTC), dt.time(1, 2, 3, 4, tzinfo=EAST)],
        ["mysql", "sqlite"],
    ),
    "interval": (
        sa.Interval(second_precision=6),
        [dt.timedelta(0), dt.timedelta(-1, 5, 7), dt.timedelta(40, 86399, 999999)],
        ["mysql"],  # it rounds them
    ),
    "interval in seconds": (
        sa.Interval(),
        [dt.timedelta(0), dt.timedelta(-1, 5), dt.timedelta(40, 86399)],
        [],
    ),
    "inet": (
        postgresql.INET(),
        ["10.0.0.1", "10.0.0.0/8", "fe80::1"],
        ["mysql", "sqlite"],
    ),
    "cidr": (postgresql.CIDR(), ["10.0.0.0/8", "::/0"], ["mysql", "sqlite"]),
    "address": (
        postgresql.INET(),
        [
            ipaddress.ip_address("10.0.0.1"),
            ipaddress.ip_interface("10.0.0.9/8"),
            ipaddress.ip_address("fe80::1"),
        ],
        ["mysql", "sqlite", "postgresql+psycopg2"],  # psycopg2 takes text only
    ),
    "network": (
        postgresql.CIDR(),
        [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::/0")],
        ["mysql", "sqlite", "postgresql+psycopg2"],
    ),
    "mac": (postgresql.MACADDR(), ["08:00:2b:01:02:03", "08:00:2b:01:02:04"], ["mysql", "sqlite"]),
    "doubled": (Doubled(), [1, 2, 3], []),
    "bytes that are text": (HexBytes(), [b"a", b"b\xff", b"\x00"], []),
    "text that is a date": (TextDate(), ["2020-01-01", "2020-01-02"], []),
}
MIXES = {
    "mix": ["uuid", "date", "integer"],
    "mix of enums": ["enum by name", "int enum in integer", "uuid in char"],
    "mix of bytes": ["bytes", "interval in seconds", "text"],
    "mix of numbers": ["biginteger", "float", "boolean"],
    "mix of decorators": ["doubled", "bytes that are text", "datetime"],
}


def kinds_of(target):
    backend = target.partition("+")[0]
    return {
        name: (kind, values)
        for name, (kind, values, absent) in KINDS.items()
        if not {target, backend} & set(absent)
    }


def tables_of(target):
    """A table for each kind of key and each mix, and keys for it: a stranger's, and ours."""
    metadata = sa.MetaData()
    kinds = kinds_of(target)
    tables = {}
    for name, (kind, values) in kinds.items():
        column = sa.Column("k", kind, primary_key=True, autoincrement=False)
        tables[sa.Table(name, metadata, column)] = [(value,) for value in values]
    for name, mixed in MIXES.items():
        columns = [
            sa.Column(f"k{at}", kinds[each][0], primary_key=True, autoincrement=False)
            for at, each in enumerate(mixed)
        ]
        first = [kinds[each][1][0] for each in mixed]
        # each differs from the stranger's in one column, or in all
        rows = [tuple(first), tuple(kinds[each][1][1] for each in mixed)]
        for at, each in enumerate(mixed):
            rows.append((*first[:at], kinds[each][1][1], *first[at + 1 :]))
        tables[sa.Table(name, metadata, *columns)] = rows
    return metadata, tables


def insert(connection, table, keys):
    for key in keys:
        values = dict(zip((column.name for column in table.columns), key, strict=True))
        connection.execute(sa.insert(table), values)


CLEAN = """
import sys, sqlalchemy as sa
from tidyrows import CleanupManager, ResourceTracker
tracker = ResourceTracker.from_json(sys.stdin.read(), sa.create_engine(sys.argv[1]))
text = tracker.to_json()
assert ResourceTracker.from_json(text, tracker.bound_engine).to_json() == text
report = CleanupManager(tracker).cleanup()
assert not report.already_gone, report
print(report.total_deleted)
"""


def cleaned_elsewhere(text, engine):
    """How many rows a process deletes that has nothing but the JSON."""
    done = forks.run(
        [
            sys.executable,
            "-W",
            "error",
            "-c",
            CLEAN,
            engine.url.render_as_string(hide_password=False),
        ],
        text,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def made(engine, tables):
    """A stranger's row in each table, and ours, tracked."""
    with engine.begin() as connection:
        for table, keys in tables.items():
            insert(connection, table, keys[:1])
    before = snapshot(engine)
    tracker = ResourceTracker(engine).start()
    try:
        with engine.begin() as connection:
            for table, keys in tables.items():
                insert(connection, table, keys[1:])
    finally:
        tracker.stop()
    return tracker, before


def target_of(engine):
    return "sqlite" if engine.name == "sqlite" else engine.url.drivername


def test_a_process_without_models_deletes_rows_of_every_kind_of_key(any_driver_engine):
    engine = any_driver_engine
    metadata, tables = tables_of(target_of(engine))
    metadata.create_all(engine)
    tracker, before = made(engine, tables)
    ours = sum(len(keys) - 1 for keys in tables.values())
    assert len(tracker) == ours
    assert cleaned_elsewhere(tracker.to_json(), engine) == ours
    assert snapshot(engine) == before


def test_rows_that_came_by_json_are_found_by_the_models_own_types(any_driver_engine):
    engine = any_driver_engine
    metadata, tables = tables_of(target_of(engine))
    metadata.create_all(engine)
    tracker, _before = made(engine, tables)
    twin = ResourceTracker.from_json(tracker.to_json(), engine)
    with engine.connect() as connection:
        for table in tables:
            if table.name == "big numeric":
                continue  # SQLAlchemy sends an int as BIGINT, whatever the column
            rows = connection.execute(sa.select(table).where(tracker.mine(table))).all()
            again = connection.execute(sa.select(table).where(twin.mine(table))).all()
            assert len(again) == len(tables[table]) - 1, table.name
            assert sorted(again, key=repr) == sorted(rows, key=repr)


class Coloured(str, enum.Enum):  # noqa: UP042 -- it differs from a StrEnum, see below
    """mysqlclient sends 'Coloured.RED', the other drivers 'red'."""

    RED = "red"


class Sized(int, enum.Enum):
    SMALL = 1


class Odd:
    """What its driver may take, and JSON has no word for."""

    def __repr__(self):
        return "a secret"


class Strange(sa.TypeDecorator[str]):
    """A project's own type, which has a secret and may raise anything."""

    impl = sa.String(20)
    cache_ok = True

    def __init__(self, key="a secret"):
        super().__init__()
        self.key = key

    def process_bind_param(self, value, dialect):
        raise OSError("no key store")


class Wrapping(sa.types.UserDefinedType[str]):
    cache_ok = True

    def bind_expression(self, bindvalue):
        return sa.func.upper(bindvalue)


def keyed_by(kind, *more):
    columns = [sa.Column(f"k{at}", each, primary_key=True) for at, each in enumerate((kind, *more))]
    return keyed(sa.create_engine("sqlite://"), sa.Table("things", sa.MetaData(), *columns))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (sa.String(20), Odd()),
        (sa.String(20), "\ud800\udc00"),  # JSON would make one character of the two
        (sa.String(20), Coloured.RED),
        (sa.Integer(), Sized.SMALL),
        (sa.Integer(), Colour.RED),
        (sa.Enum(Colour), 5),
        (sa.Integer(), 1j),
        (sa.Integer(), [1]),
        (sa.Integer(), (1,)),
        (postgresql.INT4RANGE(), postgresql.Range(1, 2)),
        (postgresql.ARRAY(sa.Integer), [1]),
        (postgresql.JSONB(), "a"),
        (Strange(), "x"),
        (Wrapping(), "x"),
        (Wrapped(), "x"),
    ],
)
def test_what_has_no_json_form_is_said_with_its_place_and_without_its_value(kind, value):
    dialect = postgresql.psycopg.dialect() if "postgresql" in type(kind).__module__ else None
    dialect = dialect or sqlite.dialect()
    for table, key in ((keyed_by(kind), value), (keyed_by(sa.Integer, kind), (1, value))):
        column = f"main.things.k{len(table.key_columns) - 1}"
        with pytest.raises(TidyRowsError, match="JSON form") as caught:
            keys_to_json(table, dialect, [key])
        told = str(caught.value)
        assert column in told
        assert type(kind).__name__ in told
        assert "CleanupManager(tracker).cleanup()" in told
        assert "secret" not in told


def test_a_number_of_numpy_is_refused_since_sqlite_keeps_it_as_bytes():
    """In JSON it would be an integer, which may name somebody else's row."""
    numpy = pytest.importorskip("numpy")
    with pytest.raises(TidyRowsError, match=r"type int64 has no JSON form .* main\.things\.k0"):
        keys_to_json(keyed_by(sa.Integer), sqlite.dialect(), [numpy.int64(5)])
    assert keys_to_json(keyed_by(sa.Double), sqlite.dialect(), [numpy.float64(0.5)]) == [[0.5]]


def test_one_row_without_json_form_loses_no_other(sqlite_engine):
    engine = sqlite_engine
    metadata = sa.MetaData()
    plain = sa.Table("plain", metadata, sa.Column("k", sa.Integer, primary_key=True))
    odd = sa.Table("odd", metadata, sa.Column("k", Wrapped, primary_key=True))
    metadata.create_all(engine)
    tracker, before = made(engine, {plain: [(1,), (2,), (3,)], odd: [("a",), ("b",)]})
    with pytest.raises(TidyRowsError, match=r"Wrapped of main\.odd\.k changes its values in SQL"):
        tracker.to_json()
    assert len(tracker) == 3
    assert CleanupManager(tracker).cleanup().total_deleted == 3
    assert snapshot(engine) == before


def test_rows_in_doubt_travel_as_rows_in_doubt(sqlite_engine):
    """Whether they were committed is asked by the process that cleans up."""
    table = sa.Table("plain", sa.MetaData(), sa.Column("k", sa.Integer, primary_key=True))
    table.metadata.create_all(sqlite_engine)
    tracker = ResourceTracker(sqlite_engine)
    held = keyed(sqlite_engine, table)
    tracker.store.mark_uncertain(Inserted(held, [1, 2], generated=True))
    tracker.store.mark_uncertain(Inserted(held, [3]))
    twin = ResourceTracker.from_json(tracker.to_json(), sqlite_engine)
    assert twin.store.uncertain_keys() == tracker.store.uncertain_keys()
    (one,), (other,) = tracker.store.snapshot(), twin.store.snapshot()
    assert other.in_doubt == one.in_doubt == {1: True, 2: True, 3: False}
    assert not len(twin)


def test_whole_rows_are_written_as_they_were_read():
    """No type converts them: they are the driver's values already."""
    columns = sa.Column("a", Doubled), sa.Column("b", sa.Date), sa.Column("c", HexBytes)
    table = keyed(sa.create_engine("sqlite://"), sa.Table("heap", sa.MetaData(), *columns))
    rows = [(2, "2020-01-01", "6161"), (None, None, None), (4, dt.date(2020, 1, 1), b"a")]
    written = json.loads(json.dumps([row_to_json(table, row) for row in rows]))
    assert keys_from_json(written) == rows
    with pytest.raises(TidyRowsError, match=r"type Odd has no JSON form .* main\.heap\.c"):
        row_to_json(table, (1, "", Odd()))


# --- the two functions


ANY = sa.types.NullType()
ZONES = st.sampled_from([None, UTC, EAST, zoneinfo.ZoneInfo("Europe/Berlin")])
VALUES = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.dates(),
    st.datetimes(timezones=ZONES),
    st.times(timezones=st.one_of(st.none(), st.just(UTC), st.just(EAST))),
    st.timedeltas(),
    st.decimals(),
    st.uuids(),
    st.ip_addresses(),
    st.ip_addresses().map(ipaddress.ip_interface),
    st.ip_addresses().map(ipaddress.ip_network),
    st.integers(8, 32).map(lambda n: ipaddress.ip_interface(f"10.1.2.3/{n}")),
    st.sampled_from([*Size, *Word, Text("t")]),
)


def alike(one, other):
    """The same value in the same words; a zone loses its name, not its offset."""
    if isinstance(one, (dt.datetime, dt.time)):
        return one.isoformat() == other.isoformat()
    if isinstance(one, (int, str)) and not isinstance(one, bool):
        return one == other and type(other) in {int, str}
    return repr(one) == repr(other)


@settings(deadline=None, max_examples=60)
@given(keys=st.integers(1, 4).flatmap(lambda n: st.lists(st.tuples(*[VALUES] * n), max_size=5)))
def test_whatever_the_driver_takes_comes_back_from_json(keys):
    if not keys:
        return
    width = len(keys[0])
    table = keyed_by(*[ANY] * width)
    given_keys = [key[0] for key in keys] if width == 1 else keys
    # as strict as a database: no NaN, no number that it would round
    text = json.dumps(keys_to_json(table, sqlite.dialect(), given_keys), allow_nan=False)
    numbers = []
    read = json.loads(text, parse_int=lambda digits: numbers.append(int(digits)) or int(digits))
    assert all(-(2**63) <= number < 2**63 for number in numbers)
    back = keys_from_json(read)
    assert len(back) == len(keys)
    for one, other in zip(keys, back, strict=True):
        cells = (other,) if width == 1 else other
        assert all(map(alike, one, cells)), (one, cells)


def test_no_keys_are_no_entries():
    for table in (keyed_by(sa.Integer), keyed_by(sa.Integer, sa.Date)):
        assert keys_to_json(table, sqlite.dialect(), []) == []
    assert keys_from_json([]) == []


def test_keys_come_from_any_iterable_in_their_order():
    table = keyed_by(sa.Integer)
    assert keys_to_json(table, sqlite.dialect(), (n for n in (3, 1, 2))) == [[3], [1], [2]]
    assert keys_from_json([[3], [1], [2]]) == [3, 1, 2]
    assert keys_from_json([[1, "a"], [2, {"decimal": "1E+2"}]]) == [(1, "a"), (2, Decimal("1E+2"))]


@pytest.mark.parametrize(
    "entries",
    [
        [[{}]],
        [[{"a": "b"}]],
        [[{"uuid": "x"}]],
        [[{"uuid": "x", "date": "y"}]],
        [[[1]]],
        [[1], [1, 2]],
        [1],
        [[{"decimal": "x"}]],
        [[{"address": "x"}]],
        [[{"microseconds": "x"}]],
        [[{"microseconds": "9" * 30}]],
        [[{"float": "x"}]],
        [[{"bytes": 1}]],
    ],
)
def test_what_nobody_wrote_is_no_key(entries, sqlite_engine):
    with pytest.raises((ValueError, TypeError, KeyError, ArithmeticError)):
        keys_from_json(entries)
    data = json.loads(ResourceTracker(sqlite_engine).to_json())
    with sqlite_engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (k INTEGER PRIMARY KEY)")
    data["entries"] = [["rows", "main", "t", {"columns": ["k"], "keys": entries}]]
    with pytest.raises(TidyRowsError, match="not what ResourceTracker"):
        ResourceTracker.from_json(json.dumps(data), sqlite_engine)


def test_an_infinite_float_is_json_that_every_database_takes():
    table = keyed_by(sa.Double)
    written = keys_to_json(table, sqlite.dialect(), [math.inf, -math.inf, math.nan])
    assert written == [[{"float": "inf"}], [{"float": "-inf"}], [{"float": "nan"}]]


def test_a_number_beyond_64_bits_is_text_since_some_databases_round_it():
    table = keyed_by(sa.Numeric(40, 0))
    keys = [2**63 - 1, -(2**63), 2**63, -(2**63) - 1]
    written = keys_to_json(table, postgresql.psycopg.dialect(), keys)
    assert written[:2] == [[2**63 - 1], [-(2**63)]]
    assert written[2:] == [[{"int": str(2**63)}], [{"int": str(-(2**63) - 1)}]]
    assert keys_from_json(written) == keys


def test_integers_are_handed_over_without_a_look_at_each():
    """The usual key, of which there may be a hundred thousand."""

    class Unprocessed(sa.Integer):
        def bind_processor(self, dialect):
            return None

    keys = list(range(1000))
    calls = []

    def trace(frame, event, argument):
        if frame.f_code.co_filename == key_json.__file__:
            calls.append(frame.f_code.co_name)

    for table, given_keys in (
        (keyed_by(Unprocessed), keys),
        (keyed_by(Unprocessed, Unprocessed), [(key, key) for key in keys]),
    ):
        sys.setprofile(trace)
        try:
            written = keys_to_json(table, sqlite.dialect(), given_keys)
            keys_from_json(written)
        finally:
            sys.setprofile(None)
        assert len(written) == 1000
    assert len(calls) < 100
