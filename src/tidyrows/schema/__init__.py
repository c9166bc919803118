"""The foreign keys of a schema: facts in, order and cycles out."""

from __future__ import annotations

from tidyrows.schema.graph import (
    ForeignKey,
    ForeignKeyGraph,
    Place,
    PrecedenceGraph,
    RowOrder,
    RowStep,
    levels,
    merge,
)
from tidyrows.schema.reflect import (
    model_foreign_keys,
    nullable_columns,
    reflect_foreign_keys,
)

__all__ = [
    "ForeignKey",
    "ForeignKeyGraph",
    "Place",
    "PrecedenceGraph",
    "RowOrder",
    "RowStep",
    "levels",
    "merge",
    "model_foreign_keys",
    "nullable_columns",
    "reflect_foreign_keys",
]
