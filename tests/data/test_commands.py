"""``tidyrows data``: the check of a file, and the schema for editors."""

from __future__ import annotations

import json
import sys

import pytest

import harness.factories
from harness.factories import GroupFactory, OrgFactory, UserFactory
from tidyrows.cli import main

WHERE = "harness.factories:FACTORIES"


@pytest.fixture(autouse=True)
def factories(monkeypatch):
    known = {"user": UserFactory, "org": OrgFactory, "group": GroupFactory}
    monkeypatch.setattr(harness.factories, "FACTORIES", known, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return known


def test_check_shows_the_rows_in_their_order_and_uses_no_database(tmp_path, capsys):
    path = tmp_path / "data.yaml"
    path.write_text(
        "$schema: data.schema.json\n"
        "user: {many: {count: 3, name: 'U {n}', org: {ref: org.acme}}}\norg: {acme: {name: Acme}}"
    )
    assert main(["data", "check", str(path), "--factories", WHERE]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "org.acme: OrgFactory(name='Acme')",
        "user.many x 3: UserFactory(name='U {n}', org=org.acme)",
        "4 row(s), and those of their SubFactories; nothing was written",
    ]
    path.write_text("user: {ada: {nmae: Ada}}")
    assert main(["data", "check", str(path), "--factories", WHERE]) == 1
    assert ":1:14: UserFactory has no 'nmae'." in capsys.readouterr().err


def test_factories_that_are_not_there_are_told(capsys):
    for where, said in (
        ("harness", "is not of the form module:NAME"),
        ("harness.nothing:F", "There is no module harness.nothing"),
        ("harness.factories:FACTORES", "has no FACTORES. Did you mean FACTORIES?"),
        ("harness.factories:UserFactory", "must be a dict of names without dots"),
    ):
        assert main(["data", "schema", where]) == 1
        assert said in capsys.readouterr().err


def test_the_schema_has_the_names_that_load_rows_takes(capsys):
    assert main(["data", "schema", WHERE]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert list(schema["properties"]) == ["$schema", "user", "org", "group"]
    row = schema["properties"]["user"]["additionalProperties"]
    assert row["additionalProperties"] is False
    assert {"name", "org", "org_id", "groups", "managed", "count", "traits"} <= set(
        row["properties"]
    )
    assert row["properties"]["traits"]["items"] == {"enum": ["managed"]}
    text, null, *forms = row["properties"]["name"]["anyOf"]
    assert (text, null) == ({"type": "string"}, {"type": "null"})
    assert {"$ref": "#/$defs/ref"} in forms
    assert {"type": "null"} not in row["properties"]["email"]["anyOf"]
    assert list(row["patternProperties"]) == ["^(email|name|org|manager|groups)__"]
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    good = {"user": {"ada": {"name": "Ada", "org": {"ref": "org.acme"}, "org__name": "x"}}}
    assert check.is_valid(good)
    assert not check.is_valid({"user": {"ada": {"nmae": "Ada"}}})
    assert not check.is_valid({"user": {"ada": {"org": {"ref": "acme"}}}})
