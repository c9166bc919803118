"""A JSON Schema of data files, made from the factories, for the completion of editors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tidyrows.data.planned_rows import COUNT, TRAITS
from tidyrows.factories.fields import Fields

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tidyrows.factories import TrackedFactory
    from tidyrows.factories.fields import Field

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TYPES: tuple[tuple[Any, dict[str, Any]], ...] = (
    (sa.String, {"type": "string"}),
    (sa.Boolean, {"type": "boolean"}),
    (sa.Integer, {"type": "integer"}),
    (sa.Numeric, {"type": ["number", "string"]}),
    (sa.Interval, {"type": "number"}),
    (sa.DateTime, {"type": "string"}),  # a date alone is taken too
    (sa.Date, {"type": "string", "format": "date"}),
    (sa.Time, {"type": "string"}),
    (sa.Uuid, {"type": "string", "format": "uuid"}),
)
_COUNT = {"anyOf": [{"type": "integer", "minimum": 0}, {"$ref": "#/$defs/env"}]}


def editor_schema(factories: Mapping[str, type[TrackedFactory[Any]]]) -> dict[str, Any]:
    """The schema of the files that these factories load."""
    names = "|".join(factories)
    return {
        "$schema": _DIALECT,
        "type": "object",
        "properties": {
            "$schema": {"type": "string"},
            **{name: _rows(Fields(factory)) for name, factory in factories.items()},
        },
        "additionalProperties": False,
        "$defs": {
            "ref": _form(ref={"type": "string", "pattern": rf"^({names})\.[^.]+(\.[^.]+)?$"}),
            "env": _form(env={"type": "string"}, default={}, exact={"type": "boolean"}),
            "exact": _form(exact={}),
            "base64": _form(base64={"type": "string"}),
            "refs": {"type": "array", "items": {"$ref": "#/$defs/ref"}},
        },
    }


def _form(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [next(iter(properties))],
        "additionalProperties": False,
    }


def _rows(fields: Fields) -> dict[str, Any]:
    known = {name: fields.field(name) for name in fields.names}
    properties = {name: _value(each) for name, each in known.items() if each is not None}
    if COUNT not in properties:
        properties[COUNT] = _COUNT
    if fields.traits and TRAITS not in properties:
        properties[TRAITS] = {"type": "array", "items": {"enum": list(fields.traits)}}
    row: dict[str, Any] = {
        "type": ["object", "null"],
        "properties": properties,
        "additionalProperties": False,
    }
    above = [name for name in fields.declared if fields.below(name)[1]]
    if above:
        row["patternProperties"] = {f"^({'|'.join(above)})__": {}}
    return {"type": ["object", "null"], "additionalProperties": row}


def _value(field: Field) -> dict[str, Any]:
    forms = [{"$ref": f"#/$defs/{each}"} for each in ("ref", "env", "exact")]
    if field.relationship is not None:
        lists = [{"$ref": "#/$defs/refs"}] if field.relationship.uselist else []
        return {"anyOf": [*lists, *forms, {"type": "null"}]}
    if field.column is None:
        return {}
    column = field.column
    own = [{"type": "null"}] if column.nullable else []
    if isinstance(column.type, sa.LargeBinary):
        return {"anyOf": [{"$ref": "#/$defs/base64"}, *own, *forms]}
    if isinstance(column.type, sa.Enum):
        kind = column.type.enum_class
        names = column.type.enums if kind is None else list(kind.__members__)
        return {"anyOf": [{"enum": names}, *own, *forms]}
    for types, schema in _TYPES:
        if isinstance(column.type, types):
            return {"anyOf": [schema, *own, *forms]}
    return {}
