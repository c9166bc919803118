"""Factories made from models that nobody here wrote: every table is filled, and emptied again."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import registry

from real.packages import borrowed
from tidyrows import CleanupManager, ResourceTracker, create_tree, factory_for

SINGLE_ROW = {"version_info"}
"""Tables whose CHECK allows one row."""


def of_optuna() -> list[type]:
    models = borrowed("optuna.storages._rdb.models", "optuna")
    return [mapper.class_ for mapper in models.BaseModel.registry.mappers]


def of_buildbot() -> list[type]:
    """Classes for its tables, which has none."""
    metadata = borrowed("buildbot.db.model", "buildbot").Model.metadata
    mapped = registry(metadata=metadata)
    made = []
    for table in metadata.sorted_tables:
        if table.primary_key:
            model: Any = type(table.name, (), {})
            mapped.map_imperatively(model, table)
            made.append(model)
    return made


@pytest.mark.parametrize("models", [of_optuna, of_buildbot])
def test_every_table_is_filled(engine, models):
    every = models()
    assert len(every) > 10, "The package has changed: are these still the models that we want?"
    tables = [sa.inspect(model).local_table for model in every]
    tables[0].metadata.create_all(engine)
    with CleanupManager(ResourceTracker(engine)) as cleanup:
        for model, table in zip(every, tables, strict=True):
            if table.name in SINGLE_ROW:
                factory_for(model)()
            else:
                factory_for(model).create_batch(2)
                create_tree(model)
    assert {table.name for table in cleanup.report.deleted} == {table.name for table in tables}
