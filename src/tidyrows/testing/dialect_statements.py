"""The dialect suite's tables, and its tests of statements."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from tidyrows.dialects import CycleForm, database_name, dialect_for
from tidyrows.keys import KeyedTable, TableName

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tidyrows.dialects import Dialect

METADATA = sa.MetaData()


def _table(name: str, *columns: sa.Column[Any]) -> sa.Table:
    return sa.Table(f"tidyrows_suite_{name}", METADATA, *columns)


def _number(name: str = "id") -> sa.Column[Any]:
    return sa.Column(name, sa.Integer, primary_key=True, autoincrement=False)


def _text(name: str = "name", **options: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.String(40), **options)


PARENTS = _table("parents", _number(), _text(index=True))
_parent: sa.Column[Any] = sa.Column("parent_id", sa.ForeignKey(PARENTS.c.id), index=True)
CHILDREN = _table("children", _number(), _parent)
TEXTS = _table("texts", _text("key", primary_key=True))
PAIRS = _table("pairs", _number("left"), _text("right", primary_key=True))
GENERATED = _table("generated", sa.Column("id", sa.Integer, primary_key=True), _text())
KEYLESS = _table("keyless", sa.Column("number", sa.Integer), _text())
_later = sa.ForeignKey("tidyrows_suite_right.id", name="tidyrows_suite_left_right", use_alter=True)
LEFT = _table("left", _number(), sa.Column("right_id", _later))
RIGHT = _table("right", _number(), sa.Column("left_id", sa.ForeignKey(LEFT.c.id)))
_ODD_TEXTS = ("", "a", "it's", 'say "so"', "50%", "%s", ":name", "back\\slash", "é", "鍵")


class SuiteTables:
    """The suite's tables on one engine."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self.dialect = dialect_for(engine)
        with engine.connect() as connection:
            real = self.dialect.resolve(connection, None, PARENTS.name)
        self.schema = "" if real is None else real.schema

    def real(self, table: sa.Table, *by: str) -> KeyedTable:
        """The real table, looked at by its primary key or by these columns."""
        key = by or tuple(table.primary_key.columns.keys())
        columns = (sa.Column(c.name, c.type, primary_key=c.name in key) for c in table.columns)
        table = sa.Table(table.name, sa.MetaData(), *columns)
        return KeyedTable(TableName(database_name(self.engine), self.schema, table.name), table)

    def insert(self, table: sa.Table, rows: Sequence[tuple[Any, ...]]) -> None:
        """Commit rows, with values in the order of the columns, or of the last ones."""
        names = [column.name for column in table.columns]
        with self.engine.begin() as connection:
            dicts = [dict(zip(names[-len(row) :], row, strict=True)) for row in rows]
            connection.execute(table.insert(), dicts)

    def keys(self, table: sa.Table) -> list[Any]:
        """The keys in the table, sorted; tuples where the key has several columns."""
        columns = list(table.primary_key)
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(*columns)).all()
        return sorted(tuple(row) if len(columns) > 1 else row[0] for row in rows)

    def delete(self, table: sa.Table, keys: Sequence[Any], lock_timeout: float = 5) -> int:
        """Delete rows in a cleanup of its own; how many."""
        with self.cleanup(lock_timeout) as connection:
            return self.dialect.delete_by_keys(connection, self.real(table), keys)

    @contextmanager
    def cleanup(self, lock_timeout: float = 5) -> Iterator[sa.Connection]:
        """A transaction of the cleanup: committed at the end, rolled back after an error."""
        with self.engine.connect() as connection:
            try:
                self.dialect.begin_cleanup(connection, lock_timeout=lock_timeout)
                yield connection
                connection.commit()
            except BaseException:
                with suppress(sa.exc.DBAPIError):
                    connection.rollback()
                raise
            finally:
                self.dialect.end_cleanup(connection)


class StatementTests:
    """What every dialect promises of its statements; a part of the suite."""

    @pytest.fixture
    def engine(self) -> Iterator[sa.Engine]:
        """Override it: an engine whose role may create and drop tables."""
        raise NotImplementedError("override the fixture `engine`")

    @pytest.fixture
    def dialect(self, engine: sa.Engine) -> Dialect:
        """What tidyrows knows of the engine's database."""
        return dialect_for(engine)

    @pytest.fixture
    def tables(self, engine: sa.Engine) -> Iterator[SuiteTables]:
        """The suite's tables, empty, on that engine."""
        METADATA.drop_all(engine)
        METADATA.create_all(engine)
        try:
            yield SuiteTables(engine)
        finally:
            METADATA.drop_all(engine)

    # ----- inserts

    def test_returning_gives_the_generated_key(self, tables: SuiteTables, dialect: Dialect) -> None:
        with tables.engine.begin() as connection:
            insert = GENERATED.insert().values({"name": "a"})
            assert not dialect.upsert(insert)
            if dialect.returning:
                key = connection.execute(insert.returning(GENERATED.c.id)).scalar_one()
            else:
                (key,) = tuple(connection.execute(insert).inserted_primary_key or ())
        assert tables.keys(GENERATED) == [key]

    def test_reuse_of_a_generated_key_is_known(self, tables: SuiteTables, dialect: Dialect) -> None:
        """``reuses_keys`` False promises that a number never comes again."""
        tables.insert(GENERATED, [("a",)])
        (key,) = tables.keys(GENERATED)
        tables.delete(GENERATED, [key])
        tables.insert(GENERATED, [("b",)])
        if tables.keys(GENERATED) == [key]:
            assert dialect.reuses_keys
            with tables.engine.connect() as connection:
                assert dialect.may_reuse_key(connection, tables.real(GENERATED), key)

    # ----- statements

    @pytest.mark.parametrize("count", [1, 3, 250, 1300])
    @pytest.mark.parametrize("step", [1, 7])
    def test_integer_keys_go_and_no_others(
        self, tables: SuiteTables, count: int, step: int
    ) -> None:
        """Runs without a gap, and keys with other rows between them."""
        ours = list(range(10, 10 + count * step, step))
        others = [1, 9, ours[-1] + 1, *(key + 1 for key in ours[:-1] if step > 1)]
        tables.insert(PARENTS, [(key, "a") for key in (*ours, *others)])
        self._delete(tables, PARENTS, ours, absent=[10**9])
        assert tables.keys(PARENTS) == sorted(others)

    @pytest.mark.parametrize("count", [1, 700])
    def test_text_keys_go_and_no_others(self, tables: SuiteTables, count: int) -> None:
        ours = sorted({f"key {number}" for number in range(count)} | set(_ODD_TEXTS))
        tables.insert(TEXTS, [(key,) for key in (*ours, "other", "key")])
        self._delete(tables, TEXTS, ours, absent=["absent"])
        assert sorted(tables.keys(TEXTS)) == ["key", "other"]

    @pytest.mark.parametrize("count", [1, 400])
    def test_composite_keys_go_and_no_others(self, tables: SuiteTables, count: int) -> None:
        """A row whose columns are both among the keys, in another combination, is another row."""
        ours = [(number, text) for number in range(count) for text in ("a", "it's")]
        others = [(0, "b"), (count, "a")]
        tables.insert(PAIRS, [*ours, *others])
        self._delete(tables, PAIRS, ours, absent=[(0, "c")])
        assert tables.keys(PAIRS) == others

    def _delete(
        self, tables: SuiteTables, table: sa.Table, ours: Sequence[Any], *, absent: Sequence[Any]
    ) -> None:
        dialect, real, asked = tables.dialect, tables.real(table), sorted([*ours, *absent])
        with tables.cleanup() as connection:
            assert list(dialect.existing_keys(connection, real, asked)) == sorted(ours)
            dialect.lock(connection, real, asked)
            assert dialect.delete_by_keys(connection, real, asked) == len(ours)
            assert dialect.existing_keys(connection, real, asked) == []
            assert dialect.delete_by_keys(connection, real, asked) == 0

    def test_a_locked_row_waits_for_the_lock(self, tables: SuiteTables, dialect: Dialect) -> None:
        tables.insert(PARENTS, [(1, "a")])
        with tables.cleanup() as holder:
            dialect.lock(holder, tables.real(PARENTS), [1])
            with pytest.raises(sa.exc.DBAPIError):
                tables.delete(PARENTS, [1], lock_timeout=1)

    def test_a_locked_parent_gets_no_new_children(self, tables: SuiteTables) -> None:
        """Else a CASCADE deletes a child that was committed after the look for dependents."""
        tables.insert(PARENTS, [(1, "a")])
        with tables.cleanup() as holder:
            tables.dialect.lock(holder, tables.real(PARENTS), [1])
            with pytest.raises(sa.exc.DBAPIError), tables.cleanup(1) as connection:
                connection.execute(CHILDREN.insert(), [{"id": 1, "parent_id": 1}])

    def test_rows_are_found_by_any_column(self, tables: SuiteTables, dialect: Dialect) -> None:
        tables.insert(PARENTS, [(number, "ab"[number % 2]) for number in range(800)])
        by_name = tables.real(PARENTS, "name")
        columns = [by_name.clause.c.id, by_name.clause.c.name]
        with tables.cleanup() as connection:
            found = dialect.find(connection, by_name, ["b", "c"], columns)
            assert sorted(found) == [(number, "b") for number in range(1, 800, 2)]
            assert dialect.find(connection, by_name, ["c"], columns) == []
            assert len(dialect.find(connection, by_name, ["a"], columns, first=True)) == 1
            by_key = tables.real(PARENTS)
            names = [by_key.clause.c.name]
            held = dialect.find(connection, by_key, list(range(600)), names, lock=True)
            assert sorted(held) == [("a",)] * 300 + [("b",)] * 300

    def test_several_tables_are_asked_at_once(self, tables: SuiteTables, dialect: Dialect) -> None:
        tables.insert(PARENTS, [(1, "a"), (2, "b")])
        tables.insert(CHILDREN, [(7, 2)])
        tables.insert(PAIRS, [(1, "a")])
        parents, texts, pairs = map(tables.real, (PARENTS, TEXTS, PAIRS))
        children = tables.real(CHILDREN, "parent_id")
        asked: list[tuple[KeyedTable, list[Any]]] = [
            (parents, [2, 3]),
            (texts, ["a"]),
            (pairs, [(1, "a"), (1, "b")]),
            (children, []),
            (parents, list(range(500, 1500))),
        ]
        with tables.cleanup() as connection:
            assert dialect.tables_with_rows(connection, asked) == [0, 2]
            existing = dialect.existing_keys_of_each(connection, asked)
            assert existing == [[2], [], [(1, "a")], [], []]
            assert dialect.tables_with_rows(connection, [(children, [1])]) == []
            assert dialect.tables_with_rows(connection, [(children, [1, 2])]) == [0]

    def test_columns_are_set_to_null(self, tables: SuiteTables, dialect: Dialect) -> None:
        tables.insert(PARENTS, [(1, "a")])
        tables.insert(CHILDREN, [(1, 1), (2, 1), (3, 1)])
        with tables.cleanup() as connection:
            dialect.set_null(connection, tables.real(CHILDREN), [1, 3], ["parent_id"])
        with tables.engine.connect() as connection:
            rows = connection.execute(sa.select(CHILDREN).order_by(CHILDREN.c.id)).all()
        assert [tuple(row) for row in rows] == [(1, None), (2, 1), (3, None)]

    def test_a_row_is_put_back_exactly(self, tables: SuiteTables, dialect: Dialect) -> None:
        """With its own key, 0 too, although the database generates keys."""
        real = tables.real(GENERATED)
        with tables.cleanup() as connection:
            for key in (0, 77):
                values = {"id": key, "name": "a"}
                dialect.insert_exactly(connection, real.clause, values, always=False)
        assert tables.keys(GENERATED) == [0, 77]

    def test_a_cycle_of_rows_goes(self, tables: SuiteTables, dialect: Dialect) -> None:
        if dialect.cycle_form is CycleForm.LEVELS:
            pytest.skip("this database's cycles are deleted level by level")
        tables.insert(LEFT, [(1, None), (2, None)])
        tables.insert(RIGHT, [(1, 1), (2, 2)])
        with tables.engine.begin() as connection:
            connection.execute(LEFT.update().values({"right_id": LEFT.c.id}))
        with tables.cleanup() as connection:
            batch = [(tables.real(LEFT), [1]), (tables.real(RIGHT), [1])]
            assert dialect.delete_cycle(connection, batch) == [1, 1]
        assert tables.keys(LEFT) == tables.keys(RIGHT) == [2]
        with tables.cleanup() as connection:  # SQLite drops no table while its rows are referenced
            dialect.delete_cycle(connection, [(tables.real(LEFT), [2]), (tables.real(RIGHT), [2])])

    # ----- rows without a key

    def test_equal_rows_go_and_no_more_than_asked(self, tables: SuiteTables) -> None:
        if not tables.dialect.deletes_keyless_rows:
            pytest.skip("this dialect leaves rows without a key, and reports them")
        one: Any = (1, "a")
        others: list[Any] = [(1, "A"), (1, "a "), (2, "a"), (None, "a")]
        tables.insert(KEYLESS, [one, (1, None), one, one, *others])
        real = tables.real(KEYLESS)
        with tables.cleanup() as connection:
            read = sa.select(*(tables.dialect.read_exactly(column) for column in KEYLESS.c))
            equal, null = connection.execute(read).all()[:2]
            assert tables.dialect.count_equal_rows(connection, real, equal) == 3
            assert tables.dialect.delete_equal_rows(connection, real, equal, 2) == 2
            assert tables.dialect.delete_equal_rows(connection, real, null, 5) == 1
        with tables.engine.connect() as connection:
            left = [tuple(row) for row in connection.execute(sa.select(KEYLESS))]
        assert sorted(map(str, left)) == sorted(map(str, [one, *others]))
