"""The report of what one worker of one run left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidyrows.keys import TableName

_TESTS = 3
"""How many tests the report of a worker's rows names."""


@dataclass(frozen=True, slots=True)
class Orphans:
    """What one worker of one run left.

    Attributes:
        run: the run's id.
        worker: the worker's id.
        tests: the tests that made the rows, as far as they are known.
        host: the machine; None where it is not known.
        pid: the process on that machine.
        age: seconds since the worker was last known to live.
        rows: the number of rows, by table.
        external: the number of external resources, by kind.
        kept: the name under which ``keep_on_failure`` kept the rows; None for other rows.
    """

    run: str
    worker: str
    tests: tuple[str, ...]
    host: str | None
    pid: int | None
    age: float
    rows: dict[TableName, int] = field(default_factory=dict)
    external: dict[str, int] = field(default_factory=dict)
    kept: str | None = None

    def __str__(self) -> str:
        things = [f"{table} {count}" for table, count in self.rows.items()]
        things += [f"{kind} {count}" for kind, count in self.external.items()]
        where = f" on {self.host}" if self.host else ""
        kept = f", kept as {self.kept}" if self.kept else ""
        tests = f", made in {first_names(self.tests, _TESTS)}" if self.tests else ""
        return (
            f"worker {self.worker} of run {self.run}{where}, {self.age:.0f} s ago{kept}: "
            f"{', '.join(things) or 'nothing'}{tests}"
        )


def first_names(names: Sequence[str], most: int) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
