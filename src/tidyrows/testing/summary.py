"""What all tests of a run created and what became of it, summed over the workers."""

from __future__ import annotations

import atexit
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tidyrows.suite.residue import Notes, RunResidue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import sqlalchemy as sa

    from tidyrows.factories.seeding import Seeded
    from tidyrows.suite.cleanups import Record
    from tidyrows.testing.tidy import Tidy

_SLOW = 1.0
"""Seconds from which on a cleanup is worth a line."""
_SHOWN = 3
_MOST = 10


@dataclass(slots=True)
class RowCounts:
    """Rows of several cleanups."""

    created: Counter[str] = field(default_factory=Counter)
    deleted: Counter[str] = field(default_factory=Counter)
    undone: Counter[str] = field(default_factory=Counter)  # by the end of a level of isolation
    dependents: int = 0  # deleted rows that nobody had tracked
    retries: int = 0

    def add(self, record: Record, created: Mapping[str, int]) -> None:
        """Add the record of one cleanup."""
        self.created.update(created)
        self.deleted.update(record.get("deleted", {}))
        self.undone.update(record.get("undone", {}))
        self.dependents += record.get("dependents", 0)
        self.retries += record.get("retries", 0)

    def text(self, begin: str, more: str = "", *, may_be_all: bool = False) -> str:
        """One sentence: what was created, how many were deleted, and how many times it took."""
        deleted = self.deleted.total()
        is_all = may_be_all and deleted - self.dependents == self.created.total()
        text = begin + ("all deleted" if is_all else f"{deleted} deleted")
        if self.dependents:
            made = "made by the application"
            text += (
                f", {self.dependents} more {made}"
                if is_all
                else (f" ({self.dependents} of them {made})")
            )
        text += more
        if self.retries:
            text += f"; {self.retries} transaction(s) run again"
        return text


@dataclass(slots=True)
class SuiteSummary:
    """The sum over tests that do not use tidyrows themselves."""

    rows: RowCounts = field(default_factory=RowCounts)
    tests: Counter[str] = field(default_factory=Counter)  # rows left
    scopes: set[str] = field(default_factory=set)  # of these: modules, classes and the like
    stays: Counter[str] = field(default_factory=Counter)  # rows that no test created
    # the tests that changed rows of others, by table, keys and verb
    touched: dict[tuple[str, str, str], dict[str, None]] = field(default_factory=dict)
    untracked: dict[str, str] = field(default_factory=dict)  # text: the first test
    undeleted: list[str] = field(default_factory=list)
    outside: RunResidue = field(default_factory=RunResidue)  # that raw SQL made outside of tests

    def add(self, record: Record) -> None:
        """Add the record of one test, or of the rows that no test created."""
        test = str(record["test"])
        created: Counter[str] = Counter(record.get("created", {})) - Counter(record.get("gone", {}))
        self.rows.add(record, created)
        if created:
            self.tests[test] += created.total()
            self.scopes |= {test} if record.get("is_shared") else set()
        self.stays.update(record.get("stays", {}))
        for table, verb, rows in record.get("touched", ()):
            self.touched.setdefault((table, rows, verb), {})[test] = None
        for text in record.get("untracked", ()):
            self.untracked.setdefault(text, test)
        self.undeleted += record.get("undeleted", ())
        self.outside.add(test, record.get("outside", ()))

    def lines(self, *, everything: bool) -> Iterator[str]:
        """The summary; nothing where there is nothing to report."""
        most = None if everything else _MOST
        left = self.rows.created
        if left:
            tests, scopes = len(self.tests) - len(self.scopes), len(self.scopes)
            names = [f"{tests} test(s)"] if tests else []
            names += [f"wider fixtures of {scopes} scope(s)"] if scopes else []
            begin = f"{' and '.join(names)} left {left.total()} row(s), "
            yield self.rows.text(begin, may_be_all=True)
            yield from (f"  {table}: {count}" for table, count in left.most_common(most))
            worst = [f"{count} by {test}" for test, count in self.tests.most_common()]
            yield from _listed("most of them", worst, most)
        stays = [f"{table} {count}" for table, count in sorted(self.stays.items())]
        stays += self.outside.texts()
        if stays:
            yield (
                f"rows that stay, made before the first test or by session fixtures: "
                f"{', '.join(stays)}"
            )
        touched = [
            f"{table} {rows} {verb} by {_tests(tests, everything=everything)}"
            for (table, rows, verb), tests in sorted(self.touched.items())
        ]
        yield from _listed("rows that tests changed though they had not made them", touched, most)
        untracked = [f"{text} ({test})" for text, test in self.untracked.items()]
        yield from _listed("not tracked", untracked, most)
        yield from _listed("still there", self.undeleted, most)


class ResidueOfProcess:
    """Collects which rows tests leave, and prints them when the process ends.

    For frameworks without a hook for the end of a run.

    Attributes:
        forward: where it goes instead, if a framework that has such a hook runs the tests.
    """

    def __init__(self) -> None:
        self.forward: Callable[[Record], None] | None = None
        self._residue = RunResidue()
        self._engines: dict[str, sa.Engine] = {}
        self._seed: str | None = None
        atexit.register(self.print)

    def add(self, tidy: Tidy) -> None:
        """What the cleanup of a test has left."""
        notes = notes_of(tidy)
        test = tidy.context.test_id or "a test"
        if self.forward is not None and notes.found:
            self.forward({"test": test, "residue": notes.found, "engines": notes.engines})
        else:
            self._residue.add(test, notes.found)
            self._engines |= notes.engines

    def note_failure(self, seeded: Seeded) -> None:
        """A test has failed: its random values can be repeated."""
        if seeded.has_drawn:
            self._seed = seeded.base.value

    def print(self) -> None:
        """Look at what is still there, and print it."""
        residue, self._residue = self._residue, RunResidue()
        residue.look(self._engines)
        for line in residue.lines():
            print(line, file=sys.__stderr__)
        seed, self._seed = self._seed, None
        if seed is not None:
            line = f"tidyrows: TIDYROWS_SEED={seed} repeats the random values of the failed tests"
            print(line, file=sys.__stderr__)


def notes_of(tidy: Tidy) -> Notes:
    """Which rows of a test stay after its end."""
    left = not (tidy.deletes_rows or tidy.undoes_rows)
    return Notes(tidy.tracker, tidy.report, kept=tidy.cleanup.kept, not_isolated=left)


def _listed(title: str, lines: list[str], most: int | None) -> Iterator[str]:
    if lines:
        yield f"{title}:"
        yield from (f"  {line}" for line in lines[:most])
        if most is not None and len(lines) > most:
            yield f"  ... and {len(lines) - most} more (--tidy-report shows all)"


def _tests(tests: dict[str, None], *, everything: bool) -> str:
    names = list(tests)
    if everything or len(names) == 1:
        return ", ".join(names)
    return f"{names[0]} and {len(names) - 1} other test(s)"


@dataclass(slots=True)
class RunSummary:
    """The sum of all records."""

    rows: RowCounts = field(default_factory=RowCounts)
    tests: set[str] = field(default_factory=set)  # with rows
    leaked: int = 0
    held: int = 0
    kept: int = 0
    slowest: list[tuple[float, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    residue: RunResidue = field(default_factory=RunResidue)
    failed: bool = False  # rows are left, and no test's own error has reported them
    suite: SuiteSummary = field(default_factory=SuiteSummary)

    def add(self, record: Record) -> None:
        """Add the record of one cleanup, or a line to print."""
        if "failed" in record:
            self.fail(record["failed"])
            return
        if "note" in record:
            if record["note"] not in self.notes:  # several workers may say the same
                self.notes.append(record["note"])
            return
        self.residue.add(str(record.get("test", "")), record.get("residue", ()))
        if "seconds" in record:
            slowest = [*self.slowest, (float(record["seconds"]), str(record["test"]))]
            self.slowest = sorted(slowest, reverse=True)[:_SHOWN]
        if record.get("whole_suite"):
            self.suite.add(record)
            self.failed = self.failed or bool(record.get("undeleted"))
            return
        created = record.get("created", {})
        self.rows.add(record, created)
        self.tests |= {str(record["test"])} if created else set()
        self.leaked += record.get("leaked", 0)
        self.held += record.get("held", 0)
        self.kept += record.get("kept", 0)

    def fail(self, note: str) -> None:
        """Rows are left: print this line, and let the run fail."""
        self.notes.append(note)
        self.failed = True

    def look(self, engines: Mapping[str, sa.Engine]) -> None:
        """At the end of the run, see in these databases what is still there."""
        self.residue.look(engines)
        self.suite.outside.look(engines)

    def lines(self, *, tables: bool, residue: bool = True) -> Iterator[str]:
        """The summary; nothing where there is nothing to report."""
        created, deleted = self.rows.created, self.rows.deleted
        if created or deleted or self.leaked:
            counts = {
                "undone": self.rows.undone.total(),
                "leaked": self.leaked,
                "held": self.held,
                "kept": self.kept,
            }
            yield self.rows.text(
                f"{created.total()} row(s) created in {len(self.tests)} test(s), ",
                "".join(f", {count} {word}" for word, count in counts.items() if count),
            )
        if tables:
            for table in sorted(created | deleted):
                undone = self.rows.undone[table]
                more = f", {undone} undone" if undone else ""
                yield f"  {table}: {created[table]} created, {deleted[table]} deleted{more}"
        for seconds, test in self.slowest:
            if tables or seconds >= _SLOW:
                yield f"  cleanup took {seconds:.2f} s: {test}"
        yield from self.suite.lines(everything=tables)
        yield from self.notes
        if residue:
            yield from self.residue.lines(everything=tables)
