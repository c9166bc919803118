"""What the graph of a large schema costs: once, and each time a cleanup asks it.

Goals: planning ten tables of a cached graph at most 2 ms; reading and building it is done once,
and stands here beside what SQLAlchemy's own reflection takes alone.
"""

from __future__ import annotations

import random
import statistics
import time

import pytest
import sqlalchemy as sa
from sqlalchemy.engine.reflection import ObjectKind, ObjectScope

from tidyrows.dialects.sqlite import pragma_foreign_keys
from tidyrows.schema.graph import ForeignKey, ForeignKeyGraph
from tidyrows.schema.reflect import reflect_columns, reflect_foreign_keys

TABLES = 1_000
KEYS_EACH = 3
PICKED = 10


def create_large_schema(engine):
    """A thousand tables with three foreign keys each, to parents made earlier or to themselves."""
    chance = random.Random(7)
    quote = engine.dialect.identifier_preparer.quote
    with engine.begin() as connection:
        for number in range(TABLES):
            columns = ["id INTEGER PRIMARY KEY"]
            keys = []
            for at in range(KEYS_EACH):
                parent = chance.randrange(max(0, number - 50), number + 1)
                null = "" if parent == number or chance.random() < 0.5 else " NOT NULL"
                columns.append(f"parent_{at} INTEGER{null}")
                keys.append(f"FOREIGN KEY (parent_{at}) REFERENCES {quote(f't{parent:04}')} (id)")
            table = quote(f"t{number:04}")
            connection.exec_driver_sql(f"CREATE TABLE {table} ({', '.join(columns + keys)})")


def drop_large_schema(engine):
    """In small transactions: one DROP SCHEMA wants more locks than PostgreSQL has."""
    quote = engine.dialect.identifier_preparer.quote
    for start in range(TABLES, 0, -100):
        with engine.begin() as connection:
            for number in reversed(range(start - 100, start)):
                connection.exec_driver_sql(f"DROP TABLE {quote(f't{number:04}')}")


def median_milliseconds(work, times):
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append((time.perf_counter() - start) * 1000)
    return statistics.median(taken)


@pytest.fixture
def large_schema(engine):
    create_large_schema(engine)
    yield engine
    drop_large_schema(engine)


@pytest.mark.benchmark
def test_a_thousand_tables_with_three_thousand_foreign_keys(database, large_schema):
    engine = large_schema
    with engine.connect() as connection:
        schema = {
            "sqlite": "main",
            "postgresql": "public",
            "mysql": connection.engine.url.database,
        }[database.backend]
        read = pragma_foreign_keys if database.backend == "sqlite" else None

        def inspector_alone():
            return sa.inspect(connection).get_multi_foreign_keys(
                schema=schema, scope=ObjectScope.ANY, kind=ObjectKind.TABLE
            )

        def reflect():
            return reflect_foreign_keys(connection, [schema], read=read)

        keys = reflect()
        assert len(keys) == TABLES * KEYS_EACH
        inspecting = median_milliseconds(inspector_alone, 3)
        reflecting = median_milliseconds(reflect, 3)
        building = median_milliseconds(lambda: ForeignKeyGraph(keys), 3)
        graph = ForeignKeyGraph(keys)
        picked = random.Random(8).sample([(schema, f"t{n:04}") for n in range(TABLES)], PICKED)
        assert len(graph.order(picked)) == PICKED
        ordering = median_milliseconds(lambda: graph.order(picked), 200)
        nullable = median_milliseconds(lambda: reflect_columns(connection, picked[:1]), 3)
    print(
        f"\n{database.target}: Inspector alone {inspecting:.0f} ms,"
        f" reflect + build {reflecting:.0f} + {building:.0f} ms"
        f" = {(reflecting + building) / inspecting:.2f} x,"
        f" order of {PICKED} {ordering:.3f} ms, nullable columns of one {nullable:.0f} ms"
    )


@pytest.mark.benchmark
def test_ten_tables_of_one_large_cycle():
    """The worst case for ``order``: nothing of it could be computed beforehand."""
    keys = ring_of(TABLES)
    graph = ForeignKeyGraph(keys)
    picked = random.Random(8).sample([key.child for key in keys], PICKED)
    some = median_milliseconds(lambda: graph.order(picked), 200)
    everything = median_milliseconds(lambda: graph.order(key.child for key in keys), 3)
    print(f"\nring of {TABLES}: order of {PICKED} {some:.3f} ms, of all {everything:.1f} ms")


def ring_of(count):
    places = [("s", f"t{number:04}") for number in range(count)]
    return [
        ForeignKey(None, child, ("p",), parent, ("id",))
        for child, parent in zip(places, [*places[1:], places[0]], strict=True)
    ]
