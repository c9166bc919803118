"""A factory made from a model of 60 columns: its first call takes at most 50 ms of processor time.

Run: python -m pytest tests/benchmarks/test_from_model.py -m benchmark -s
"""

from __future__ import annotations

import statistics
from time import process_time

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, configure_mappers, mapped_column

from tidyrows import factory_for

COLUMNS = 60
MODELS = 15
KINDS = (
    sa.String(40),
    sa.Integer,
    sa.Numeric(8, 2),
    sa.DateTime,
    sa.Boolean,
    sa.Text,
    sa.Enum("a", "b", name="kinds"),
    sa.Date,
    sa.JSON,
    sa.Uuid,
)


def models():
    class Base(DeclarativeBase):
        pass

    for number in range(MODELS):
        columns = {
            f"column_{at}": mapped_column(KINDS[at % len(KINDS)], nullable=False)
            for at in range(COLUMNS)
        }
        columns["email"] = mapped_column(sa.String(60), unique=True, nullable=False)
        key = {"id": mapped_column(sa.Integer, primary_key=True)}
        checks = tuple(sa.CheckConstraint(f"column_{at} > 0") for at in (1, 11, 21))
        names = {"__tablename__": f"wide_{number}", "__table_args__": checks}
        yield type(f"Wide{number}", (Base,), names | key | columns)


@pytest.mark.benchmark
def test_the_first_call_of_a_factory_of_sixty_columns():
    made = list(models())
    configure_mappers()
    first, further = [], []
    factory_for(made.pop()).build()  # Faker's own first call
    for model in made:
        for taken in (first, further):
            start = process_time()
            factory_for(model).build()
            taken.append(1000 * (process_time() - start))
    print(
        f"\n{COLUMNS} columns: the first call {statistics.median(first):.1f} ms (at most 50 ms), "
        f"a further one {statistics.median(further):.1f} ms"
    )
