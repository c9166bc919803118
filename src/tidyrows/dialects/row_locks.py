"""Role *row locks*: a SELECT that locks its rows, and waits no longer than it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tidyrows.dialects.driver import DriverAccess
from tidyrows.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from typing import Any

    import sqlalchemy as sa


class RowLocks(DriverAccess):
    """Locks on rows."""

    lock_wait_codes: ClassVar[frozenset[Any]] = frozenset()
    """A lock was not free in time, or at once."""

    def refuse_row_locks(self, *, nowait: bool, skip_locked: bool) -> None:
        """Raise ArgumentError where the database has no such lock."""
        raise ArgumentError(
            f"tidyrows does not know how long {self._dialect().name} waits for a row. Write "
            f"session.scalars(select(...).with_for_update()).",
            argument="session",
        )

    def waiting_for_rows(
        self, connection: sa.Connection, tables: Sequence[sa.Table], timeout: float
    ) -> AbstractContextManager[object]:
        """A block in which a statement waits so many seconds at most for each row or table.

        After it the connection waits as before, and its transaction can be used, also where the
        wait was in vain.

        Args:
            connection: in a transaction.
            tables: whose rows are locked.
            timeout: in seconds; 0 does not wait.
        """
        raise NotImplementedError
