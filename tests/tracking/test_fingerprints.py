"""Hashes of inserted rows, where keys come back: no value that is stored otherwise is an alarm."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import json
import subprocess
import sys
import tracemalloc
import uuid
from array import array
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from tidyrows import CleanupError, CleanupManager, ResourceTracker
from tidyrows.capture.changes import Hashes, Shape
from tidyrows.capture.fingerprints import HASH, NEVER, common_form, row_hashes
from tidyrows.tracking.fingerprints import RowHashes


class Colour(enum.Enum):
    RED = "r"
    GREEN = "g"


class Shouted(sa.types.TypeDecorator[str]):
    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        return value and value.upper()


class Folded(sa.types.UserDefinedType[str]):
    cache_ok = True

    def get_col_spec(self, **_options: Any) -> str:
        return "TEXT"

    def bind_expression(self, bindvalue: sa.BindParameter[str]) -> sa.ColumnElement[str]:
        return sa.func.lower(bindvalue, type_=self)


VALUES: dict[str, tuple[Any, list[Any]]] = {
    "integer": (sa.Integer, [0, 1, -1, 2**31, -(2**63), 2**63 - 1, None]),
    "boolean": (sa.Boolean, [True, False, None]),
    "string": (sa.String(40), ["", "a", "007", "7", "1.0", "1e5", " 5 ", "ß", "a\0b", None]),
    "text": (sa.Text, ["12345678901234567890", "x" * 10_000]),
    "bytes": (sa.LargeBinary, [b"", b"\0\xff", None]),
    "float": (sa.Float, [0.1, 1.0, -0.0, 1e300, 3, None]),
    "numeric": (sa.Numeric(10, 2, asdecimal=False), [1.25, 3, None]),
    "date": (sa.Date, [dt.date(2020, 1, 31), None]),
    "datetime": (sa.DateTime, [dt.datetime(2020, 1, 1, 1, 2, 3, 4), None]),
    "aware": (sa.DateTime(timezone=True), [dt.datetime(2020, 1, 1, tzinfo=dt.UTC)]),
    "time": (sa.Time, [dt.time(1, 2, 3)]),
    "interval": (sa.Interval, [dt.timedelta(days=1, microseconds=1)]),
    "enum": (sa.Enum(Colour), [Colour.RED, None]),
    "uuid": (sa.Uuid, [uuid.UUID(int=7), uuid.uuid4()]),
    "json": (sa.JSON, [{"a": [1, None]}, 5, 1.5, 1.0, "5", "x", [], True]),
    "pickle": (sa.PickleType, [{"a": 1}, [1]]),
    "decorated": (Shouted(20), ["a", None]),
    "wrapped": (Folded(), ["ABC"]),
    "integer as text": (sa.String(40), [5]),
    "text as integer": (sa.Integer, ["5", "12"]),
}


@pytest.mark.filterwarnings("ignore:Dialect sqlite.*Decimal")
@pytest.mark.parametrize(("kind", "values"), VALUES.values(), ids=VALUES)
def test_what_was_inserted_is_recognised(sqlite_engine, kind, values):
    table = sa.Table(
        "t",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("percent %s", kind, key="value"),
        sa.Column("other", sa.String(20), default=lambda: "default"),
    )
    table.create(sqlite_engine)
    rows = [{"value": value} for value in values]
    forms = {
        "one": [(table.insert().values(row),) for row in rows],
        "many": [(table.insert(), rows)],
        "returning": [(table.insert().returning(table.c.value), rows)],
        "values": [(table.insert().values(rows),)],
    }
    for form, calls in forms.items():
        cleanup = CleanupManager(ResourceTracker(sqlite_engine))
        with cleanup, sqlite_engine.begin() as connection:
            for call in calls:
                connection.execute(*call)
        assert cleanup.report.total_deleted == len(values), form


def test_the_hash_of_a_row_waits_for_the_commit_and_a_value_that_changes_meanwhile_is_known_as_sent(
    sqlite_engine, monkeypatch
):
    """Most suites roll back; and a caller may use its buffer again."""
    metadata = sa.MetaData()
    key = sa.Column("id", sa.Integer, primary_key=True)
    names = sa.Table("names", metadata, key, sa.Column("name", sa.String(20)))
    files = sa.Table(
        "files",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("body", sa.LargeBinary),
        sa.Column("note", sa.JSON),
    )
    metadata.create_all(sqlite_engine)
    with CleanupManager(ResourceTracker(sqlite_engine)), sqlite_engine.connect() as connection:
        connection.execute(names.insert().values(name="the first of its kind"))
        with monkeypatch.context() as patch:
            patch.setattr("tidyrows.capture.fingerprints.hash_rows", None)  # an error if called
            connection.execute(names.insert().values(name="a"))
            connection.rollback()
    buffer, note = bytearray(b"one"), [1]
    cleanup = CleanupManager(ResourceTracker(sqlite_engine))
    with cleanup, sqlite_engine.begin() as connection:
        for after in (b"two", b"six"):
            connection.execute(files.insert().values(body=buffer, note=note))
            buffer[:], note[:] = after, [after.decode()]
    assert cleanup.report.total_deleted == 2


@pytest.mark.parametrize("form", ["one", "many", "returning", "values", "given keys"])
def test_each_row_has_its_own_hash(sqlite_engine, form):
    table = sa.Table(
        "t",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(20)),
    )
    table.create(sqlite_engine)
    rows: list[dict[str, Any]] = [{"name": f"name {n}"} for n in range(120)]
    tracker = ResourceTracker(sqlite_engine)
    tracker.start()
    with sqlite_engine.begin() as connection:
        if form == "one":
            for row in rows:
                connection.execute(table.insert().values(row))
        elif form == "returning":
            connection.execute(table.insert().returning(table.c.id), rows)
        elif form == "values":
            connection.execute(table.insert().values(rows))
        else:
            if form == "given keys":
                rows = [row | {"id": 500 - n} for n, row in enumerate(rows)]
            connection.execute(table.insert(), rows)
    tracker.stop()
    tracker.engines.resolve()
    with sa.create_engine(sqlite_engine.url, poolclass=sa.NullPool).begin() as app:
        keys = app.execute(sa.select(table.c.id).order_by(table.c.name)).scalars().all()
        swapped = {keys[3]: keys[4], keys[4]: keys[3]}
        names = {row.id: row.name for row in app.execute(sa.select(table))}
        for key, other in swapped.items():
            app.execute(sa.update(table).where(table.c.id == key).values(name=names[other]))
    with pytest.raises(CleanupError) as caught:
        CleanupManager(tracker).cleanup()
    assert {left.row.key[0] for left in caught.value.leftovers} == set(swapped)


def test_an_insert_that_does_not_tell_its_values_is_read_back(sqlite_engine):
    table = sa.Table(
        "t",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(20)),
    )
    table.create(sqlite_engine)
    cleanup = CleanupManager(ResourceTracker(sqlite_engine))
    with pytest.raises(CleanupError, match=r"main\.t\(2\): identity uncertain"), cleanup:
        with sqlite_engine.begin() as connection:
            connection.execute(table.insert().values(name="first"))
            names = sa.select(sa.literal("copied"))
            connection.execute(table.insert().from_select(["name"], names))
        with sa.create_engine(sqlite_engine.url, poolclass=sa.NullPool).begin() as app:
            app.execute(sa.update(table).where(table.c.id == 2).values(name="changed"))
    assert cleanup.report.total_deleted == 1


SCALARS = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.binary(),
    st.from_regex(r"[ +-]?[0-9]{1,22}(\.[0-9]*)?(e[0-9])?", fullmatch=True),
)


def _has_many_digits(value: Any) -> bool:
    return isinstance(value, str) and sum(map(str.isdigit, value)) > 15


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(SCALARS, SCALARS), min_size=1, max_size=80))
def test_any_value_comes_back_with_its_hash(rows):
    """Through a column of no type, of texts and of numbers: SQLite has no more kinds of values."""
    engine = sa.create_engine("sqlite://", poolclass=sa.NullPool)
    rows = [
        (a, None if isinstance(b, float) else b, None if _has_many_digits(a) else a)
        for a, b in rows  # a float has fewer digits as a text, and a text as a float
    ]
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (id INTEGER PRIMARY KEY, a, b TEXT, c NUMERIC)")
        connection.exec_driver_sql("INSERT INTO t (a, b, c) VALUES (?, ?, ?)", rows)
        back = connection.exec_driver_sql("SELECT a, b, c FROM t ORDER BY id").all()
    shape = Shape(("a", "b"), ("c",))
    sent = row_hashes(shape, list(zip(*rows, strict=True)))
    assert sent == row_hashes(shape, list(zip(*back, strict=True)))
    one_by_one = [row_hashes(shape, [[value] for value in row])[0] for row in rows]
    assert sent.tolist() == one_by_one


def test_values_of_different_kinds_differ():
    values = [None, 0, 1, 2, -1, 2**40, 2**60, 2**60 + 1, 0.5, "", "a", "b", b"", b"c", "-", "1 a"]
    assert len(row_hashes(Shape(("a",)), [values])) == len(set(row_hashes(Shape(("a",)), [values])))
    assert common_form([1, decimal.Decimal(1)]) is None
    assert row_hashes(Shape(("a",)), [[1, decimal.Decimal(1)]]).tolist() == [NEVER, NEVER]


def test_a_hash_is_the_same_in_another_process():
    sent = "[['a', 'ß', b'x', 5, -5, 2**60, 1.5, True, None, '7', '1e5'], list(range(11))]"
    code = (
        "from tidyrows.capture.changes import Shape\n"
        "from tidyrows.capture.fingerprints import row_hashes\n"
        f"print(row_hashes(Shape(('a',), ('b',)), {sent}).tolist())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == row_hashes(Shape(("a",), ("b",)), eval(sent)).tolist()


def test_a_row_takes_little_room():
    shape = Shape(("name", "number"))
    known = RowHashes()
    tracemalloc.start()
    try:
        before, _peak = tracemalloc.get_traced_memory()
        for start in range(0, 100_000, 1000):
            numbers = range(start, start + 1000)
            hashes = row_hashes(shape, [[f"name {n}" for n in numbers], numbers])
            known.record(list(numbers), Hashes(shape, hashes))
        after, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / 100_000 < 20  # 8 for the key and 8 for the hash


ONE, OTHER = Shape(("a",)), Shape(("b",), ("c",))


def known_hashes(known: RowHashes) -> dict[Any, tuple[Shape, int]]:
    return {key: (shape, h) for shape, hashes in known.by_shape() for key, h in hashes.items()}


@pytest.mark.parametrize(
    "keys", [[1, 2, 3], [3, 1, 2], ["x", "y", "z"], [(1, 2), (1, 1), (0, 9)], [1, 2**70, "x"]]
)
def test_the_latest_hash_of_a_key_counts(keys):
    first, second, third = keys
    known = RowHashes()
    known.record(keys, Hashes(ONE, array(HASH, [10, 20, 30])))
    assert known_hashes(known) == {first: (ONE, 10), second: (ONE, 20), third: (ONE, 30)}
    known.record([second], Hashes(OTHER, array(HASH, [21])))
    assert known_hashes(known)[second] == (OTHER, 21)
    known.record([second], Hashes(ONE, array(HASH, [22])))
    assert known_hashes(known)[second] == (ONE, 22)
    known.rename({99: first})
    assert known_hashes(known) == {99: (ONE, 10), second: (ONE, 22), third: (ONE, 30)}
    known.drop([third])
    assert third not in known_hashes(known)
    known.record([third], Hashes(ONE, array(HASH, [31])))
    before = known.copy()
    known.update([second, third], frozenset("bc"), Hashes(OTHER, array(HASH, [23, 32])))
    assert known_hashes(known) == {99: (ONE, 10), second: (ONE, 22), third: (ONE, 31)}
    known.update([second, 77], frozenset("a"), Hashes(OTHER, array(HASH, [24, 25])))
    assert known_hashes(known) == {99: (ONE, 10), second: (OTHER, 24), third: (ONE, 31)}
    known.update([], frozenset("ab"), None)
    assert known_hashes(known) == {99: (ONE, NEVER), second: (OTHER, NEVER), third: (ONE, NEVER)}
    assert known_hashes(before) == {99: (ONE, 10), second: (ONE, 22), third: (ONE, 31)}


def test_keys_that_are_exchanged_take_their_hashes_along():
    known = RowHashes()
    known.record([1, 2], Hashes(ONE, array(HASH, [10, 20])))
    known.rename({1: 2, 2: 1})
    assert known_hashes(known) == {1: (ONE, 20), 2: (ONE, 10)}


def test_hashes_of_an_older_ledger_or_of_a_dropped_column_leave_the_row_uncertain(sqlite_engine):
    table = sa.Table(
        "t",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(20)),
        sa.Column("other", sa.String(20)),
    )
    table.create(sqlite_engine)
    tracker = ResourceTracker(sqlite_engine)
    tracker.start()
    with sqlite_engine.begin() as connection:
        connection.execute(table.insert(), [{"name": "n", "other": "o"}] * 2)
    tracker.stop()
    data = json.loads(tracker.to_json())
    body = data["entries"][0][-1]
    body["looks"] = {"columns": ["name"], "cells": "AAAAAAAAAAAAAAAAAAAAAA=="}  # as version 0.1 had
    older = ResourceTracker.from_json(json.dumps(data), sqlite_engine)
    with pytest.raises(CleanupError, match="identity uncertain: name differs"):
        CleanupManager(older).cleanup()
    sent = tracker.to_json()
    with sqlite_engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE t DROP COLUMN other")
        connection.exec_driver_sql("DELETE FROM t WHERE id = 1")
    reader = ResourceTracker.from_json(sent, sqlite_engine)
    with pytest.raises(CleanupError, match="identity uncertain: one or more of name, o") as caught:
        CleanupManager(reader).cleanup()
    assert [left.row.key for left in caught.value.leftovers] == [(2,)]
    for each in (tracker, older, reader):
        CleanupManager(each, trust_keys=True).cleanup()
