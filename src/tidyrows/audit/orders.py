"""Which tests pass only in one order, or only once, and which earlier test that may be due to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidyrows.audit.findings import Fault, Finding, function
from tidyrows.audit.makers import Touch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tidyrows.audit.makers import Book
    from tidyrows.audit.runs import Run

_NAMED = 3


def rerun(first: Run, seeds: Sequence[int], run: Callable[[str, int | None], Run]) -> Iterator[Run]:
    """The runs after the first, each when it is asked for.

    Once more in the same order, since what fails then needs no other order to fail; in the order of
    each seed; and where something failed there only, in the first order again, to tell the order
    from what the runs before have left.
    """
    again = run("once more in its own order", None)
    yield again
    others = []
    for seed in seeds:
        others.append(run(f"seed {seed}", seed))
        yield others[-1]
    if any(_fails(each, test) for each in others for test in _passing([first, again])):
        yield run("at last in its own order", None)


def of_orders(runs: Sequence[Run], book: Book) -> Iterator[Finding]:
    """What is wrong by how the runs have ended."""
    own = [each for each in runs if each.seed is None]
    others = [each for each in runs if each.seed is not None]
    for test, failed in runs[0].failed.items():
        bad = [each for each in others if _fails(each, test)]
        good = [each for each in others if each.failed.get(test) is False]
        if failed:
            if good and all(_fails(each, test) for each in own[1:]):
                told = f"fails in its own order, passes with --tidy-audit-order {good[0].seed}"
                yield _ordered(test, told, own[0], good[0], book)
        elif any(_fails(each, test) for each in own[1:]):
            yield _not_twice(test, next(each for each in own[1:] if _fails(each, test)), book)
        elif bad:
            told = f"passes in its own order, fails with --tidy-audit-order {bad[0].seed}"
            if len(bad) > 1:
                told += f" ({len(bad)} of {len(others)} orders)"
            yield _ordered(test, told, bad[0], own[0], book)


def _ordered(test: str, told: str, bad: Run, good: Run, book: Book) -> Finding:
    suspects = _suspects(test, bad, good, book)
    said = told + (f"; perhaps because of {', '.join(suspects)}" if suspects else "")
    cure = "let it make all that it needs"
    if suspects:
        cure += f", and {function(suspects[0])} delete what it makes: take the tidy fixture"
    return Finding(test, Fault.ORDER, said, cure, whose=suspects)


def _not_twice(test: str, run: Run, book: Book) -> Finding:
    leavers = book.leavers(book.looked_at.get(test, ()))
    suspects = [test] if test in leavers else [name for name, _n in leavers.most_common(_NAMED)]
    said = f"passes the first time, fails {run.name}"
    if suspects:
        named = "it" if suspects == [test] else ", ".join(suspects)
        said += f", in tables where {named} left rows"
    cure = "take the tidy fixture, or set tidy_autouse = true in the ini file"
    return Finding(test, Fault.TWICE, said, cure, whose=suspects)


def _suspects(test: str, bad: Run, good: Run, book: Book) -> list[str]:
    """The tests that stood on its other side where it passed, and have to do with its tables.

    Those whose rows it read or changed first, then those that left rows in its tables.
    """
    moved = _before(bad, test) ^ _before(good, test)
    met = [
        maker.name
        for who, touched in book.touched.items()
        if who.name == test
        for (touch, _table, maker) in sorted(touched, key=lambda key: key[0] is not Touch.READ)
    ]
    leavers = book.leavers(book.looked_at.get(test, ()))
    wanted = dict.fromkeys([*met, *(name for name, _count in leavers.most_common())])
    return [name for name in wanted if name in moved and name != test][:_NAMED]


def _before(run: Run, test: str) -> set[str]:
    names = list(run.failed)
    return set(names[: names.index(test)]) if test in run.failed else set()


def _passing(runs: Sequence[Run]) -> list[str]:
    return [test for test in runs[0].failed if not any(_fails(each, test) for each in runs)]


def _fails(run: Run, test: str) -> bool:
    return run.failed.get(test) is True
