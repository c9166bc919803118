"""Who a process is, and that its values are nobody else's."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest

from tidyrows import worker
from tidyrows.errors import ScopeError, WorkerContextError
from tidyrows.worker import WorkerContext

VARIABLES = [
    "PYTEST_XDIST_WORKER",
    "PYTEST_XDIST_TESTRUNUID",
    "PYTEST_XDIST_WORKER_COUNT",
    "TIDYROWS_RUN",
    "TIDYROWS_WORKER",
    "TIDYROWS_WORKER_INDEX",
    "TIDYROWS_WORKER_COUNT",
    "TIDYROWS_TEST",
    "_TIDYROWS_CLAIM",
]


@pytest.fixture
def current(monkeypatch):
    """WorkerContext.current() as a fresh process with these variables sees it."""

    def read(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(worker, "_process", worker._ProcessValues(""))
        return WorkerContext.current()

    yield read
    os.environ.pop("_TIDYROWS_CLAIM", None)  # set by what was read


# -- where the ids come from ------------------------------------------------------------------


def test_a_lone_process_is_a_run_of_its_own(current):
    first, second = current(), current()
    assert (first.worker_id, first.worker_index, first.worker_count) == ("main", 0, 1)
    assert first.test_id is None
    assert first.run_id != second.run_id


def test_the_environment_is_read_once(current, monkeypatch):
    context = current()
    monkeypatch.setenv("TIDYROWS_RUN", "later")
    assert WorkerContext.current() is context


def test_a_worker_of_xdist_has_its_run_and_number(current):
    assert current(
        PYTEST_XDIST_WORKER="gw12", PYTEST_XDIST_TESTRUNUID="abc", PYTEST_XDIST_WORKER_COUNT="16"
    ) == WorkerContext("abc", "gw12", 12, None, 16)


def test_our_own_variables_come_before_those_of_xdist(current):
    assert current(
        PYTEST_XDIST_WORKER="gw12",
        PYTEST_XDIST_TESTRUNUID="abc",
        PYTEST_XDIST_WORKER_COUNT="16",
        TIDYROWS_RUN="ci-7",
        TIDYROWS_WORKER="blue",
        TIDYROWS_WORKER_INDEX="3",
        TIDYROWS_WORKER_COUNT="4",
        TIDYROWS_TEST="test_login",
    ) == WorkerContext("ci-7", "blue", 3, "test_login", 4)


def test_a_named_worker_has_others_even_where_nobody_counts_them(current):
    assert current(TIDYROWS_WORKER="w0").worker_count == 2
    assert current(TIDYROWS_WORKER="w7").worker_count == 8
    assert current(TIDYROWS_WORKER_INDEX="7").worker_id == "w7"


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"TIDYROWS_WORKER": "blue"}, "TIDYROWS_WORKER_INDEX"),
        ({"TIDYROWS_WORKER": "gw1000"}, "TIDYROWS_WORKER_INDEX"),
        ({"TIDYROWS_WORKER_INDEX": "1000"}, "TIDYROWS_WORKER_INDEX"),
        ({"TIDYROWS_WORKER_INDEX": "-1"}, "TIDYROWS_WORKER_INDEX"),
        ({"TIDYROWS_WORKER_INDEX": "one"}, "TIDYROWS_WORKER_INDEX"),
        ({"TIDYROWS_WORKER_COUNT": "many"}, "TIDYROWS_WORKER_COUNT"),
        ({"TIDYROWS_WORKER_COUNT": "0"}, "TIDYROWS_WORKER_COUNT"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(current, variables, named):
    with pytest.raises(WorkerContextError, match=named):
        current(**variables)


def test_empty_ids_are_refused():
    with pytest.raises(WorkerContextError, match="TIDYROWS_RUN"):
        WorkerContext("", "gw0", 0)


# -- values ------------------------------------------------------------------------------------


def test_a_tag_is_run_worker_test_and_counter():
    context = WorkerContext("r", "gw37", 37, "test_a", 40)
    assert re.fullmatch(r"[0-9a-z]{7}11[0-9a-z]{2}", context.tag)
    value = context.text("user-{tag}")
    assert value.startswith(f"user-{context.tag}")
    assert len(value) <= len("user-") + 16
    assert context.text("{run}|{worker}|{test}|{n}").split("|")[:3] == [
        context.tag[:7],
        context.tag[7:9],
        context.tag[9:],
    ]


def test_the_test_part_is_00_outside_a_test_and_differs_between_tests():
    context = WorkerContext("parts", "gw0", 0)
    tests = [context.for_test(f"test_{i}") for i in range(1300)]
    assert context.tag.endswith("00")
    assert len({test.tag for test in tests}) == 1295
    assert not any(test.tag.endswith("00") for test in tests)
    assert tests[3].tag == context.for_test("test_3").tag


def test_all_fields_of_a_value_share_one_counter():
    one, other = WorkerContext("r", "gw0", 0).text("{tag} {tag}").split()
    assert one == other


def test_no_two_values_are_equal_whatever_test_worker_run_or_thread_asks():
    contexts = [
        WorkerContext(run, f"gw{index}", index, test, 8)
        for run, index, test in product(("a", "b"), (0, 1, 999), (None, "t1", "t2"))
    ]
    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(lambda i: contexts[i % len(contexts)].text("u{tag}"), range(20_000)))
    assert len(set(values)) == len(values)


def test_more_values_than_the_counters_of_a_worker_are_refused(monkeypatch):
    monkeypatch.setattr(worker, "counter_codes", lambda: iter(["zzzzz"]))
    context = WorkerContext("all-counters", "gw0", 0)
    assert context.text("{tag}").endswith("zzzzz")
    with pytest.raises(ScopeError, match="27065816"):
        context.text("{tag}")


def test_the_counter_goes_on_in_the_next_test():
    context = WorkerContext("goes-on", "gw0", 0)
    counters = {context.for_test(test).text("{run}{worker}{n}") for test in "abcabc"}
    assert len(counters) == 6


def test_cutting_never_makes_two_values_equal():
    context = WorkerContext("cut", "gw0", 0)
    values = [context.text("user-{tag}00000", 18) for _ in range(2000)]
    assert len(set(values)) == len(values)
    assert max(map(len, values)) <= 18
    with pytest.raises(ScopeError):
        context.text("{tag}", max_length=15)


def test_integers_of_several_workers_interleave_even_with_a_replaced_one():
    """A crashed worker of four is replaced under the id gw4."""
    workers = [WorkerContext("ints", f"gw{index}", index, None, 4) for index in range(5)]
    numbers = [context.integer() for context in workers for _ in range(50)]
    assert len(set(numbers)) == len(numbers)
    assert numbers[50:53] == [1, 1001, 2001]
    assert workers[3].integer(start=7) == 7 + 50_000 + 3


def test_integers_of_a_lone_worker_are_next_to_each_other():
    lone = WorkerContext("lone", "main", 0)
    assert [lone.integer(100) for _ in range(3)] == [100, 101, 102]


def test_a_context_is_a_value_that_travels():
    context = WorkerContext("r", "gw1", 1, "t", 2)
    context.text("{tag}")
    assert pickle.loads(pickle.dumps(context)) == context
    assert hash(context) == hash(WorkerContext("r", "gw1", 1, "t", 2))


# -- children ----------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # that this process has threads
def test_a_forked_child_never_produces_its_parents_values(current):
    context = current(TIDYROWS_RUN="forked", TIDYROWS_WORKER="w1")
    kept = context.for_test("test_it")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        texts = [kept.text("{tag}"), WorkerContext.current().text("{tag}")]
        os.write(writer, " ".join(texts).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    child = os.read(reader, 1000).decode().split()
    os.close(reader)
    parent = [kept.text("{tag}"), WorkerContext.current().text("{tag}")]
    assert len({*child, *parent}) == 4
    assert not {text[:7] for text in child} & {text[:7] for text in parent}


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_children_of_multiprocessing_differ_from_parent_and_each_other(current, method, tmp_path):
    """No hook of a fork runs in them, and they have their parent's environment."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    context = current(TIDYROWS_RUN="children", TIDYROWS_WORKER="w1")
    code = (
        "import multiprocessing as m, sys\n"
        "from tidyrows.worker import WorkerContext\n"
        "def value(_): return WorkerContext.current().text('{tag}')\n"
        "if __name__ == '__main__':\n"
        f"    pools = [m.get_context({method!r}).Pool(1) for _ in range(2)]\n"
        "    print(*[pool.map(value, [0])[0] for pool in pools], value(0))\n"
        "    [pool.terminate() for pool in pools]\n"
    )
    script = tmp_path / "children.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script], check=True, capture_output=True, text=True, timeout=60
    )
    values = [*done.stdout.split(), context.text("{tag}")]
    assert len({value[:7] for value in values}) == 4


def test_a_subprocess_with_our_environment_differs_from_us(current):
    """As a script that a test of an xdist worker runs."""
    context = current(TIDYROWS_RUN="scripts", TIDYROWS_WORKER="w1")
    code = "from tidyrows.worker import WorkerContext as W; print(W.current().text('{tag}'))"
    values = [
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
        ).stdout.strip()
        for _ in range(2)
    ]
    assert len({value[:7] for value in [*values, context.text("{tag}")]}) == 3


def test_another_worker_of_the_same_run_keeps_the_run_part(current):
    context = current(TIDYROWS_RUN="siblings", TIDYROWS_WORKER="w1")
    code = "from tidyrows.worker import WorkerContext as W; print(W.current().tag)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TIDYROWS_WORKER": "w2"},
    )
    assert done.stdout.strip()[:7] == context.tag[:7]
