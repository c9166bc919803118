"""The foreign keys of a schema: facts in, order and cycles out."""

from __future__ import annotations

from tidyrows.schema.facts import ForeignKey, Place, merge
from tidyrows.schema.graph import ForeignKeyGraph, PrecedenceGraph
from tidyrows.schema.reflect import (
    inspector_foreign_keys,
    model_foreign_keys,
    nullable_columns,
    nullable_columns_of,
    reflect_foreign_keys,
)
from tidyrows.schema.rowgraph import RowOrder, RowStep, levels

__all__ = [
    "ForeignKey",
    "ForeignKeyGraph",
    "Place",
    "PrecedenceGraph",
    "RowOrder",
    "RowStep",
    "inspector_foreign_keys",
    "levels",
    "merge",
    "model_foreign_keys",
    "nullable_columns",
    "nullable_columns_of",
    "reflect_foreign_keys",
]
