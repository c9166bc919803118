"""Role *spaces*: a schema, a database or a file that one test has for itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from tidyrows.dialects.driver import DriverAccess

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import sqlalchemy as sa

    from tidyrows.dialects.driver import Errors
    from tidyrows.dialects.locks import Blocker


LOCK_SECONDS = 5.0
"""The longest wait for a lock on rows that a test has left, or on its tables."""


class Space(ABC):
    """A schema, a database or a file with a name of tidyrows.

    Whoever calls a method that changes it holds the advisory lock of its name.

    Args:
        dialect: of the engine.
        engine: on the suite's own database.
        name: its name, of letters, digits and ``_`` only.
        connection: of the role that makes spaces, in autocommit; None where there is no server.

    Attributes:
        kind: what it is, for messages.
        connection: as given.
        is_copied: whether it is a copy of a template, which is built in its place.
    """

    kind: ClassVar[str]
    is_copied: ClassVar[bool] = False

    def __init__(
        self, dialect: Errors, engine: sa.Engine, name: str, connection: sa.Connection | None
    ) -> None:
        self.dialect = dialect
        self.suite_engine = engine
        self.name = name
        self.connection: Any = connection

    @classmethod
    def managing(cls, engine: sa.Engine) -> sa.Engine:
        """The engine whose connections make spaces and hold their locks.

        The given one has connected before, but its connections may be of another loop.
        """
        return engine

    @abstractmethod
    def marks(self) -> dict[str, str | None]:
        """All spaces of tidyrows, with the mark of those that are complete."""

    @abstractmethod
    def prepare(self) -> None:
        """Set on its connection what the methods below need."""

    @abstractmethod
    def create(self) -> None:
        """Make it, empty, in place of one of its name."""

    def copy(self, template: str) -> None:
        """Make it a copy of a complete one, in place of one of its name."""
        raise NotImplementedError

    @abstractmethod
    def replay(self, statements: Sequence[str]) -> None:
        """Run SQL in it, in few round trips."""

    @abstractmethod
    def finish(self, mark: str) -> None:
        """Mark it as complete; with an empty mark it is finished, and nobody else will use it."""

    @abstractmethod
    def drop(self) -> None:
        """Drop it, if it is there."""

    @abstractmethod
    def engine(self) -> sa.Engine:
        """A new engine that leads to it, and whose URL leads other processes to it."""

    @abstractmethod
    def foreign_keys_out(self) -> list[str]:
        """The foreign keys that lead out of it, as a sentence has them."""

    @abstractmethod
    def learn(self) -> Mapping[str, Any]:
        """Keep its rows as those that ``reset`` leaves; called when it has been built.

        Returns:
            What :meth:`recall` needs, as JSON has it.
        """

    @abstractmethod
    def recall(self, learned: Mapping[str, Any]) -> bool:
        """Keep what it had when it was built, as ``learn`` returned it; False if it has changed.

        Rows that are not of those that it was built with are no change.
        """

    @abstractmethod
    def is_clean(self) -> bool:
        """Whether it has the tables and the rows that it was built with."""

    @abstractmethod
    def reset(self, *, defined: bool = False) -> bool:
        """Give it the rows back that it was built with, and no others, after a test.

        Args:
            defined: whether the test has run statements that may have changed definitions.

        Returns:
            False where its definitions have changed, so that it must be built anew.

        Raises:
            DBAPIError: a wait for a lock has ended.
        """

    @abstractmethod
    def restore(self) -> bool:
        """As ``reset``, whatever was done to it; False where it is not as it was built."""

    def release(self) -> None:
        """Close what it has opened besides its connection."""
        return

    def users(self) -> list[Blocker]:
        """The sessions that may hold locks in it."""
        return []


class Spaces(DriverAccess):
    """What a database has to keep tests apart."""

    space_kinds: ClassVar[Mapping[str, type[Space]]] = MappingProxyType({})
    """What a level of isolation makes, by its name; a level that is missing is refused."""
