"""In which tables a mapped class has its rows, and under which keys: joined inheritance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import orm

from tidyrows.errors import UnknownTableError

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Part:
    """One table of a class.

    Attributes:
        table: the table.
        places: where in the class's primary key the values of the table's own stand.
    """

    table: sa.Table
    places: tuple[int, ...]

    def key(self, values: tuple[Any, ...]) -> Any:
        """The table's key, in the stored form, of a row with this primary key of the class."""
        key = tuple(values[place] for place in self.places)
        return key[0] if len(key) == 1 else key


def mapper_of(model: Any) -> orm.Mapper[Any] | None:
    """The mapper of a mapped class; None of anything else."""
    mapper = sa.inspect(model, raiseerr=False) if isinstance(model, type) else None
    return mapper if isinstance(mapper, orm.Mapper) else None


def table_of(model: Any) -> sa.Table:
    """The Table of a mapped class, or the Table itself."""
    if isinstance(model, sa.Table):
        return model
    mapper = mapper_of(model)
    if mapper is not None and isinstance(mapper.local_table, sa.Table):
        return mapper.local_table
    raise UnknownTableError(
        f"{model!r} is neither a mapped class nor a Table. Pass the model, as in "
        f"track_rows(User, [1, 2]).",
        table=model,
    )


def parts_of(model: Any) -> list[Part]:
    """The tables of a class, the one that its primary key is in first; or the one Table."""
    mapper = mapper_of(model)
    if mapper is not None and isinstance(mapper.local_table, sa.Table):
        return sorted(
            _parts(mapper), key=lambda part: part.table is not mapper.primary_key[0].table
        )
    table = table_of(model)
    return [Part(table, tuple(range(len(table.primary_key))))]


def _parts(mapper: orm.Mapper[Any]) -> Iterator[Part]:
    identity = list(mapper.primary_key)
    for table in mapper.tables:
        if not isinstance(table, sa.Table):
            continue
        places = []
        for column in table.primary_key:
            same = _equated(mapper, column)
            places += [place for place, other in enumerate(identity) if other in same][:1]
        if len(places) != len(table.primary_key):
            raise UnknownTableError(
                f"{mapper.class_.__name__} has rows in {table.fullname}, whose primary key is not "
                f"part of its own. Name them with track_rows({table.name}_table, keys).",
                table=table,
            )
        yield Part(table, tuple(places))


def _equated(mapper: orm.Mapper[Any], column: sa.Column[Any]) -> set[Any]:
    """All columns that the join conditions of the hierarchy equate with one, and itself."""
    equivalent = mapper._equivalent_columns  # noqa: SLF001 -- nothing public tells them
    same: set[Any] = set()
    new: set[Any] = {column}
    while new:
        same |= new
        new = {other for one in new for other in equivalent.get(one, ())} - same
    return same
