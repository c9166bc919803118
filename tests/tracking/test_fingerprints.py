"""What the tracker remembers of inserted rows where keys come back: no value is a false alarm."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import subprocess
import sys
import threading
import tracemalloc
import uuid
from array import array
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from tidyrows import CleanupError, CleanupManager, ResourceTracker
from tidyrows.capture.digests import CELL, Layout, Prints, digest, is_same
from tidyrows.tracking.fingerprints import Fingerprints


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


@pytest.mark.parametrize("form", ["one", "many", "returning", "values", "given keys"])
def test_each_row_has_its_own_looks(sqlite_engine, form):
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
    tracker.settle()
    with sa.create_engine(sqlite_engine.url, poolclass=sa.NullPool).begin() as app:
        keys = app.execute(sa.select(table.c.id).order_by(table.c.name)).scalars().all()
        swapped = {keys[3]: keys[4], keys[4]: keys[3]}
        names = {row.id: row.name for row in app.execute(sa.select(table))}
        for key, other in swapped.items():
            app.execute(sa.update(table).where(table.c.id == key).values(name=names[other]))
    with pytest.raises(CleanupError) as caught:
        CleanupManager(tracker).cleanup()
    assert {left.row.key[0] for left in caught.value.leftovers} == set(swapped)


def test_an_insert_that_does_not_tell_its_values_leaves_the_key_alone(sqlite_engine):
    table = sa.Table(
        "t",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(20)),
    )
    table.create(sqlite_engine)
    cleanup = CleanupManager(ResourceTracker(sqlite_engine))
    with cleanup:
        with sqlite_engine.begin() as connection:
            connection.execute(table.insert().values(name="first"))
            names = sa.select(sa.literal("copied"))
            connection.execute(table.insert().from_select(["name"], names))
        with sa.create_engine(sqlite_engine.url, poolclass=sa.NullPool).begin() as app:
            app.execute(sa.update(table).where(table.c.id == 2).values(name="changed"))
    assert cleanup.report.total_deleted == 2


SCALARS = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.binary(),
    st.from_regex(r"[ +-]?[0-9]{1,22}(\.[0-9]*)?(e[0-9])?", fullmatch=True),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(SCALARS, SCALARS), min_size=1, max_size=80))
def test_any_value_comes_back_with_its_digest(rows):
    """Through a column without a type, as the driver has it; SQLite has no more kinds of values."""
    engine = sa.create_engine("sqlite://", poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (id INTEGER PRIMARY KEY, a, b TEXT)")
        connection.exec_driver_sql("INSERT INTO t (a, b) VALUES (?, ?)", rows)
        back = connection.exec_driver_sql("SELECT a, b FROM t ORDER BY id").all()
    for (a, b), (a_now, b_now) in zip(rows, back, strict=True):
        assert is_same(digest(a), a_now)
        if not isinstance(b, float):  # as text it has fewer digits
            assert is_same(digest(b), b_now)
    layout = Layout(("a", "b"))
    prints = Prints(layout, [([(0, 0), (1, 1)], row) for row in rows], "tag")
    cells = prints.cells()
    assert cells[0::3].tolist() == [digest(a) for a, _b in rows]
    assert cells[1::3].tolist() == [digest(b) for _a, b in rows]


def test_values_of_different_kinds_differ():
    values = [None, 0, 1, 2, -1, 2**40, 0.5, "a", "0", "b", b"c", decimal.Decimal(1)]
    assert len({digest(value) for value in values}) == len(values)
    assert digest(decimal.Decimal(1)) == 0  # what is not compared


def test_a_digest_is_the_same_in_another_process():
    sent = "('a', 'ß', b'x', 5, -5, 2**60, 1.5, True, None)"
    code = f"from tidyrows.capture.digests import digest; print([digest(v) for v in {sent}])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str([digest(v) for v in eval(sent)])


def test_a_row_takes_little_room():
    rows = [(f"name {n}", n) for n in range(100_000)]
    plan = [(0, 0), (1, 1)]
    known = Fingerprints(("name", "number"))
    tracemalloc.start()
    try:
        before, _peak = tracemalloc.get_traced_memory()
        for start in range(0, len(rows), 1000):
            prints = Prints(
                Layout(("name", "number")), [(plan, row) for row in rows[start : start + 1000]], "t"
            )
            known.record(list(range(start, start + 1000)), prints)
        after, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / len(rows) < 30  # 8 for the key, 4 for each column and 4 more


def looks(*rows: tuple[Any, ...]) -> Prints:
    names = ("a", "b")
    return Prints(Layout(names), [([(0, 0), (1, 1)], row) for row in rows], "tag")


def seen(known: Fingerprints, key: Any) -> list[int] | None:
    cells = known.of(key)
    return None if cells is None else cells.tolist()


@pytest.mark.parametrize("keys", [[1, 2, 3], [3, 1, 2], ["x", "y", "z"], [(1, 2), (1, 1), (0, 9)]])
def test_the_latest_word_on_a_key_counts(keys):
    known = Fingerprints(("a", "b"))
    known.record(keys, looks((1, 2), (3, 4), (5, 6)))
    first, second, third = keys
    assert seen(known, first) == [digest(1), digest(2), 0]
    known.record([second], looks((7, "tag")))
    assert seen(known, second) == [digest(7), digest("tag"), 0b10]
    known.change(second, {"b": digest(8)})
    assert seen(known, second) == [digest(7), digest(8), 0]
    known.loosen(["a", "unknown"])
    assert seen(known, first) == [0, digest(2), 0]
    known.rename(first, 99)
    assert seen(known, 99) == [0, digest(2), 0]
    assert seen(known, first) == [0, 0, 0]
    known.drop(third)
    assert seen(known, third) == [0, 0, 0]
    assert seen(known, -1) is None
    assert known.columns([99, -1, second]) == [
        array(CELL, [0, 0, 0]),
        array(CELL, [digest(2), 0, digest(8)]),
        array(CELL, [0, 0, 0]),
    ]
    assert known.compared() == [1]


def test_another_model_of_the_table_may_have_its_columns_in_another_order():
    known = Fingerprints(("b", "c", "a"))
    known.record([1, 2], looks(("tag", 2), (3, "a tag")))
    assert seen(known, 1) == [digest(2), 0, digest("tag"), 0b100]
    assert seen(known, 2) == [digest("a tag"), 0, digest(3), 0b001]


def test_threads_may_note_and_ask_at_once():
    known = Fingerprints(("a", "b"))

    def note(first: int) -> None:
        for n in range(300):
            known.record([first + 7 * n], looks((first + 7 * n, "x")))
            known.of(first)

    threads = [threading.Thread(target=note, args=(first,)) for first in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(seen(known, n) == [digest(n), digest("x"), 0] for n in range(2100))
