"""The names that generated SQL text gives, none of which can be the name of a project's table.

A statement knows a table that has an alias by that alias alone. So there are two cases:

- Every table of the statement has an alias: ``ROW`` and ``KEYS`` collide with nothing, and neither
  do SQLAlchemy's anonymous aliases, provided that *all* tables have one (``parent_1``, the
  anonymous alias of ``parent``, may be the name of another table).
- The project's table has no alias, since MariaDB looks for the alias of a DELETE in the current
  database, or since the caller's conditions name the table itself: :func:`keys_beside` gives a name
  that is not the table's.

Columns are always qualified, so a project's column may have any name. A statement that selects from
catalogues only may use any alias: it names no table of a project.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidyrows.keys import KeyedTable

ROW = "tidyrows_row"
KEYS = "tidyrows_keys"


def keys_beside(table: KeyedTable) -> str:
    """The alias of the keys in a statement that names this table without an alias."""
    # MariaDB ignores case where lower_case_table_names says so.
    return ROW if table.table.name.lower() == KEYS else KEYS
