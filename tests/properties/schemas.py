"""Random schemas: foreign keys at random, cycles, self-references, composite and shared keys.

A drawn schema is plain data, so that a failing one prints and shrinks; :func:`tables_of` makes it
real. Every table has the columns of its key, those of its foreign keys, ``owner`` and ``note``.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from hypothesis import strategies as st

KEYS = ("serial", "int", "text", "uuid", "pair", "text and int", "uuid and text", "line")
"""``line`` is the key of a parent table and a number: order lines, say."""

# Names that only a quoted identifier can hold, among plain ones.
NAMES = ("t", "Order", "group", "two words", "per%cent")


@dataclass(frozen=True)
class Reference:
    """A foreign key, on columns of its own, to the primary key of table number ``parent``."""

    parent: int
    nullable: bool = True
    on_delete: str | None = None
    initially: str | None = None


@dataclass(frozen=True)
class TableSpec:
    """A table; ``line_of`` counts only where the key is ``line``."""

    name: str
    key: str
    references: tuple[Reference, ...] = ()
    line_of: Reference | None = None


def _references(parents: st.SearchStrategy[int], *, nullable: bool | None) -> Any:
    def settle(reference: Reference) -> Reference:
        if reference.on_delete == "SET NULL" and not reference.nullable:
            return Reference(reference.parent, nullable=False, initially=reference.initially)
        return reference

    return st.builds(
        Reference,
        parent=parents,
        nullable=st.booleans() if nullable is None else st.just(nullable),
        on_delete=st.sampled_from((None, "RESTRICT", "CASCADE", "SET NULL")),
        initially=st.sampled_from((None, None, "IMMEDIATE", "DEFERRED")),
    ).map(settle)


@st.composite
def schemas(draw: st.DrawFn) -> tuple[TableSpec, ...]:
    """Two to seven tables; any table may reference any, itself too, several times."""
    count = draw(st.integers(2, 7))
    tables = []
    for number in range(count):
        # Only a key that is made of another table's key needs that table to come first.
        key = draw(st.sampled_from(KEYS if number else KEYS[:-1]))
        line_of = None
        if key == "line":
            line_of = draw(_references(st.integers(0, number - 1), nullable=False))
        references = _references(st.integers(0, count - 1), nullable=None)
        tables.append(
            TableSpec(
                f"{draw(st.sampled_from(NAMES))}{number}",
                key,
                tuple(draw(st.lists(references, max_size=3))),
                line_of,
            )
        )
    return tuple(tables)


def tables_of(schema: tuple[TableSpec, ...], backend: str) -> list[sa.Table]:
    """The tables of a drawn schema; the MySQL family has no deferrable keys, so none there."""
    metadata = sa.MetaData()
    keys: list[list[sa.Column[Any]]] = []
    for spec in schema:
        inherited = keys[spec.line_of.parent] if spec.line_of else []
        keys.append([
            *(_copied(column, f"of_{column.name}", primary_key=True) for column in inherited),
            *_own_key(spec.key),
        ])  # fmt: skip  # what is inherited, then what is its own
    tables = []
    for number, spec in enumerate(schema):
        columns = list(keys[number])
        constraints = []
        references = list(spec.references)
        locals_: list[list[str]] = []
        for at, reference in enumerate(references):
            own = [
                _copied(column, f"r{at}_{column.name}", nullable=reference.nullable)
                for column in keys[reference.parent]
            ]
            columns += own
            locals_.append([column.name for column in own])
        if spec.line_of:
            references.append(spec.line_of)
            locals_.append([column.name for column in keys[number][:-1]])
        for at, (reference, names) in enumerate(zip(references, locals_, strict=True)):
            parent = schema[reference.parent].name
            deferrable = reference.initially if backend != "mysql" else None
            constraints.append(
                sa.ForeignKeyConstraint(
                    names,
                    [f"{parent}.{column.name}" for column in keys[reference.parent]],
                    name=f"fk_{number}_{at}",
                    ondelete=reference.on_delete,
                    deferrable=True if deferrable else None,
                    initially=deferrable,
                    # the name of a table may hold a dot or a space; its columns are found by it
                    link_to_name=True,
                )
            )
        tables.append(
            sa.Table(
                spec.name,
                metadata,
                *columns,
                sa.Column("owner", sa.String(10), nullable=False),
                sa.Column("note", sa.String(20)),
                *constraints,
            )
        )
    return tables


def reference_columns(table: sa.Table, at: int) -> list[sa.Column[Any]]:
    """The columns of a table's reference number ``at``, in the order of the parent's key."""
    return [column for column in table.columns if column.name.startswith(f"r{at}_")]


def own_key_values(kind: str, number: int) -> list[Any]:  # noqa: PLR0911 -- one per kind
    """The ``number``-th key of a kind, small and with parts in common; [] where generated."""
    match kind:
        case "serial":
            return []
        case "int" | "line":
            return [number]
        case "text":
            return [f"it's {number} % é"]
        case "uuid":
            return [uuid.UUID(int=number, version=4)]
        case "pair":
            return [number % 2, number // 2]
        case "text and int":
            return [f"k{number % 2}", number // 2]
        case _:
            return [uuid.UUID(int=number % 2, version=4), f"k{number // 2}"]


def _own_key(kind: str) -> list[sa.Column[Any]]:
    types: dict[str, list[Any]] = {
        "text": [sa.String(40)],
        "uuid": [sa.Uuid()],
        "pair": [sa.Integer(), sa.Integer()],
        "text and int": [sa.String(40), sa.Integer()],
        "uuid and text": [sa.Uuid(), sa.String(40)],
    }
    return [
        sa.Column(f"k{at}", type_, primary_key=True, autoincrement=kind == "serial")
        for at, type_ in enumerate(types.get(kind, [sa.Integer()]))
    ]


def _copied(column: sa.Column[Any], name: str, **options: Any) -> sa.Column[Any]:
    if options.get("primary_key"):
        options["autoincrement"] = False
    return sa.Column(name, column.type, **options)
