"""What the suite's own engine commits while a block of level ``transaction`` is open."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from sqlalchemy import event

from tidyrows.capture.changes import ROLLED_BACK, Inserted, InsertedWhole, Touched
from tidyrows.capture.engine import capture_for, root_engine
from tidyrows.dialects import dialect_for
from tidyrows.errors import add_note
from tidyrows.observe.all_engines import ObservingSink

if TYPE_CHECKING:
    import sqlalchemy as sa

    from tidyrows.capture.changes import Change, Sink, Untracked

_HELD = (
    "tidyrows: isolate(engine, 'transaction') is open in this test and has the locks of what the "
    "test wrote; in SQLite that is the whole file. Write through db.engine or db.session() in "
    "place of the suite's own engine."
)


class OutsideCommits(ObservingSink):
    """Counts the rows that no tracker owns."""

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__()
        self._rows: Counter[tuple[str, str]] = Counter()
        self._capture = capture_for(engine)
        self._before = self._capture.sinks.set_fallback(self._owner)
        if not event.contains(root_engine(engine), "handle_error", _explain):
            event.listen(root_engine(engine), "handle_error", _explain)

    @classmethod
    def of(cls, engine: sa.Engine) -> OutsideCommits | None:
        """None where what is committed through the engine is rolled back too."""
        return None if ROLLED_BACK in engine.get_execution_options() else cls(engine)

    def _owner(self) -> Sink | None:
        before = self._before() if self._before is not None else None
        return before or (self if self.active else None)

    def stop(self) -> str:
        """Count no more; in words, what was committed."""
        self._capture.resolve()
        self.active = False
        before: Any = self._before
        while (
            isinstance(block := getattr(before, "__self__", None), OutsideCommits)
            and not block.active
        ):
            before = block._before  # noqa: SLF001 -- it has ended before this one, which began later
        sinks = self._capture.sinks
        last = sinks.set_fallback(before)
        if last != self._owner:  # another block has begun since
            sinks.set_fallback(last)
        return ", ".join(
            f"{count or 'some'} row(s) of {table} {verb}"
            for (table, verb), count in sorted(self._rows.items())
        )

    def apply(self, change: Change) -> Change:
        """Count it."""
        if isinstance(change, Touched):
            self._rows[str(change.table.name), change.verb] += change.count
        elif isinstance(change, (Inserted, InsertedWhole)):
            self._rows[str(change.table.name), "inserted"] += len(change.keys)
        return change

    def note_untracked(self, untracked: Untracked) -> None:
        """Count it."""
        self._rows[str(untracked.table.name), "inserted"] += untracked.count or 0


def _explain(context: Any) -> None:
    """A wait for a lock has ended: that of the block, as far as is known."""
    engine = context.engine
    if engine is None or not dialect_for(engine).is_timeout(context.original_exception):
        return
    if isinstance(capture_for(engine).sinks.watcher, OutsideCommits):
        add_note(context.sqlalchemy_exception or context.original_exception, _HELD)
