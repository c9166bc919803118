"""What a schema of a test costs against one made for it, with 50 tables and 92 foreign keys.

Run: python -m pytest tests/benchmarks/test_isolation.py -m benchmark -s
"""

from __future__ import annotations

import time

import pytest
import sqlalchemy as sa

from benchmarks.measure import paired, say, seconds
from harness.suites import Suite
from tidyrows.dialects import LockName, dialect_for
from tidyrows.isolation import lease
from tidyrows.isolation.blueprint import ddl_of
from tidyrows.isolation.isolate import isolate
from tidyrows.isolation.prune import prune

TESTS = 10
GOALS = {"postgresql": (100, 1.5), "mysql": (100, 6), "sqlite": (200, None)}


def metadata():
    tables = sa.MetaData()
    for n in range(50):
        parents = [each for each in (n - 1, n - 2) if each >= 0]
        sa.Table(
            f"things_{n}",
            tables,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("name", sa.String(40), index=True),
            sa.Column("number", sa.Integer),
            *(
                sa.Column(f"parent_{at}", sa.ForeignKey(f"things_{parent}.id"))
                for at, parent in enumerate(parents[: 1 if 2 < n < 8 else 2])
            ),
        )
    return tables


METADATA = metadata()


def space(engine, level, name):
    engine.connect().close()
    kind = dialect_for(engine).space_kinds[level]
    held = dialect_for(engine).advisory_lock(
        kind.managing(engine), LockName(f"tidyrows {name}", shared=False, session=True, label="")
    )
    held.acquire(0)
    found = kind(dialect_for(engine), engine, name, held.connection)
    found.prepare()
    return found, held


@pytest.mark.benchmark
@pytest.mark.parametrize("level", ["schema", "database"])
def test_from_the_pool_against_a_new_one(database, level):
    engine = database.engine()
    engine = sa.create_engine(engine.url) if database.backend == "sqlite" else engine
    goal = 20 if level == "database" else GOALS[database.backend][0]
    made, held = space(engine, level, "tidy_bench")
    table = METADATA.tables["things_3"]

    def new():
        def work():
            made.create()
            own = made.engine()
            METADATA.create_all(own, checkfirst=False)
            own.dispose()

        taken = seconds(work)
        made.finish("")
        made.drop()
        return taken

    def from_pool():
        """What the schema costs a test that writes a row, without its own statements."""
        total = 0.0
        for _ in range(TESTS):
            db = isolate(engine, level, metadata=METADATA)
            start = time.perf_counter()
            db.open()
            total += time.perf_counter() - start
            with db.engine.begin() as connection:
                connection.execute(sa.insert(table).values(id=1))
            start = time.perf_counter()
            db.close()
            total += time.perf_counter() - start
        return total / TESTS

    ours, theirs, ratio = paired(from_pool, new, 3)
    say(f"{level} from the pool, {database.backend}", ours, theirs, ratio, f"1/{goal}")
    print(f"{1 / ratio:.1f} times faster")
    while lease.idle:
        for each in lease.idle.popitem()[1]:
            each.let_go()
    prune(engine, older_than=0)
    held.release()


@pytest.mark.benchmark
def test_the_first_build_against_create_all(database):
    engine = database.engine()
    made, held = space(engine, "schema", "tidy_bench")

    def create_all():
        made.create()
        own = made.engine()
        taken = seconds(lambda: METADATA.create_all(own))
        own.dispose()
        made.finish("")
        made.drop()
        return taken

    def replay():
        made.create()
        taken = seconds(lambda: made.replay(ddl_of(METADATA, engine)))
        made.finish("")
        made.drop()
        return taken

    ours, theirs, ratio = paired(replay, create_all, 3)
    say(f"replay, {database.backend}", ours, theirs, ratio, f"1/{GOALS[database.backend][1]}")
    print(f"{1 / ratio:.1f} times faster")
    held.release()


WAITING = """
    import time
    import pytest
    from models import Base, UserFactory

    @pytest.fixture(scope="session")
    def tidy_options():
        return {"metadata": Base.metadata}

    @pytest.mark.parametrize("n", range(200))
    def test_rows(tidy, n):
        UserFactory.create_batch(3)
        time.sleep(0.05)  # the application at work
"""


@pytest.mark.benchmark
def test_eight_workers_against_one(outside, tmp_path):
    """Two hundred tests that wait 50 ms each, at level schema, with all that a run costs."""
    suite = Suite(tmp_path, outside)
    suite.write("test_it.py", WAITING)
    suite.write("pytest.ini", "[pytest]\ntidy_isolation = schema\n")

    def run(*arguments):
        def work():
            assert suite.pytest(*arguments, forked=False).outcomes == {"passed": 200}

        return lambda: seconds(work)

    figures = paired(run(), run("-n", "8"), 1)
    prune(outside, older_than=0)
    say(f"{outside.dialect.name}, one worker against eight", *figures, "3x")
