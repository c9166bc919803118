"""One worker that will be killed: ``python worker.py '{"url": ..., "seed": ...}'``.

It waits for a line, then makes rows and cleans up, or fails and keeps them, round after round,
until there is another line; or it sweeps once. All the while it tells by single bytes where it is:
see ``children.MARKS``.
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import sqlalchemy as sa

from kills import files  # noqa: F401 -- it registers what removes them
from kills.engines import engine_of
from tidyrows import CleanupManager, Ledger, ResourceTracker, sweep

IN, OUT = 0, 1


def say(mark: bytes) -> None:
    os.write(OUT, mark)


class Marks:
    """Tells each statement, what comes just before a COMMIT and just after it.

    Args:
        engine: whose.
        blow: where the blow is to fall: ``phase``, ``mark`` and ``number`` of times, and ``halt``,
            whether to stand still there or to run on. None where that is chance.
    """

    def __init__(self, engine: sa.Engine, blow: dict[str, Any] | None) -> None:
        self._blow = blow
        self._phase = b""
        self._main = threading.main_thread()
        self.listen(engine)

    def listen(self, engine: sa.Engine) -> None:
        """To this engine too."""
        sa.event.listen(engine, "before_cursor_execute", lambda *_: self.mark(b"e"))
        commit = engine.dialect.do_commit

        def do_commit(connection: Any) -> None:  # no event tells when the COMMIT is over
            self.mark(b"b")
            commit(connection)
            self.mark(b"a")

        engine.dialect.do_commit = do_commit  # type: ignore[method-assign]

    def phase(self, phase: bytes) -> None:
        self._phase = phase
        self.mark(phase)

    def mark(self, mark: bytes) -> None:
        if threading.current_thread() is not self._main:
            return  # the heart's
        say(mark)
        blow = self._blow
        if blow is None or (blow["phase"], blow["mark"]) != (self._phase.decode(), mark.decode()):
            return
        blow["number"] -= 1
        if blow["number"] == 0:
            say(b"!")
            if blow["halt"]:
                os.read(IN, 1)


def main(
    url: str,
    *,
    blow: dict[str, Any] | None = None,
    rows_per_transaction: int | None = None,
    seed: int = 0,
    prefix: str = "",
    folder: str = "",
    org: int = 0,
    schema: str | None = None,
) -> None:
    if rows_per_transaction is None:
        # a sweep starts sooner without them
        from kills import awaited  # noqa: PLC0415
        from kills.acts import Maker  # noqa: PLC0415
    say(b"i")
    os.read(IN, 64)
    engine = engine_of(url)
    marks = Marks(engine, blow)
    if rows_per_transaction is not None:
        marks.phase(b"s")
        sweep(engine, rows_per_transaction=rows_per_transaction)
        return
    rng = random.Random(seed)
    marks.phase(b"o")
    ledger = Ledger(engine)
    while not select.select([IN], [], [], 0)[0]:
        limit = rng.choice((3, 40, 10_000))
        acts = partial(
            Maker, engine, rng=rng, prefix=prefix, folder=folder, org=org, schema=schema, say=say
        )
        turn = rng.choice((cleaned, cleaned, failed, awaited.cleaned))
        turn(marks, ledger, acts, limit)
        say(b"r")
    engine.dispose()


def cleaned(marks: Marks, ledger: Ledger, acts: Callable[..., Any], limit: int) -> None:
    """A round that cleans up."""
    tracker = ResourceTracker(ledger.engine, ledger=ledger)
    cleanup = CleanupManager(tracker, rows_per_transaction=limit)
    with cleanup:
        marks.phase(b"c")
        maker = acts(tracker=tracker)
        maker.some(maker.rng.randint(2, 5))
        marks.phase(b"k")
    maker.end()
    report = cleanup.report
    assert not report.already_gone, report  # nobody else may take a living worker's rows


class FailedError(Exception):
    """What a test has raised."""


def failed(marks: Marks, ledger: Ledger, acts: Callable[..., Any], limit: int) -> None:
    """A round whose rows are kept; half of them are swept at once."""
    tracker = ResourceTracker(ledger.engine, ledger=ledger)
    with suppress(FailedError), CleanupManager(tracker, keep_on_failure=True):
        marks.phase(b"c")
        maker = acts(tracker=tracker)
        maker.some(maker.rng.randint(2, 5))
        marks.phase(b"f")
        error = FailedError()
        raise error
    maker.end()
    (note,) = error.__notes__
    if "no rows to keep" in note:
        return
    things, name = re.search(r"(\d+) row.*kept='kept(\w+)'", note, re.DOTALL).groups()
    say(b"<%d:%s>" % (int(name, 16), things.encode()))
    if maker.rng.random() < 0.5:
        say(b"<%d:>" % int(name, 16))
        marks.phase(b"s")
        report = sweep(ledger, kept=f"kept{name}", rows_per_transaction=limit)
        assert not report.already_gone, report


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
