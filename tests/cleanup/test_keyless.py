"""Tables without a primary key: as many rows go as were inserted, not one equal one more."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import uuid
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, registry, relationship

from harness.blocks import table
from harness.bystanders import Bystanders, snapshot
from harness.targets import on
from tidyrows import CleanupError, CleanupManager, ResourceTracker, RetryPolicy

servers = on("postgresql+psycopg", "postgresql+psycopg2", "mysql+pymysql", "mysql+mysqldb")


@pytest.fixture
def log(engine):
    log = sa.Table(
        "log",
        sa.MetaData(),
        sa.Column("line", sa.String(40)),
        sa.Column("number", sa.Integer),
    )
    log.create(engine)
    return log


def rows_of(engine, heap):
    (rows,) = [rows for name, rows in snapshot(engine).items() if name.endswith(f".{heap.name}")]
    return rows


def test_of_equal_rows_as_many_go_as_were_inserted(any_driver_engine):
    engine = any_driver_engine
    log = sa.Table("log", sa.MetaData(), sa.Column("line", sa.String(40)))
    log.create(engine)
    bystanders = Bystanders(engine)
    bystanders.insert(log, {"line": "same"}, {"line": "same"}, {"line": None}, {"line": "SAME"})
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup, engine.begin() as connection:
        connection.execute(sa.insert(log).values(line="same"))
        connection.execute(sa.insert(log), [{"line": "same"}, {"line": None}, {"line": "a'b%s:c"}])
        connection.execute(sa.insert(log).values([{"line": "same"}, {"line": "same "}]))
        chosen = sa.select(sa.func.lower(log.c.line)).where(log.c.line == "a'b%s:c")
        connection.execute(sa.insert(log).from_select(["line"], chosen))
        assert len(tracker) == 0
    assert cleanup.report.total_deleted == 7
    assert not cleanup.report.already_gone
    bystanders.assert_untouched()
    assert cleanup.cleanup().total_deleted == 0


KINDS = {
    "real": (sa.Float(24), [0.1, 16777216.0, -1e30]),
    "double": (sa.Double(), [0.1, 1 / 3, 1e300]),
    "decimal": (sa.Numeric(20, 12), [decimal.Decimal("0.123456789012"), decimal.Decimal(-3)]),
    "date": (sa.Date(), [dt.date(2024, 2, 29), dt.date(1, 1, 1)]),
    "moment": (sa.DateTime(), [dt.datetime(2024, 2, 29, 23, 59, 58)]),
    "time": (sa.Time(), [dt.time(1, 2, 3)]),
    "uuid": (sa.Uuid(), [uuid.UUID(int=1), uuid.uuid4()]),
    "text": (sa.Text(), ["", "o'clock", 'quo"te', "back\\slash", "größe 🦊", "a ", "100%", ":x"]),
    "fixed": (sa.CHAR(6), ["ab", ""]),
    "bytes": (sa.LargeBinary(), [b"", b"\x00\xff'\\", bytes(range(256))]),
    "json": (sa.JSON(), [{"a": [1, 2.5, None], "b": "ü'"}, [], "text", 7]),
    "flag": (sa.Boolean(), [True, False]),
    "enum": (sa.Enum("red", "green", name="colour"), ["red", "green"]),
    "big": (sa.BigInteger(), [2**62, -1]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_every_kind_find_their_row(engine, kind):
    """And its neighbour, equal in this column, NULL in another, stays."""
    type_, values = KINDS[kind]
    heap = sa.Table(
        "heap", sa.MetaData(), sa.Column("value", type_), sa.Column("whose", sa.String(9))
    )
    heap.create(engine)
    bystanders = Bystanders(engine)
    values = [*values, None]
    bystanders.insert(heap, *({"value": value} for value in values))
    bystanders.insert(heap, {"value": values[0], "whose": "ours"})
    with CleanupManager(ResourceTracker(engine)) as cleanup, engine.begin() as connection:
        for value in values:
            connection.execute(sa.insert(heap).values(value=value, whose="ours"))
        connection.execute(sa.insert(heap), [{"value": value, "whose": None} for value in values])
    assert cleanup.report.total_deleted == 2 * len(values)
    bystanders.assert_untouched()


def test_what_the_caller_sees_of_the_insert_is_as_without_a_tracker(engine, log):
    def seen():
        with engine.begin() as connection:
            one = connection.execute(sa.insert(log).values(line="a"))
            many = connection.execute(sa.insert(log), [{"line": "b"}, {"line": "c"}])
            return one.returns_rows, one.inserted_primary_key, many.returns_rows, many.closed

    without = seen()
    bystanders = Bystanders(engine)
    with CleanupManager(ResourceTracker(engine)):
        assert seen() == without
    bystanders.assert_untouched()


@pytest.mark.parametrize("kind", ["insert", "delete"])
def test_what_begins_a_transaction_is_seen_as_what_comes_later(engine, log, kind):
    """Where a table is not known yet, the question begins the transaction, not the statement."""
    bystanders = Bystanders(engine)
    bystanders.insert(log, {"line": "a", "number": 7})
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup, engine.connect() as connection:
        if kind == "delete":
            other = sa.Table("log", sa.MetaData(), *(column._copy() for column in log.columns))
            connection.execute(sa.insert(other), [{"line": "b", "number": n} for n in (1, 2)])
            connection.commit()
            result = connection.execute(sa.delete(log).where(log.c.number == 1))
        else:
            result = connection.execute(sa.insert(log).values(line="b", number=1))
        assert not result.returns_rows
        nested = connection.begin_nested()  # SQLite refuses it while rows wait to be read
        nested.commit()
        connection.commit()
        (entry,) = json.loads(tracker.to_json())["entries"]
        assert entry[3]["rows"] == [["b", 2 if kind == "delete" else 1]]
    assert cleanup.report.total_deleted == 1
    assert not cleanup.report.already_gone
    bystanders.assert_untouched()


@on("sqlite", "postgresql+psycopg")  # MariaDB's rows need no RETURNING of the caller's to be read
def test_a_returning_of_the_callers_own_is_untouched(engine, log):
    bystanders = Bystanders(engine)
    with CleanupManager(ResourceTracker(engine)) as cleanup, engine.begin() as connection:
        result = connection.execute(sa.insert(log).values(line="a", number=1).returning(log.c.line))
        assert list(result.keys()) == ["line"]
        assert result.all() == [("a",)]
    assert cleanup.report.total_deleted == 1
    bystanders.assert_untouched()


def test_what_is_rolled_back_is_forgotten(engine, log):
    """A stranger's equal row must not pay for it."""
    bystanders = Bystanders(engine)
    bystanders.insert(log, {"line": "a"}, {"line": "b"}, {"line": "c"})
    with CleanupManager(ResourceTracker(engine)) as cleanup, engine.connect() as connection:
        connection.execute(sa.insert(log).values(line="a"))
        connection.rollback()
        with connection.begin():
            savepoint = connection.begin_nested()
            connection.execute(sa.insert(log).values(line="b"))
            savepoint.rollback()
            with connection.begin_nested():
                connection.execute(sa.insert(log).values(line="c"))
    assert cleanup.report.total_deleted == 1
    assert not cleanup.report.already_gone
    bystanders.assert_untouched()


def test_a_row_that_the_application_changed_or_deleted_is_already_gone(database, engine, log):
    """It equals nothing any more, so it is nobody's; what it became stays."""
    bystanders = Bystanders(engine)
    application = database.engine()
    with CleanupManager(ResourceTracker(engine)) as cleanup:
        with engine.begin() as connection:
            connection.execute(
                sa.insert(log), [{"line": line, "number": 1} for line in ("a", "b", "c")]
            )
        with application.begin() as connection:
            connection.execute(sa.update(log).where(log.c.line == "a").values(number=2))
            connection.execute(sa.delete(log).where(log.c.line == "b"))
    assert cleanup.report.total_deleted == 1
    assert sum(cleanup.report.already_gone.values()) == 2
    assert rows_of(engine, log) == [("a", 2)]
    with application.begin() as connection:
        connection.execute(sa.delete(log))
    bystanders.assert_untouched()


def test_rows_that_reference_tracked_ones_go_first(engine):
    metadata = sa.MetaData()
    parent = table(metadata, "parents")
    notes = sa.Table(
        "notes",
        metadata,
        sa.Column("parent_id", sa.ForeignKey("parents.id")),
        sa.Column("text", sa.String(9)),
    )
    metadata.create_all(engine)
    bystanders = Bystanders(engine)
    bystanders.insert(parent, {"id": 1})
    bystanders.insert(notes, {"parent_id": 1, "text": "x"})
    with CleanupManager(ResourceTracker(engine)) as cleanup, engine.begin() as connection:
        connection.execute(sa.insert(parent).values(id=2))
        connection.execute(sa.insert(notes).values(parent_id=2, text="x"))
        connection.execute(sa.insert(notes).values(parent_id=1, text="x"))
    assert cleanup.report.total_deleted == 3
    assert not cleanup.report.dependents
    bystanders.assert_untouched()


@pytest.fixture
def codes(engine):
    """A table without a primary key that can be referenced all the same."""
    metadata = sa.MetaData()
    codes = sa.Table("codes", metadata, sa.Column("code", sa.Integer, unique=True))
    child = table(metadata, "uses", sa.Column("code", sa.ForeignKey("codes.code")))
    metadata.create_all(engine)
    return codes, child


def test_a_parent_without_a_primary_key_goes_after_its_children(engine, codes):
    codes, child = codes
    bystanders = Bystanders(engine)
    with CleanupManager(ResourceTracker(engine)) as cleanup, engine.begin() as connection:
        connection.execute(sa.insert(codes), [{"code": 1}, {"code": 2}])
        connection.execute(sa.insert(child).values(id=1, code=1))
    assert cleanup.report.total_deleted == 3
    bystanders.assert_untouched()


def test_a_row_that_a_strangers_row_needs_is_a_leftover_and_keeps_no_other(database, engine, codes):
    codes, child = codes
    manager = CleanupManager(ResourceTracker(engine))
    with pytest.raises(CleanupError) as caught, manager:
        with engine.begin() as connection:
            connection.execute(sa.insert(codes), [{"code": 1}, {"code": 2}])
        bystanders = Bystanders(engine)
        bystanders.insert(child, {"id": 1, "code": 1})
    (left,) = caught.value.leftovers
    assert (left.table.name, left.row, left.count) == ("codes", None, 1)
    assert "foreign key" in left.cause.lower()
    assert manager.report.total_deleted == 1
    assert rows_of(engine, codes) == [(1,)]
    with database.engine().begin() as connection:
        connection.execute(sa.delete(child))
    assert manager.cleanup().total_deleted == 1
    assert rows_of(engine, codes) == []


@servers
def test_a_commit_without_an_answer_is_never_replayed(database, engine, log, monkeypatch):
    """It had succeeded: run again, it would take two equal rows of a stranger."""
    tracker = ResourceTracker(engine)
    with tracker_running(tracker), engine.begin() as connection:
        connection.execute(sa.insert(log), [{"line": "same"}, {"line": "same"}])
    bystanders = Bystanders(engine)
    bystanders.insert(log, {"line": "same"}, {"line": "same"})
    manager = CleanupManager(tracker, retry=RetryPolicy(base=0.0))
    lost = lose_the_answer(database, engine, monkeypatch)
    with pytest.raises(CleanupError, match="COMMIT was never answered") as caught:
        manager.cleanup()
    assert lost
    (left,) = caught.value.leftovers
    assert (left.table.name, left.row, left.count) == ("log", None, 2)
    assert rows_of(engine, log) == [("same", None), ("same", None)]
    with pytest.raises(CleanupError, match="COMMIT was never answered"):
        manager.cleanup()
    assert rows_of(engine, log) == [("same", None), ("same", None)]


@servers
def test_an_insert_whose_commit_was_not_answered_is_not_deleted(database, engine, log, monkeypatch):
    """Nobody knows whether it is there, and an equal row may be a stranger's."""
    bystanders = Bystanders(engine)
    bystanders.insert(log, {"line": "same"})
    tracker = ResourceTracker(engine)
    with tracker_running(tracker):
        lose_the_answer(database, engine, monkeypatch)
        with pytest.raises(sa.exc.DBAPIError), engine.begin() as connection:
            connection.execute(sa.insert(log).values(line="same"))
    with pytest.raises(CleanupError, match="COMMIT was never answered"):
        CleanupManager(tracker).cleanup()
    assert len(rows_of(engine, log)) == 2


@servers
@pytest.mark.parametrize("at", ["delete", "commit"])
def test_a_connection_that_dies_before_the_commit_is_replaced(database, engine, log, at):
    bystanders = Bystanders(engine)
    bystanders.insert(log, {"line": "same"})
    tracker = ResourceTracker(engine)
    with tracker_running(tracker), engine.begin() as connection:
        connection.execute(sa.insert(log), [{"line": "same"}, {"line": "same"}])
    killed = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def strike(connection, cursor, statement, *_):
        if not killed and ("DELETE" in statement if at == "delete" else "count(" in statement):
            killed.append(statement)
            kill(database, connection.connection)

    if at == "commit":  # one row too few, so that there is a statement between DELETE and COMMIT
        with database.engine().begin() as connection:
            connection.execute(sa.delete(log))
        bystanders = Bystanders(engine)
    report = CleanupManager(tracker, retry=RetryPolicy(base=0.0)).cleanup()
    assert killed
    assert report.retries == 1
    assert report.total_deleted == (2 if at == "delete" else 0)
    bystanders.assert_untouched()


@servers
def test_a_lock_timeout_is_waited_out(database, engine, log):
    bystanders = Bystanders(engine)
    tracker = ResourceTracker(engine)
    with tracker_running(tracker), engine.begin() as connection:
        connection.execute(sa.insert(log), [{"line": "a"}, {"line": "a"}])
    holder = database.engine().connect()
    holder.execute(sa.select(log).with_for_update()).all()
    retry = RetryPolicy(base=0.0, sleep=lambda _seconds: holder.rollback())
    report = CleanupManager(tracker, lock_timeout=1.0, retry=retry).cleanup()
    holder.close()
    assert report.retries >= 1
    assert report.total_deleted == 2
    bystanders.assert_untouched()


def test_a_column_that_the_table_lacks_tells_its_rows_apart(engine, log):
    """Rows that differ in it are not equal: those of a stranger stay."""
    part = sa.Table("log", sa.MetaData(), sa.Column("line", sa.String(40)))
    bystanders = Bystanders(engine)
    bystanders.insert(log, {"line": "a", "number": 7}, {"line": "a", "number": None})
    with CleanupManager(ResourceTracker(engine)) as cleanup, engine.begin() as connection:
        connection.execute(sa.insert(part).values(line="a"))
    assert cleanup.report.total_deleted == 1
    bystanders.assert_untouched()


def test_a_column_that_is_added_after_the_insert_keeps_the_rows(database, engine, log):
    """Rows that differ in it would look equal, so one of a stranger might go."""
    tracker = ResourceTracker(engine)
    with tracker_running(tracker), engine.begin() as connection:
        connection.execute(sa.insert(log).values(line="a", number=1))
    application = database.engine()
    with application.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE log ADD COLUMN whose VARCHAR(9)")
        connection.exec_driver_sql("INSERT INTO log VALUES ('a', 1, 'theirs')")
    bystanders = Bystanders(engine)
    with pytest.raises(CleanupError, match="lacks the column 'whose'"):
        CleanupManager(tracker).cleanup()
    bystanders.assert_untouched()


@on("postgresql+psycopg")
def test_a_partition_with_the_same_ctid_loses_nothing(engine):
    """A ctid is unique in its partition only."""
    parts = sa.Table("parts", sa.MetaData(), sa.Column("n", sa.Integer), sa.Column("s", sa.Text))
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE parts (n int, s text) PARTITION BY LIST (n)")
        connection.exec_driver_sql("CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1)")
        connection.exec_driver_sql("CREATE TABLE parts_2 PARTITION OF parts FOR VALUES IN (2)")
    bystanders = Bystanders(engine)
    bystanders.insert(parts, {"n": 2, "s": "x"})
    with CleanupManager(ResourceTracker(engine)) as cleanup, engine.begin() as connection:
        connection.execute(sa.insert(parts).values(n=1, s="x"))
    assert cleanup.report.total_deleted == 1
    bystanders.assert_untouched()


@on("postgresql+psycopg")
def test_a_trigger_that_keeps_a_row_makes_it_a_leftover(engine, log):
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql "
            "AS 'BEGIN IF old.number = 1 THEN RETURN NULL; END IF; RETURN old; END'"
        )
        connection.exec_driver_sql(
            "CREATE TRIGGER keep BEFORE DELETE ON log FOR EACH ROW EXECUTE FUNCTION keep()"
        )
    manager = CleanupManager(ResourceTracker(engine))
    with pytest.raises(CleanupError) as caught, manager, engine.begin() as connection:
        connection.execute(sa.insert(log), [{"line": "a", "number": n} for n in (1, 2)])
    (left,) = caught.value.leftovers
    assert (left.table.name, left.count) == ("log", 1)
    assert manager.report.total_deleted == 1
    assert not manager.report.already_gone


def test_a_model_over_a_table_without_a_primary_key(engine, log):
    class Line:
        pass

    registry().map_imperatively(Line, log, primary_key=[log.c.number])
    bystanders = Bystanders(engine)
    bystanders.insert(log, {"line": "a", "number": 1})
    with CleanupManager(ResourceTracker(engine)) as cleanup, Session(engine) as session:
        for number in (1, 2, 3):
            line = Line()
            line.line, line.number = "a", number
            session.add(line)
        session.commit()
    assert cleanup.report.total_deleted == 3
    bystanders.assert_untouched()


def test_a_row_that_the_test_deleted_itself_is_not_deleted_twice(engine, log):
    """A stranger's equal row, written later, would be taken for it."""
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        with engine.begin() as connection:
            connection.execute(sa.insert(log), [{"line": line} for line in "aabc"])
        with engine.begin() as connection:
            assert connection.execute(sa.delete(log).where(log.c.line == "a")).rowcount == 2
            connection.execute(sa.insert(log).values(line="d"))
            connection.execute(sa.delete(log).where(log.c.line == "d"))
        with engine.connect() as connection:
            connection.execute(sa.delete(log))
            connection.rollback()
        strangers = Bystanders(engine)
        strangers.insert(log, {"line": "a"}, {"line": "d"}, {"line": "b"})
    assert cleanup.report.total_deleted == 2
    assert not cleanup.report.already_gone
    assert sorted(line for line, _number in rows_of(engine, log)) == ["a", "b", "d"]


def test_another_process_deletes_what_this_one_made(database, engine):
    """The rows go with to_json(), and it reads the table from the database."""
    heap = sa.Table(
        "heap",
        sa.MetaData(),
        sa.Column("data", sa.LargeBinary().with_variant(sa.BINARY(4), "mysql", "mariadb")),
        sa.Column("json", sa.JSON),
        sa.Column("real", sa.Float(24)),
        sa.Column("who", sa.Uuid),
        sa.Column("at", sa.DateTime),
        sa.Column("yes", sa.Boolean),
    )
    heap.create(engine)
    row = {
        "data": b"\xff\x00'a",
        "json": {"a": [1]},
        "real": 0.1,
        "who": uuid.UUID(int=7),
        "at": dt.datetime(2024, 2, 29, 1, 2, 3),
        "yes": True,
    }
    bystanders = Bystanders(engine)
    bystanders.insert(heap, row)
    tracker = ResourceTracker(engine)
    with tracker_running(tracker), engine.begin() as connection:
        connection.execute(sa.insert(heap), [row, row])
        connection.execute(sa.insert(heap).values(real=None))
    other = ResourceTracker.from_json(tracker.to_json(), database.engine())
    assert CleanupManager(other).cleanup().total_deleted == 3
    bystanders.assert_untouched()


@contextmanager
def tracker_running(tracker):
    """A block in which the tracker listens, without a cleanup at its end."""
    tracker.start()
    try:
        yield
    finally:
        tracker.stop()


def kill(database, pooled):
    """End a connection from outside, as a restart of the server would."""
    raw = pooled.driver_connection
    with database.engine().connect() as connection:
        if database.backend == "mysql":
            connection.exec_driver_sql(f"KILL {raw.thread_id()}")
        else:
            connection.exec_driver_sql(f"SELECT pg_terminate_backend({raw.info.backend_pid}, 5000)")


def lose_the_answer(database, engine, monkeypatch):
    """The next COMMIT succeeds, and nobody hears of it."""
    commit = engine.dialect.do_commit
    lost = []

    def without_an_answer(pooled):
        commit(pooled)
        if not lost:
            lost.append(pooled)
            kill(database, pooled)
            pooled.cursor().execute("SELECT 1")

    monkeypatch.setattr(engine.dialect, "do_commit", without_an_answer)
    return lost


def test_rows_of_a_table_that_was_dropped_are_gone_with_it(engine, log):
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        with engine.begin() as connection:
            connection.execute(
                sa.insert(log), [{"line": "one", "number": 1}, {"line": "two", "number": 2}]
            )
            connection.execute(sa.insert(log).values(line=sa.func.lower("THREE"), number=3))
        with engine.begin() as connection:  # several at once tell nothing of which they took
            some = sa.delete(log).where(log.c.number == sa.bindparam("n"))
            connection.execute(some, [{"n": 1}, {"n": 7}])
        log.drop(engine)
    assert cleanup.report.leftovers == ()
    assert not tracker.store.snapshot()


def test_what_the_orm_takes_from_an_association_table_is_known_row_by_row(engine):
    """It deletes in one statement with many parameters, which returns nothing."""
    mapper, numbered = registry(), {"sqlite_autoincrement": True}  # else nothing tells their rows
    between = sa.Table(
        "post_tags",
        mapper.metadata,
        sa.Column("post_id", sa.ForeignKey("posts.id")),
        sa.Column("tag_id", sa.ForeignKey("tags.id")),
    )

    @mapper.mapped
    class Tag:
        __tablename__ = "tags"
        __table_args__ = numbered
        id = sa.Column(sa.Integer, primary_key=True)

    @mapper.mapped
    class Post:
        __tablename__ = "posts"
        __table_args__ = numbered
        id = sa.Column(sa.Integer, primary_key=True)
        tags = relationship(Tag, secondary=between)

    mapper.metadata.create_all(engine)
    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup, Session(engine) as session:
        post = Post(tags=[Tag(), Tag(), Tag()])
        session.add(post)
        session.commit()
        del post.tags[1:]
        session.commit()
        assert len(rows_of(engine, between)) == 1
    assert cleanup.report.leftovers == ()
    assert rows_of(engine, between) == []
