"""What a level of isolation opens for a test, and closes after it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tidyrows.arguments import Kind

if TYPE_CHECKING:
    from collections.abc import Collection

    import sqlalchemy as sa

    from tidyrows.worker import WorkerContext


NONE, WORKER = "none", "worker"
NAMES = (NONE, WORKER, "transaction", "schema", "database")
"""The levels, from the least isolation to the most."""
LEVEL = Kind(lambda value: value in NAMES, f"one of {', '.join(NAMES)}", "'worker'")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What :func:`~tidyrows.isolate` was asked for, besides the level.

    Attributes:
        context: run, worker and test.
        metadata: the tables to make.
        migrate: what makes them instead.
        seed: what writes the reference data.
        pool: whether a schema or database is kept for the next test and the next run.
        allow_production: as for ``ResourceTracker``.
    """

    context: WorkerContext
    metadata: Any = None
    migrate: Any = None
    seed: Any = None
    pool: Any = True
    allow_production: bool | Collection[str] = False


class Level(ABC):
    """How the rows of a test are kept from those of others.

    All methods are synchronous; under an asynchronous engine they run in a greenlet.

    Args:
        engine: on the suite's database.
        wanted: the other arguments of :func:`~tidyrows.isolate`.

    Attributes:
        name: as users write it.
        deletes_rows: whether tracked rows are deleted one by one when the test ends.
        is_visible: whether other processes see what the test commits.
        undoes_rows: whether nothing that the test writes is left after :meth:`close`.
        schema: the schema, database or file that the test has for itself.
    """

    name: ClassVar[str]
    deletes_rows: ClassVar[bool] = False
    is_visible: ClassVar[bool] = True
    undoes_rows: ClassVar[bool] = False

    def __init__(self, engine: sa.Engine, wanted: Wanted) -> None:
        self.engine = engine
        self.wanted = wanted
        self.schema: str | None = None

    @abstractmethod
    def open(self) -> sa.Engine:
        """The engine that the test uses."""

    @abstractmethod
    def close(self) -> None:
        """After the test, whose tracker has stopped: undo what it wrote, and let go of the rest."""


class NoIsolation(Level):
    """The suite's own database; what a test writes stays."""

    name = NONE

    def open(self) -> sa.Engine:
        """The suite's engine."""
        return self.engine

    def close(self) -> None:
        """Nothing is undone."""


class WorkerLevel(NoIsolation):
    """The suite's own database, from which the tracked rows are deleted."""

    name = WORKER
    deletes_rows = True
