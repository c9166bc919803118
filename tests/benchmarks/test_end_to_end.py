"""End-to-end tests over HTTP: eight workers on one database, one, and TRUNCATE after each test.

Run: python -m pytest tests/benchmarks/test_end_to_end.py -m benchmark -s

Each worker has a shop in a process of its own, so eight workers are sixteen processes: on few
cores they share what there is, and only what a test waits for is gained. So there is a shop that
waits for nothing, and there are shops whose payment service takes its time, as real ones do.

SQLite has one writer at a time, and the shop pays within its transaction: workers gain little.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.bystanders import snapshot
from harness.suites import fresh_environment
from harness.targets import on

pytest.importorskip("flask")
pytest.importorskip("httpx")

SHOP = Path(__file__).parent.parent.parent / "examples" / "shop"
TESTS = 200
WORKERS = 8
TIDYROWS, XDIST = ("-p", "pytest_tidyrows"), ("-p", "xdist.plugin")

CONFTEST = """
import os
from threading import Event

import pytest

from app.models import connect, create_schema
from client import Customer
from serving import Payments, running_payments, running_shop

@pytest.fixture(scope="session")
def tidy_engine():
    engine = connect(os.environ["SHOP_DATABASE_URL"])
    create_schema(engine)
    yield engine
    engine.dispose()

class SlowPayments(Payments):
    def process_request_thread(self, request, address):
        Event().wait(float(os.environ["PAYMENT_SECONDS"]))
        super().process_request_thread(request, address)

@pytest.fixture(scope="session")
def shop_url(tidy_engine):
    with running_payments(SlowPayments) as payments:
        with running_shop(os.environ["SHOP_DATABASE_URL"], payments.url) as url:
            yield url

@pytest.fixture
def buy(shop_url):
    def story(user, product):
        with Customer(shop_url) as customer:
            assert customer.log_in(user.email, "secret words").status_code == 303
            customer.add_to_basket(product.sku, 2)
            assert customer.place_order().status_code == 201
            assert f"2 x {product.name}" in customer.orders().text
    return story

def pytest_runtest_logreport(report):
    if "PYTEST_XDIST_WORKER" not in os.environ and report.when == "call":
        with open(os.environ["TIMES"], "a") as file:
            file.write(f"{report.start} {report.stop}\\n")
"""

TIDY = """
import pytest

from app.models import AuditRow
from factories import ProductFactory, UserFactory

@pytest.mark.tidy(own=[AuditRow])
@pytest.mark.parametrize("n", range(TESTS))
def test_order(tidy, buy, n):
    buy(UserFactory(password="secret words"), ProductFactory())
"""

TRUNCATE = """
import factory
import pytest
import sqlalchemy as sa
from factory.alchemy import SQLAlchemyModelFactory
from sqlalchemy import orm

from app.models import GIFT_CARD, Base, Product, User, hash_password

session = orm.scoped_session(orm.sessionmaker(expire_on_commit=False))

class UserFactory(SQLAlchemyModelFactory):
    class Meta:
        model = User
        sqlalchemy_session = session
        sqlalchemy_session_persistence = "commit"

    email = factory.Sequence(lambda n: f"user-{n}@example.test")
    name = factory.Faker("name")
    password_hash = factory.LazyFunction(lambda: hash_password("secret words"))

class ProductFactory(SQLAlchemyModelFactory):
    class Meta:
        model = Product
        sqlalchemy_session = session
        sqlalchemy_session_persistence = "commit"

    sku = factory.Sequence(lambda n: f"sku-{n}")
    name = factory.Sequence(lambda n: f"Kettle {n}")
    cents = 1250
    stock = 10

@pytest.fixture(autouse=True)
def emptied(tidy_engine):
    session.configure(bind=tidy_engine)
    yield
    session.remove()
    tables = Base.metadata.sorted_tables
    with tidy_engine.begin() as connection:
        if tidy_engine.dialect.name == "sqlite":  # it has no TRUNCATE
            for table in reversed(tables):
                connection.execute(table.delete())
        else:
            names = ", ".join(table.name for table in tables)
            connection.exec_driver_sql(f"TRUNCATE {names} RESTART IDENTITY CASCADE")
        card = sa.insert(Product).values(sku=GIFT_CARD, name="Gift card", cents=2500)
        connection.execute(card)

@pytest.mark.parametrize("n", range(TESTS))
def test_order(buy, n):
    buy(UserFactory(), ProductFactory())
"""


@dataclass
class Took:
    """Seconds of one run.

    Attributes:
        all: from its start to its end.
        tests: from where the first test began to where the last one ended.
        cpu: of all its processes.
    """

    all: float
    tests: float
    cpu: float


def run(folder: Path, url: str, wait: float, *arguments: str, tests: int = TESTS) -> Took:
    times = folder / "times"
    times.unlink(missing_ok=True)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env={
            **fresh_environment(),
            # Other plugins that happen to be installed would take seconds in each worker.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "SHOP_DATABASE_URL": url,
            "PYTHONPATH": os.pathsep.join([str(SHOP), os.environ.get("PYTHONPATH", "")]),
            "PAYMENT_SECONDS": str(wait),
            "TIMES": str(times),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    took = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert f"{tests} passed" in done.stdout, done.stdout + done.stderr
    began, ended = zip(
        *(map(float, line.split()) for line in times.read_text().splitlines()), strict=True
    )
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Took(took, max(ended) - min(began), cpu)


@pytest.mark.benchmark
@on("sqlite", "postgresql+psycopg")
@pytest.mark.parametrize(("wait", "rounds"), [(0.0, 3), (0.05, 3), (0.5, 1)])
def test_eight_workers_against_one_and_against_truncate(tmp_path, outside, wait, rounds):
    url = outside.url.render_as_string(hide_password=False)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_tidy.py").write_text(TIDY.replace("TESTS", str(TESTS)))
    (tmp_path / "test_truncate.py").write_text(TRUNCATE.replace("TESTS", str(TESTS)))
    run(tmp_path, url, 0, "test_truncate.py", "-k", "[0]", tests=1)  # makes the tables
    before = strip(snapshot(outside))
    ways = {
        f"tidyrows, {WORKERS} workers": (*TIDYROWS, *XDIST, "test_tidy.py", "-n", str(WORKERS)),
        "tidyrows, one": (*TIDYROWS, "test_tidy.py"),
        "TRUNCATE, one": ("test_truncate.py",),
    }
    took: dict[str, list[Took]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, arguments in ways.items():
            took[way].append(run(tmp_path, url, wait, *arguments))
            assert strip(snapshot(outside)) == before
    print(
        f"\n{outside.dialect.name}, {TESTS} tests, payments take {wait * 1e3:.0f} ms, "
        f"{os.cpu_count()} cores, median of {rounds}:"
    )
    eight, *_ = took.values()
    for way, each in took.items():
        faster = statistics.median(b.all / a.all for a, b in zip(eight, each, strict=True))
        inside = statistics.median(b.tests / a.tests for a, b in zip(eight, each, strict=True))
        print(
            f"  {way}: {median(each, 'all'):.1f} s ({faster:.2f}x the first), of it the tests "
            f"{median(each, 'tests'):.1f} s ({inside:.2f}x); CPU {median(each, 'cpu'):.1f} s"
        )


def median(each: list[Took], what: str) -> float:
    return statistics.median(getattr(one, what) for one in each)


def strip(found):
    """Without what is the ledger's own."""
    return {name: rows for name, rows in found.items() if "ledger" not in str(name)}
