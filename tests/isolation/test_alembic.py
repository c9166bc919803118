"""Alembic's migrations build a schema or a database for a test, as the page on levels says."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from harness.spaces import members
from tidyrows.isolation.isolate import isolate

ENV = """
from alembic import context
from sqlalchemy import create_engine

def migrate(connection):
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()

given = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    engine = create_engine(context.config.get_main_option("sqlalchemy.url"))
    with engine.connect() as connection:
        migrate(connection)
    context.config.attributes["engines"].append(engine)  # its pool keeps the connection
"""
REVISION = """
import sqlalchemy as sa
from alembic import op

revision, down_revision = {!r}, {!r}

def upgrade():
{}
"""
UPGRADES = {
    ("1", None): """
    op.create_table(
        "trees",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("kind", sa.Enum("oak", "elm", name="kind_of_tree")),
    )
    op.execute("INSERT INTO trees (id, kind) VALUES (1, 'oak')")
""",
    ("2", "1"): """
    op.add_column("trees", sa.Column("height", sa.Integer, server_default="7"))
    op.create_index("by_height", "trees", ["height"])
""",
}


@pytest.fixture
def migrations(tmp_path):
    folder = tmp_path / "migrations"
    (folder / "versions").mkdir(parents=True)
    (folder / "env.py").write_text(ENV)
    for (number, before), text in UPGRADES.items():
        revision = REVISION.format(number, before, text)
        (folder / "versions" / f"{number}.py").write_text(revision)
    return folder


@pytest.mark.parametrize(("level", "by"), [("schema", "connection"), ("database", "url")])
def test_migrations_build_what_tests_use_again(space_engine, migrations, tmp_path, level, by):
    log, engines = tmp_path / "log", []

    def upgrade(engine):
        with log.open("a") as lines:
            lines.write("once\n")
        config = Config(attributes={"engines": engines})
        config.set_main_option("script_location", str(migrations))
        if by == "url":
            url = engine.url.render_as_string(hide_password=False)
            config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
            command.upgrade(config, "head")
            return
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    for _ in range(2):
        with isolate(space_engine, level, migrate=upgrade, pool=migrations) as db:
            with db.engine.begin() as connection:
                run = connection.exec_driver_sql
                assert run("SELECT id, kind, height FROM trees").all() == [(1, "oak", 7)]
                assert run("SELECT version_num FROM alembic_version").all() == [("2",)]
                run("INSERT INTO trees (id, kind) VALUES (2, 'elm')")
    for engine in engines:
        engine.dispose()
    assert log.read_text() == "once\n"
    assert not {"trees", "alembic_version"} & set(sa.inspect(space_engine).get_table_names())
    assert members(space_engine, level)
