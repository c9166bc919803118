"""What the audit makes of SQL strings, of runs in other orders, and of names in HTML."""

from __future__ import annotations

import itertools
import json
import random
from html import escape
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import pytest

from tidyrows.audit.findings import Finding, FindingKind, Wording, row_findings
from tidyrows.audit.observer import Observations, scan
from tidyrows.audit.page import html
from tidyrows.audit.reads import reads_of
from tidyrows.audit.report import lines, report_of
from tidyrows.audit.row_history import Maker, RowHistory
from tidyrows.audit.runs import AuditRun, RunKind, as_listed, shuffled, without_audit
from tidyrows.audit.tables import Difference
from tidyrows.keys import RowKey, TableName
from tidyrows.testing.pytest_audit import Outcomes

ORGS = TableName("here", "main", "orgs")


@pytest.mark.parametrize(
    ("sql", "written", "read"),
    [
        ("SELECT a FROM orgs JOIN app.users u ON true", "", "orgs app.users"),
        ("INSERT INTO orgs (id) SELECT id FROM old", "orgs", "old"),
        ('INSERT OR REPLACE INTO "odd ""name"""', 'odd "name"', ""),
        ("INSERT IGNORE INTO `orgs` VALUES (1)", "orgs", ""),
        ("REPLACE INTO orgs VALUES (1)", "orgs", ""),
        ("update only app . orgs set x = 1", "app.orgs", ""),
        ("DELETE FROM [orgs] WHERE id IN (SELECT org FROM users)", "orgs", "users"),
        ("TRUNCATE TABLE orgs", "orgs", ""),
        ("WITH made AS (INSERT INTO orgs VALUES (1)) SELECT * FROM made", "orgs", "made"),
        ("/* DELETE */ SELECT 1", "", ""),
    ],
)
def test_an_sql_string_names_its_tables(sql, written, read):
    said = scan(sql)
    assert {".".join(filter(None, name)) for name in said.written} == set(
        [written] if '"' in written else written.split()
    )
    assert {".".join(filter(None, name)) for name in said.read} == set(read.split())


def test_an_sql_string_says_what_else_may_happen():
    assert scan("CREATE TABLE orgs (id int)").ddl
    assert scan('DROP TABLE IF EXISTS orgs, "users" CASCADE').dropped == {
        (None, "orgs"),
        (None, "users"),
    }
    assert scan("CALL make_orgs()").unclear
    assert scan("DROP DATABASE app").exclusive
    assert scan("create database app_2 template app").exclusive
    assert not scan("SELECT 1 FROM orgs").unclear


# --- what a SELECT reads


@pytest.mark.parametrize(
    ("sql", "read"),
    [
        ("SELECT count(*) AS count_1 FROM orgs", {"orgs": None}),
        ("SELECT orgs.id, orgs.name FROM app.orgs", {"orgs": None}),
        ("SELECT EXISTS (SELECT * FROM orgs) AS anon_1", {"orgs": None}),
        ("SELECT count(*) FROM (SELECT orgs.id FROM orgs) AS anon_1", {"orgs": None}),
        ("SELECT name, sum(x) FROM orgs GROUP BY name ORDER BY name", {"orgs": None}),
        (
            "SELECT max(x) FROM orgs WHERE name = ? ORDER BY 1",
            {"orgs": "SELECT orgs.k FROM orgs WHERE name = ? LIMIT 10000"},
        ),
        (
            "SELECT EXISTS (SELECT 1 FROM orgs WHERE id = %(id)s) AS anon_1",
            {"orgs": "SELECT orgs.k FROM orgs WHERE id = %(id)s LIMIT 10000"},
        ),
        (
            "SELECT 1 WHERE EXISTS (SELECT 1 FROM orgs WHERE name = 'a FROM b')",
            {"orgs": "SELECT orgs.k FROM orgs WHERE name = 'a FROM b' LIMIT 10000"},
        ),
        (
            "SELECT o.a FROM orgs AS o JOIN users u ON id = u.o WHERE x = %s LIMIT 1 FOR UPDATE",
            {
                "orgs": "SELECT o.k FROM orgs AS o JOIN users u ON id = u.o WHERE x = %s LIMIT 1",
                "users": "SELECT u.k FROM orgs AS o JOIN users u ON id = u.o WHERE x = %s LIMIT 1",
            },
        ),
        ("SELECT ?, name FROM orgs WHERE id = ?", {}),  # the places of placeholders would change
        ("SELECT count(*) FROM orgs WHERE id = 1 LIMIT ?", {}),
        ("SELECT a FROM orgs UNION SELECT b FROM users", {}),
        ("SELECT EXISTS (SELECT 1 FROM a) OR EXISTS (SELECT 1 FROM b)", {}),
        ("WITH a AS (SELECT 1) SELECT * FROM a", {}),
        ("SELECT 1", {}),
        ("INSERT INTO orgs SELECT * FROM old", {}),
    ],
)
def test_what_a_select_reads_is_told_by_its_text(sql, read):
    found = {each.table[1]: each.rest and each.again(["k"]) for each in reads_of(sql)}
    assert found == read


# --- outcomes


@pytest.mark.parametrize(
    ("reports", "failed"),
    [
        ("setup+ call+ teardown+", False),
        ("setup+ call- teardown+", True),
        ("setup+ call+ teardown-", True),
        ("setup-", True),
        ("setup+ call- call+ teardown+", True),  # the first is a subtest's
        ("setup+ call- teardown+ setup+ call+ teardown+", False),  # run once more
    ],
)
def test_how_a_test_has_ended_is_told_by_all_its_reports(reports, failed):
    outcomes = Outcomes()
    told = []
    for each in reports.split():
        passed = each.endswith("+")
        report = SimpleNamespace(nodeid="a", when=each[:-1], passed=passed, failed=not passed)
        if outcomes.add(report):
            told.append(outcomes.failed["a"])
    assert outcomes.failed == {"a": failed}
    assert told[-1] is failed


# --- orders

TESTS = [
    *(f"test_a.py::test_{n}" for n in range(6)),
    *(f"test_a.py::TestOne::test_{n}" for n in range(6)),
    *(f"test_b.py::TestTwo::test_{n}[{m}]" for n in range(3) for m in range(3)),
]


def groups(names):
    """The modules and classes in the order in which they are met, each time they begin."""
    found = []
    for name in names:
        group = name.split("::")[:-1]
        if len(group) == 1:
            group.append("")
        if not found or found[-1] != group:
            found.append(group)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_modules_and_classes_stay_together_in_every_order(seed):
    """Or else their fixtures would be set up again and again, which no run of the suite does."""
    order = shuffled(TESTS, seed, str)
    assert sorted(order) == sorted(TESTS)
    modules = [name.split("::")[0] for name in order]
    assert modules == sorted(modules, key=modules.index)
    classes = [group for group in groups(order) if group[1]]
    assert len(classes) == len({tuple(group) for group in classes})


def test_another_seed_is_another_order_and_a_few_tests_keep_theirs():
    order = shuffled(TESTS, 1, str)
    assert order != shuffled(TESTS, 2, str)
    few = random.Random(0).sample(TESTS, 8)
    assert shuffled(few, 1, str) == [name for name in order if name in few]


def test_what_a_test_is_given_may_look_like_a_class():
    def in_class(name):
        return name.partition("[")[0].rpartition("::")[0]

    tests = [f"test_a.py::{where}test_{n}[a::b]" for where in ("", "TestOne::") for n in range(6)]
    tests += [f"test_a.py::TestOne::test_{n}[c::d]" for n in range(6)]
    for seed in range(5):
        there = [in_class(each) == "test_a.py::TestOne" for each in shuffled(tests, seed, str)]
        assert sum(a != b for a, b in itertools.pairwise(there)) <= 2
    known = Wording({}, (), (), lambda _table: False)
    assert known.tidy_cure("test_a.py::TestOne::test_it[a::b]").startswith("def test_it(tidy):")


def test_a_listed_order_leaves_out_what_is_not_listed():
    assert as_listed(["a", "b", "c"], ["c", "a"], str) == ["c", "a"]


def test_a_further_run_is_not_asked_for_an_audit():
    given = ["-q", "--tidy-audit", "--tidy-audit-seeds", "5", "--tidy-audit-json=x", "tests"]
    assert list(without_audit(given)) == ["-q", "tests"]


# --- who made what


def known(history, **more):
    told = Wording({"orgs": "Org"}, (), more.pop("own", ()), lambda _table: False)
    return {(each.test, each.kind): each for each in row_findings(history, told)}


def test_shared_fixtures_may_be_read_and_not_changed():
    history = RowHistory(lambda _table, _key: True)
    row = RowKey(ORGS, (1,))
    history.add(
        Maker("fixture org", is_test=False), [Difference(ORGS, frozenset({(1,)}))], Observations()
    )
    history.add(Maker("reads"), [], Observations(loaded={row}))
    history.add(
        Maker("changes"), [Difference(ORGS, changed=frozenset({(1,)}))], Observations(loaded={row})
    )
    told = known(history)
    assert set(told) == {("changes", FindingKind.CHANGES), ("fixture org", FindingKind.SHARED)}
    assert "preserve(select(Org))" in told["changes", FindingKind.CHANGES].cure


def test_rows_that_were_there_before_may_be_read():
    history = RowHistory(lambda _table, _key: True)
    history.add(Maker("reads"), [], Observations(loaded={RowKey(ORGS, (1,))}))
    assert known(history) == {}


def test_a_key_that_comes_again_is_the_row_of_who_inserted_it():
    """SQLite gives the key of a deleted row to the next; a row that is rolled back has one too."""
    history = RowHistory(lambda _table, _key: True)
    history.add(Maker("a"), [Difference(ORGS, frozenset({(1,)}))], Observations())
    row = RowKey(ORGS, (1,))
    history.add(Maker("b"), [], Observations(loaded={row}, inserted={row}))
    assert set(known(history)) == {("a", FindingKind.LEAVES)}


def test_what_a_test_does_to_its_own_rows_is_no_fault():
    """Also with a look between, as where a shared fixture is set up in the middle of a test."""
    history = RowHistory(lambda _table, _key: True)
    key = frozenset({(1,)})
    for did in ("appeared", "changed", "gone"):
        history.add(Maker("a"), [Difference(ORGS, **{did: key})], Observations())
    assert known(history) == {}


def test_what_no_look_shows_is_believed_as_it_was_heard():
    history = RowHistory(lambda _table, _key: False)
    row, other = RowKey(ORGS, (1,)), RowKey(ORGS, (2,))
    history.add(Maker("a"), [], Observations(committed=[("inserted", row), ("updated", row)]))
    history.add(Maker("b"), [], Observations(committed=[("updated", row), ("deleted", other)]))
    history.add(Maker("c"), [], Observations(committed=[("inserted", other), ("deleted", other)]))
    assert set(known(history)) == {
        ("a", FindingKind.LEAVES),
        ("b", FindingKind.CHANGES),
        ("b", FindingKind.DELETES),
    }


def test_a_database_of_ones_own_is_nobodys_business():
    history = RowHistory(lambda _table, _key: True)
    history.add(Maker("a"), [Difference(ORGS, frozenset({(1,)}))], Observations())
    assert known(history, own={"here"}) == {}


# --- the report


def report():
    many = [(f"k{n}" * 99,) for n in range(9)]
    history = RowHistory(lambda _table, _key: True)
    history.add(
        Maker("t.py::test_<b>"), [Difference(ORGS, frozenset(many), more=5)], Observations()
    )
    worse = Finding(
        "worse", FindingKind.ORDER, "<i>", "& cure", others=["t.py::test_<b>"], proof="2 <runs>"
    )
    runs = [
        AuditRun("as it is", {"worse": True, "a": False, "b": False}),
        AuditRun("<seed 1>", {"worse": False}, 1, kind=RunKind.SEED, changed=("<x> has changed",)),
    ]
    return report_of([*known(history).values(), worse], runs, ["<note>"], ["<x> has changed"])


def test_the_worst_comes_first():
    assert [culprit.test for culprit in report().culprits] == ["worse", "t.py::test_<b>"]
    assert next(lines(report())) == "2 culprit(s), 3 test(s): 1 needs an order, 1 leaves rows"


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_longer_than_the_terminal(width):
    assert max(map(len, lines(report(), width))) <= width


def test_text_json_and_html_agree():
    """Each has every finding, how it was proved, what was not put back, and what was not seen."""
    said = report().as_json()
    text, page = " ".join(" ".join(lines(report(), 500)).split()), html(report())
    assert text.startswith(said["headline"])
    assert escape(said["headline"], quote=True) in page
    for culprit in said["culprits"]:
        found = [culprit["test"]]
        for each in culprit["findings"]:
            found += [each["said"], each["proof"], each["cure"]]
        for each in found:
            assert each in text
            assert escape(each) in page
    for each in said["notes"] + said["not_put_back"]:
        assert each in text
        assert f"<li>{escape(each)}</li>" in page
    assert [run["changed"] for run in said["runs"]] == [[], ["<x> has changed"]]


def test_the_page_shows_who_depends_on_whom_without_scripts_or_the_network():
    page = html(report())
    picture = page[page.index("<svg") : page.index("</svg>")]
    ET.fromstring(f"{picture}</svg>")
    assert "worse: needs an order (t.py::test_&lt;b&gt;)" in picture
    assert picture.count("<polygon") == 1
    assert "prefers-color-scheme: dark" in page
    for outside in ("<script", "http", "url(", "@import", "<link"):
        assert outside not in page
    nothing = report_of([], [AuditRun("as it is", {"a": False})], [])
    assert "<svg" not in html(nothing)


def test_a_circle_of_tests_is_drawn_too():
    names = [f"test_a.py::test_{n}" for n in range(9)]
    circle = [
        Finding(test, FindingKind.ORDER, "", "", others=[other])
        for test, other in zip(names, [*names[1:], names[0]], strict=True)
    ]
    page = html(report_of(circle, [AuditRun("as it is", dict.fromkeys(names, False))], []))
    assert (page.count("<polygon"), page.count("<rect")) == (9, 18)


def test_json_has_the_first_few_keys_cut_and_the_count():
    said = json.loads(json.dumps(report().as_json()))
    (left,) = said["culprits"][1]["findings"]
    assert left["rows"] == 14
    assert len(left["keys"]) == 5
    assert max(map(len, left["keys"])) <= 60


def test_a_table_without_a_class_is_selected_by_its_name():
    history = RowHistory(lambda _table, _key: True)
    history.add(Maker("test_one"), [Difference(ORGS, changed=frozenset({(1,)}))], Observations())
    (finding,) = row_findings(history, Wording({}, (), (), lambda _table: False))
    assert finding.cure == "tidy.tracker.preserve(select(orgs)) before the change"


def test_a_key_that_a_terminal_would_obey_is_shown_as_text():
    history = RowHistory(lambda _table, _key: True)
    keys = frozenset({("a\x1b[31m\n\ud800",)})
    history.add(Maker("test_one"), [Difference(ORGS, appeared=keys)], Observations())
    (finding,) = row_findings(history, Wording({}, (), (), lambda _table: False))
    assert finding.text == r"leaves 1 row(s) of main.orgs (a\x1b[31m\n\ud800)"


def test_html_escapes_every_name():
    page = html(report())
    for text in ("test_<b>", "<i>", "& cure", "<note>", "2 <runs>", "<x>", "<seed 1>"):
        assert text not in page
    assert "t.py::test_&lt;b&gt;" in page
    assert "<script" not in page
