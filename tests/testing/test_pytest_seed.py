"""The data of a test follow the run's seed and the test's id, whatever ran before and where."""

from __future__ import annotations

import json
import re
import shlex
from types import SimpleNamespace

import pytest

import pytest_tidyrows
from harness.suites import Suite
from harness.targets import mostly_on, on

pytestmark = pytest.mark.slow

DATA = """
    import json
    import os
    import random
    from pathlib import Path

    import factory.fuzzy
    import pytest
    import sqlalchemy as sa
    from models import OrgFactory
    from tidyrows import TrackedFactory, Unique
    from tidyrows.testing import TidyTestCase

    class ThingFactory(TrackedFactory[dict]):
        class Meta:
            model = dict

        name = factory.Faker("name")
        city = factory.Faker("city", locale="de_DE")
        fuzzy = factory.fuzzy.FuzzyInteger(10**9)
        number = factory.LazyFunction(lambda: random.randrange(10**9))

    class NamedFactory(OrgFactory):
        name = Unique(factory.Faker("company"))

    def draw():
        return list(ThingFactory.build().values())

    def write(request, **data):
        folder = Path(os.environ["DATA"])
        folder.mkdir(exist_ok=True)
        (folder / request.node.name).write_text(json.dumps(data))
"""
TESTS = """
    @pytest.fixture(scope="module")
    def shared():
        return draw()

    @pytest.fixture(scope="module")
    def also_shared(shared):
        return draw()

    @pytest.fixture
    def own(request):
        yield draw()
        draw()

    def test_that_draws_something_else(shared):
        for _ in range(7):
            draw()
        raise LookupError

    @pytest.mark.parametrize("n", range(3))
    def test_data(request, tidy, n, own, also_shared, shared):
        org = NamedFactory()
        write(request, own=own, test=draw(), shared=[shared, also_shared], name=org.name)
        raise LookupError

    @pytest.fixture(scope="module")
    def broken():
        raise LookupError(draw())

    def test_broken(broken):
        pass

    def test_that_draws_nothing():
        raise LookupError

    class TestCase(TidyTestCase):
        @pytest.fixture(autouse=True)
        def _request(self, request):
            self.request = request

        @classmethod
        def setUpClass(cls):
            cls.shared = draw()

        tidy_engine = sa.create_engine(os.environ["SUITE_URL"])

        def test_case(self):
            write(self.request, test=draw(), shared=self.shared)
            raise LookupError
"""
ORDER = """
    import os

    def pytest_collection_modifyitems(items):
        if os.environ.get("REVERSED"):
            items.reverse()
"""


@pytest.fixture
def suite(tmp_path, outside):
    made = Suite(tmp_path, outside)
    made.write("test_it.py", DATA)
    made.append("conftest.py", ORDER)
    return made


def run(suite, name, *arguments, **environment):
    """The data that the tests wrote, and the lines that repeat them, by test."""
    folder = suite.folder / name
    ended = suite.pytest(*arguments, DATA=str(folder), **environment)
    data = {path.name: json.loads(path.read_text()) for path in folder.glob("*")}
    lines = re.findall(r"^the data of this test again: (.*::(.*?)'?)$", ended.text, re.MULTILINE)
    return ended, data, {test: line for line, test in lines}


def again(suite, line, *arguments):
    """What the line that a failed test printed repeats."""
    words = shlex.split(line)
    split = words.index("pytest")
    environment = dict(word.split("=") for word in words[:split])
    (data,) = run(suite, "again", *words[split + 1 :], *arguments, **environment)[1].values()
    return data


@mostly_on("postgresql+psycopg")
def test_each_test_has_its_own_data_in_any_worker_and_order(suite):
    """The rows of the first run stay: with one seed the second must not write them once more."""
    suite.append("test_it.py", TESTS)
    ended, data, lines = run(suite, "one", "--tidy-keep", "-v")
    assert ended.outcomes == {"failed": 6, "error": 1}
    assert suite.count("orgs") == 4
    assert len({json.dumps(each["test"]) for each in data.values()}) == len(data) == 4
    (seed,) = re.findall(r"^tidyrows: --tidy-seed=(\d+)$", ended.text, re.MULTILINE)
    assert lines["test_data[1]"] == f"pytest --tidy-seed={seed} 'test_it.py::test_data[1]'"
    assert lines.keys() == {*data, "test_that_draws_something_else", "test_broken"}

    ended, others, lines = run(suite, "two", "-n2", REVERSED="1", TIDYROWS_SEED=seed)
    assert ended.outcomes == {"failed": 6, "error": 1}, ended.text
    for test, one in data.items():
        other = others[test]
        assert other["test"] == one["test"]
        if "name" in one:
            assert other["own"] == one["own"]
            assert split(other["name"])[0] == split(one["name"])[0]
            assert split(other["name"])[1] != split(one["name"])[1]
    wanted = others["test_data[1]"]
    assert wanted["shared"] != data["test_data[1]"]["shared"], "or two workers would collide"
    line = lines["test_data[1]"]
    for each in (line, lines["test_broken"]):
        assert each.startswith("TIDYROWS_WORKER=gw")
    repeated = again(suite, line)
    assert {**repeated, "name": None} == {**wanted, "name": None}


def split(name):
    """A name, and its tag."""
    return name.rpartition("-")[::2]


def test_a_seed_in_the_environment_that_is_no_number_is_refused(monkeypatch):
    config = SimpleNamespace(getoption=lambda _: None)
    monkeypatch.setenv("TIDYROWS_SEED", "often")
    with pytest.raises(pytest.UsageError, match="TIDYROWS_SEED is 'often', which is no number"):
        pytest_tidyrows._base_seed(config)
    monkeypatch.setenv("TIDYROWS_SEED", "")
    seeds = {pytest_tidyrows._base_seed(config) for _ in range(3)}
    assert [is_given for _, is_given in seeds] == [False] * 3


@on("sqlite")
def test_the_seed_of_pytest_randomly_is_the_seed(suite):
    suite.append("test_it.py", TESTS)
    randomly = ("-p", "pytest_randomly", "-v")
    ended, data, lines = run(suite, "one", *randomly, "--tidy-seed=5")
    assert "--randomly-seed=5" in ended.text
    assert "tidyrows: --tidy-seed" not in ended.text
    line = lines["test_data[2]"]
    assert line == "pytest --randomly-seed=5 'test_it.py::test_data[2]'"
    repeated = again(suite, line, *randomly)
    assert {**repeated, "name": 0} == {**data["test_data[2]"], "name": 0}


@on("sqlite")
def test_a_suite_that_seeds_itself_is_left_alone(suite):
    suite.append(
        "test_it.py",
        """
        @pytest.fixture(scope="session", autouse=True)
        def seeded():
            factory.random.reseed_random("ours")

        def test_one(request):
            write(request, test=[ThingFactory.build()["name"] for _ in range(2)])
            raise LookupError

        def test_two(request):
            write(request, test=[ThingFactory.build()["name"] for _ in range(2)])

        def test_both():
            factory.random.reseed_random("ours")
            names = [ThingFactory.build()["name"] for _ in range(4)]
            folder = Path(os.environ["DATA"])
            written = [json.loads((folder / f"test_{each}").read_text()) for each in ("one", "two")]
            assert names == written[0]["test"] + written[1]["test"]
        """,
    )
    ended, _, lines = run(suite, "one")
    assert ended.outcomes == {"failed": 1, "passed": 2}, ended.text
    assert not lines


@on("sqlite")
def test_a_suite_without_a_tracked_factory_is_not_seeded(suite):
    suite.write(
        "test_it.py",
        """
        import random
        import factory.random
        import pytest

        @pytest.fixture(scope="module")
        def state():
            return [random.getstate(), factory.random.randgen.getstate()]

        def test_one(state):
            pass

        def test_two(state, tidy):
            assert state == [random.getstate(), factory.random.randgen.getstate()]
        """,
    )
    assert suite.pytest("--tidy-seed=5").outcomes == {"passed": 2}


@on("sqlite")
def test_asynchronous_tests_and_fixtures_are_seeded_in_every_mode(suite):
    suite.append(
        "test_it.py",
        """
        import pytest_asyncio

        @pytest_asyncio.fixture(scope="module", loop_scope="module")
        async def shared():
            return draw()

        @pytest_asyncio.fixture
        async def own():
            yield draw()

        @pytest.fixture
        def anyio_backend():
            return "asyncio"

        @pytest.mark.asyncio(loop_scope='module')
        async def test_data(request, own, shared):
            write(request, own=own, shared=shared, test=draw())

        @pytest.mark.anyio
        async def test_anyio(request):
            write(request, test=draw())
        """,
    )
    plugins = ("-p", "asyncio", "-p", "anyio", "--tidy-seed=7", "--asyncio-mode")
    strict, auto = (run(suite, mode, *plugins, mode) for mode in ("strict", "auto"))
    assert strict[0].outcomes == auto[0].outcomes == {"passed": 2}, strict[0].text
    assert strict[1] == auto[1]
    assert len(strict[1]) == 2
