"""The runs after the first, and the tests that pass in some of them only.

First all tests: once more in their own order, and in the order of each seed. Then the suspects by
themselves; and where one of them ends otherwise among the others, that test after one of those that
ran before it, until a pair shows the difference. Every run begins with the database as it was.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from tidyrows.audit.findings import Finding, FindingKind, function
from tidyrows.audit.runs import RunKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from tidyrows.audit.row_history import RowHistory
    from tidyrows.audit.runs import AuditRun

ALONE = 20
"""How many suspects are run by themselves."""
SHORT = 60
"""How many runs of a few tests there are altogether."""
_NAMED = 3


class Run(Protocol):
    """Runs these tests: in the order of the list, or of a seed."""

    def __call__(self, name: str, order: Sequence[str], seed: int | None = None, /) -> AuditRun:
        """Run them."""
        ...


class OrderRuns:
    """The runs after the first.

    Args:
        first: the first.
        seeds: of the other orders.
        history: what the tests of the first did.
        run: runs some tests.
        has_time: whether another run of a few tests may begin.

    Attributes:
        runs: those that have ended, the first included.
        notes: what was not run.
    """

    def __init__(
        self,
        first: AuditRun,
        seeds: Iterable[int],
        history: RowHistory,
        run: Run,
        has_time: Callable[[], bool] = lambda: True,
    ) -> None:
        self.runs = [first]
        self.notes: list[str] = []
        self._tests = list(first.failed)
        self._seeds = seeds
        self._history = history
        self._run = run
        self._has_time = has_time
        self._short = SHORT
        self._is_used_up = False

    def run_all(self) -> None:
        """Run them, each kept when it has ended."""
        self._add("once more in its own order", self._tests, RunKind.OWN)
        for seed in self._seeds:
            self._add(f"seed {seed}", self._tests, RunKind.SEED, seed)
        if len(self._tests) > 1:
            self._run_suspects()

    def _run_suspects(self) -> None:
        suspects = self._suspects()
        unexplained: list[str] = []
        for number, test in enumerate(suspects):
            if number >= ALONE or not self._run_short("alone", [test]):
                left = len(suspects) - number
                self.notes.append(f"{left} of {len(suspects)} suspects were not run alone")
                break
            if not self._explain(test):
                unexplained.append(test)
        if unexplained:
            why = "all short runs were used up" if self._is_used_up else "there may be several"
            self.notes.append(
                f"which one earlier test makes the difference for {', '.join(unexplained)} was not "
                f"found: {why}"
            )

    def _suspects(self) -> list[str]:
        """Tests that end otherwise in another order, fail, or used rows of other tests."""
        used = [
            maker.name
            for maker, touched in self._history.touched.items()
            if any(by.is_test for _access, _table, by in touched)
        ]
        differ = [test for test in self._tests if len(set(_outcomes(self.runs, test))) > 1]
        failed = [test for test in self._tests if self.runs[0].failed[test]]
        found = dict.fromkeys([*differ, *failed, *used])
        return [test for test in found if not _is_by_chance(self.runs, test)]

    def _explain(self, test: str) -> bool:
        """Look for one test that makes the difference; whether there is nothing left to explain."""
        alone = _alone(self.runs, test)
        whole = None if alone is None else _other_end(self.runs, test, ends=alone.failed[test])
        if alone is None or whole is None:
            return True
        before = _before(whole, test)
        first = suspects_of(test, before, self._history)
        if any(self._differs([each], test) for each in first):
            return True
        return self._narrow([each for each in before if each not in first], test)

    def _narrow(self, before: Sequence[str], test: str) -> bool:
        """Halve the tests before it as long as one half makes the difference, the nearer first."""
        while len(before) > 1:
            half = len(before) // 2
            parts = before[half:], before[:half]
            before = next((part for part in parts if self._differs(part, test)), ())
            if len(before) == 1:
                return True
        return len(before) == 1 and self._differs(before, test)

    def _differs(self, before: Sequence[str], test: str) -> bool:
        alone = _alone(self.runs, test)
        name = f"after {before[0] if len(before) == 1 else f'{len(before)} others'}"
        if alone is None or not self._run_short(name, [*before, test]):
            return False
        return self.runs[-1].failed[test] != alone.failed[test]

    def _run_short(self, name: str, order: Sequence[str]) -> bool:
        """Whether such a run may begin, and has come to its last test."""
        self._is_used_up = self._is_used_up or not self._short or not self._has_time()
        if self._is_used_up:
            return False
        self._short -= 1
        kind = RunKind.ALONE if len(order) == 1 else RunKind.AFTER
        self._add(f"{order[-1]} {name}", order, kind)
        return order[-1] in self.runs[-1].failed

    def _add(self, name: str, order: Sequence[str], kind: RunKind, seed: int | None = None) -> None:
        self.runs.append(replace(self._run(name, order, seed), kind=kind))


def suspects_of(test: str, before: Iterable[str], history: RowHistory) -> list[str]:
    """Of the tests before it, at most three that it most likely depends on, the likeliest first."""
    ranks = {other: history.influence(other, test) for other in before if other != test}
    return sorted((other for other in ranks if any(ranks[other])), key=lambda o: ranks[o])[::-1][
        :_NAMED
    ]


# -- what the runs have shown --------------------------------------------------------------------


def order_findings(runs: Sequence[AuditRun], history: RowHistory) -> Iterator[Finding]:
    """What is wrong by the outcomes of the runs."""
    for test in runs[0].failed:
        if _is_by_chance(runs, test):
            yield _not_twice(test, runs)
        elif len(set(_outcomes(runs, test))) > 1:
            yield _ordered(test, runs, history)


def _not_twice(test: str, runs: Sequence[AuditRun]) -> Finding:
    first, again = [run for run in runs if run.kind is RunKind.OWN and test in run.failed][:2]
    ends = ("fails", "passes") if first.failed[test] else ("passes", "fails")
    text = f"{ends[0]} the first time, {ends[1]} {again.name}"
    if again.changed:
        cure = "take the tidy fixture, or set tidy_autouse = true, and insert through SQLAlchemy"
    else:
        cure = "what stays is no row (a sequence, a file), or the test draws by chance: fix that"
    return Finding(test, FindingKind.TWICE, text, cure, proof=_proof([first, again]))


def _ordered(test: str, runs: Sequence[AuditRun], history: RowHistory) -> Finding:
    alone, own = _alone(runs, test), runs[0]
    pair = None if alone is None else _pair(runs, test, ends=alone.failed[test])
    if alone is not None and pair is not None:
        cause = next(iter(pair.failed))
        text = f"{_verb(alone, test)} alone, {_verb(pair, test)} after {cause}"
        needs = alone.failed[test]
        return Finding(
            test,
            FindingKind.ORDER,
            text,
            "let it make all that it needs" if needs else _tidy(cause),
            others=[cause],
            proof=_proof([alone, pair]),
        )
    base = own if alone is None else alone
    other = _other_end(runs, test, ends=base.failed[test])
    if other is None:  # some tests together, and not one of them
        other = next(run for run in runs if run.failed.get(test) is not base.failed[test])
    before, without = _before(other, test), set(_before(base, test))
    suspects = suspects_of(test, [each for each in before if each not in without], history)
    if not suspects:  # those that ran before it in one run, and after it in the other
        suspects = suspects_of(test, without - {*before}, history)
    text = f"{_verb(base, test)} {_where(base)}, {_verb(other, test)} {_where(other)}"
    orders = [run for run in runs if run.kind is RunKind.SEED and test in run.failed]
    as_it = [run for run in orders if run.failed[test] == other.failed[test]]
    if other.kind is RunKind.SEED and len(orders) > 1:
        text += f" ({len(as_it)} of {len(orders)} orders)"
    if suspects:
        text += f"; perhaps because of {', '.join(suspects)}"
    cure = "let it make all that it needs"
    if suspects:
        cure += f", and {_tidy(suspects[0])}"
    return Finding(
        test, FindingKind.ORDER, text, cure, others=suspects, proof=_proof([base, other])
    )


def _proof(used: Sequence[AuditRun]) -> str:
    """How a finding was proved: the runs that it is made from, and what they stood on."""
    text = f"proved by {len(used)} runs"
    if not any(run.changed for run in used):
        return f"{text} on the database as it was"
    same = len({run.changed for run in used}) == 1
    return f"{text} on {'the same' if same else 'a'} changed database"


def _tidy(test: str) -> str:
    return f"let {function(test)} delete what it makes: take the tidy fixture"


def _where(run: AuditRun) -> str:
    if run.seed is not None:
        return f"with --tidy-audit-order {run.seed}"
    words = {RunKind.OWN: "in its own order", RunKind.ALONE: "alone"}
    return words.get(run.kind, f"after {len(run.failed) - 1} other tests")


def _verb(run: AuditRun, test: str) -> str:
    return "fails" if run.failed[test] else "passes"


def _outcomes(runs: Iterable[AuditRun], test: str) -> list[bool]:
    """How it ended in the runs of all tests, and alone."""
    return [
        run.failed[test] for run in runs if run.kind is not RunKind.AFTER and test in run.failed
    ]


def _is_by_chance(runs: Iterable[AuditRun], test: str) -> bool:
    """Whether it ends otherwise in the very same order."""
    own = {run.failed[test] for run in runs if run.kind is RunKind.OWN and test in run.failed}
    return len(own) > 1


def _alone(runs: Iterable[AuditRun], test: str) -> AuditRun | None:
    found = (run for run in runs if run.kind is RunKind.ALONE and test in run.failed)
    return next(found, None)


def _other_end(runs: Iterable[AuditRun], test: str, *, ends: bool) -> AuditRun | None:
    """The first run of all tests in which it ended otherwise."""
    whole = (run for run in runs if run.kind in {RunKind.OWN, RunKind.SEED})
    return next((run for run in whole if run.failed.get(test) is (not ends)), None)


def _pair(runs: Iterable[AuditRun], test: str, *, ends: bool) -> AuditRun | None:
    """A run of one other test and this one, in which it ended otherwise than alone."""
    pairs = (run for run in runs if run.kind is RunKind.AFTER)
    found = (run for run in pairs if list(run.failed)[1:] == [test])
    return next((run for run in found if run.failed[test] is (not ends)), None)


def _before(run: AuditRun, test: str) -> list[str]:
    names = list(run.failed)
    return names[: names.index(test)] if test in run.failed else []
