"""The library's SQL names nothing as a user may name a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.aliases import named_aliases

SOURCE = Path(__file__).parent.parent / "src"


def test_no_alias_has_a_name_that_a_users_table_may_have():
    assert named_aliases(SOURCE) == []


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("parents = clause.alias('parent')", "parent"),
        ("NAME = 'parent'\nparents = clause.alias(NAME)", "parent"),
        ("gone = sa.delete(table).cte(name='gone')", "gone"),
        ("gone = sa.delete(table).cte(f'deleted_{number}')", "deleted_{}"),
        ("inner = sa.select(1).subquery('x')", "x"),
        ("one = sa.literal_column('1').label('one')", "one"),
        ("other = orm.aliased(Model, name='other')", "other"),
        ("sent = sa.func.unnest(a).table_valued('k', name='sent')", "sent"),
        ("sent = valued.render_derived(name='sent')", "sent"),
        ("sql = f'SELECT 1 FROM {place} t'", "t"),
        ("sql = f'SELECT 1 FROM {schema}.{place} AS t'", "t"),
        ("sql = 'SELECT 1 FROM {place} t'.format(place=place)", "t"),
        ("sql = f'SELECT 1 FROM json_each(?) k CROSS JOIN {place}'", "k"),
        ("sql = f'JSON_TABLE(%s, {columns}) AS j STRAIGHT_JOIN {place}'", "j"),
        ("sql = f'SELECT count(*) FROM ({held}) AS held'", "held"),
        ("sql = f'WITH ours AS (SELECT 1 FROM {place}) SELECT 1'", "ours"),
        ("sql = (f'SELECT 1 '\n    f'FROM {place} t')", "t"),
    ],
)
def test_a_named_alias_is_found(tmp_path, code, name):
    (tmp_path / "planted.py").write_text(code)
    (found,) = named_aliases(tmp_path)
    assert found.startswith("planted.py:")
    assert found.endswith(f": {name}")


@pytest.mark.parametrize(
    "code",
    [
        "parents = clause.alias()",
        "one = sa.literal_column('1').label(None)",
        "proof = column.label('tidyrows_inserted')",
        "sql = f'SELECT 1 FROM {place} AS {ROW} JOIN unnest({sent}) AS {KEYS}({k}) ON {on}'",
        "sql = f'SELECT CAST({value} AS text) FROM {place} WHERE {name} = 1'",
        "sql = f'SELECT m.name FROM {schema}.sqlite_master AS m JOIN pragma_x(m.name) AS f'",
        "sql = 'SELECT c.relname FROM pg_catalog.pg_class c'",
        "error = f'{table} is not there: it was {state}'",
        "row = {'label': name}",
    ],
)
def test_what_cannot_collide_is_allowed(tmp_path, code):
    (tmp_path / "planted.py").write_text(code)
    assert named_aliases(tmp_path) == []
