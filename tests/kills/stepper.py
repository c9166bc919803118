"""One worker that does what it is told, a line at a time: ``python stepper.py '{"url": ...}'``.

It answers each line with one of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import sqlalchemy as sa
from sqlalchemy import orm

from kills.engines import engine_of
from kills.tables import Currency, Note, Token
from tidyrows import CleanupError, CleanupManager, Ledger, ResourceTracker, TakenOverError


class Steps:
    """What it can be told; codes are the natural keys of currencies."""

    def __init__(self, engine: sa.Engine, beat: float) -> None:
        self.tracker = ResourceTracker(engine, ledger=Ledger(engine, beat=beat)).start()
        self.session = orm.Session(engine)

    def create(self, *codes: str) -> list[int]:
        """Commit three notes, a token, and these currencies; the notes' ids."""
        notes = self.flush(*codes)
        self.session.commit()
        return notes

    def flush(self, *codes: str) -> list[int]:
        """The same without the COMMIT."""
        notes = [Note(text="ours") for _ in range(3)]
        self.session.add_all([*notes, Token(text="ours")])
        self.session.add_all(Currency(code=code, text="ours") for code in codes)
        self.session.flush()
        return [note.id for note in notes]

    def roll_back(self) -> None:
        self.session.rollback()

    def delete(self, *codes: str) -> None:
        """Currencies, and all notes, through the session."""
        mine = self.tracker.mine(Note)
        for note in self.session.scalars(sa.select(Note).where(mine)):
            self.session.delete(note)
        for code in codes:
            self.session.delete(self.session.get_one(Currency, code))
        self.session.commit()

    def cleanup(self) -> dict[str, Any]:
        self.session.close()
        self.tracker.stop()
        try:
            report = CleanupManager(self.tracker).cleanup()
        except (CleanupError, TakenOverError) as error:
            return {"error": type(error).__name__}
        return {"deleted": report.total_deleted, "already_gone": sum(report.already_gone.values())}


def main(url: str, *, beat: float = 2.0) -> None:
    engine = sa.create_engine(engine_of(url).url, pool_pre_ping=True)
    steps = Steps(engine, beat)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, *given = json.loads(line)
        print(json.dumps(getattr(steps, name)(*given)), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
