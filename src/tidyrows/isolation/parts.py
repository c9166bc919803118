"""Which inner transaction wrote what, in the order of writing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidyrows.isolation.stand_in import StandIn

_SHOWN = 70


@dataclass(slots=True, eq=False)
class Part:
    """What one inner transaction wrote, between two savepoints.

    Attributes:
        user: the stand-in that wrote.
        savepoint: where it begins.
        sql: its first statement.
        wrote: False for reads, which another one's writes come before: they may fail alone.
        names: the savepoints that the user has set in it.
        committed: its inner transaction is committed, and waits for those before it.
    """

    user: StandIn
    savepoint: str
    sql: str
    wrote: bool
    names: list[str] = field(default_factory=list)
    committed: bool = False


class Parts:
    """The parts since the last moment at which all that was written was committed."""

    def __init__(self) -> None:
        self.all: list[Part] = []

    def __bool__(self) -> bool:
        return bool(self.all)

    @property
    def top(self) -> Part | None:
        """The last one."""
        return self.all[-1] if self.all else None

    def top_of(self, user: StandIn) -> Part | None:
        """The last one, where it is of a user's inner transaction."""
        top = self.top
        return top if top is not None and top.user is user and not top.committed else None

    def open_of(self, user: StandIn) -> list[Part]:
        """Those of a user's inner transaction."""
        return [part for part in self.all if part.user is user and not part.committed]

    def with_savepoint(self, user: StandIn, name: str) -> Part | None:
        """The one in which a user has set a savepoint."""
        return next((part for part in self.open_of(user)[::-1] if name in part.names), None)

    def later_than(self, own: Part) -> list[Part]:
        """What others have written since."""
        later = self.all[self.all.index(own) + 1 :]
        return [part for part in later if part.user is not own.user and part.wrote]

    def cut(self, first: Part, *, kept: bool = False) -> None:
        """Forget this one, unless it is kept, and all after it."""
        del self.all[self.all.index(first) + kept :]

    def forget_open(self, user: StandIn) -> None:
        """Forget those of a user that have written nothing."""
        self.all = [part for part in self.all if part.user is not user or part.committed]

    @property
    def are_settled(self) -> bool:
        """Whether all that was written is committed, and no savepoint is set."""
        return all(part.committed or not (part.wrote or part.names) for part in self.all)


def short(sql: str) -> str:
    """A statement, or another text, in a message."""
    sql = " ".join(sql.split())
    return sql if len(sql) <= _SHOWN else f"{sql[:_SHOWN]}..."


def reason(error: BaseException) -> str:
    """An error in a message."""
    return f"{type(error).__name__}: {short(str(error))}".rstrip(": ")
