"""Run a command, and say which rows it has left in the shop's database.

python left.py -- python -m pytest tests_pytest -n 8

The database is SHOP_DATABASE_URL's, else a new SQLite file. With --sweep, what killed workers have
left is deleted before it is counted. Ends with the command's status, or with 1 if rows are left or
missing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from sqlalchemy import MetaData, create_engine, select

from tidyrows import sweep

sys.path.insert(0, str(Path(__file__).parent))

from app.models import AuditRow, connect, create_schema

LEDGER = "tidyrows_ledger"
NO_ENTRIES = ("version", "integers", "owner")
"""Kinds of rows that the ledger has for itself: they are about no row of a test."""


def every_row(url):
    """Each row of each table, the ledger's entries too: a Counter by table's name."""
    engine = create_engine(url)
    try:
        metadata = MetaData()
        metadata.reflect(engine)
        with engine.connect() as connection:
            return {
                table.name: Counter(tuple(row) for row in connection.execute(rows_of(table)))
                for table in metadata.sorted_tables
            }
    finally:
        engine.dispose()


def rows_of(table):
    if table.name == LEDGER:
        return select(table).where(table.c.kind.not_in(NO_ENTRIES))
    return select(table)


def difference(before, after):
    """Lines that name what is more, and what is less, than before."""
    lines = []
    for table in sorted({*before, *after}):
        then, now = before.get(table, Counter()), after.get(table, Counter())
        lines += [f"{table}: left {row}" for row in (now - then).elements()]
        lines += [f"{table}: missing {row}" for row in (then - now).elements()]
    return lines


def main(command, *, sweeps=False):
    with tempfile.TemporaryDirectory() as folder:
        url = os.environ.get("SHOP_DATABASE_URL") or f"sqlite:///{Path(folder, 'shop.db')}"
        engine = connect(url)
        create_schema(engine)
        engine.dispose()
        before = every_row(url)
        env = {**os.environ, "SHOP_DATABASE_URL": url}
        status = subprocess.run(command, env=env, check=False).returncode
        if sweeps:
            print("sweep:", sweep(url, own=[AuditRow]))
        lines = difference(before, every_row(url))
    print(*lines[:50], sep="\n", end="\n" if lines else "")
    print(f"{len(lines)} rows left")
    return status or bool(lines)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Say which rows a command has left.")
    options.add_argument("--sweep", action="store_true", help="delete what killed workers left")
    options.add_argument("command", nargs="+")
    given = options.parse_args()
    sys.exit(main(given.command, sweeps=given.sweep))
