"""Role *inserts*: which rows an INSERT made, as far as the database can prove it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

from tidyrows.dialects.driver import DriverAccess

if TYPE_CHECKING:
    import sqlalchemy as sa

    from tidyrows.dialects.catalogue import RealTable
    from tidyrows.keys import KeyedTable

_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
# Prefixes of an INSERT after which it still inserts its row or fails.
_HARMLESS = frozenset({"", "LOW_PRIORITY", "HIGH_PRIORITY", "DELAYED", "OR ABORT", "OR ROLLBACK"})


class Inserts(DriverAccess):
    """INSERT statements, and the keys that the database generates for them."""

    reuses_keys: ClassVar[bool] = True
    """Whether a generated key may come again after its row is gone."""
    explicit_zero_is_generated: ClassVar[bool] = False
    """Whether a key 0 in an INSERT is replaced by the next number."""

    @property
    def counts_when_closed(self) -> bool:
        """Whether a cursor still has its row count once SQLAlchemy has closed it."""
        return True

    @property
    def returning(self) -> bool:
        """Whether INSERT has RETURNING (known after the engine's first connect)."""
        return bool(getattr(self._dialect(), "insert_returning", False))

    @property
    def executemany_returning(self) -> bool:
        """Whether INSERT of many rows has RETURNING (known after the engine's first connect)."""
        return bool(getattr(self._dialect(), "insert_executemany_returning", False))

    def delete_returning(self, *, several_tables: bool) -> bool:
        """Whether DELETE has RETURNING, also where its condition reads other tables."""
        flag = "delete_returning_multifrom" if several_tables else "delete_returning"
        return bool(getattr(self._dialect(), flag, False))

    def may_reuse_key(self, connection: sa.Connection, table: KeyedTable, highest: int) -> bool:
        """Whether a number up to ``highest`` that was generated once may be generated again."""
        return self.reuses_keys

    def upsert(self, insert: sa.Insert) -> bool:
        """Whether this INSERT may leave out a row, or change one that was there before."""
        return self._post_values(insert) is not None or bool(self._prefixes(insert))

    def inserted_proof(
        self, insert: sa.Insert, real: RealTable
    ) -> tuple[bool, sa.ColumnElement[bool] | None]:
        """How an upsert proves which rows it inserted.

        Returns:
            ``(False, None)``: it cannot, so none of its rows is tracked. ``(True, None)``: exactly
            the rows that RETURNING yields. ``(True, column)``: the rows where this column, added
            to RETURNING, is true.
        """
        return False, None

    def _post_values(self, insert: sa.Insert) -> str | None:
        clause = getattr(insert, "_post_values_clause", None)
        return None if clause is None else str(clause.__visit_name__)

    def _prefixes(self, insert: sa.Insert) -> frozenset[str]:
        """The prefixes that this database would see and that are not known to be harmless."""
        found = set()
        for prefix, only in getattr(insert, "_prefixes", ()):
            if only in {None, "*", getattr(self._dialect(), "name", None)}:
                found.add(" ".join(_COMMENT.sub(" ", str(prefix)).upper().split()))
        return frozenset(found - _HARMLESS)
