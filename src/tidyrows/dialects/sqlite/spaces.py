"""Files of SQLite that one test has for itself."""

from __future__ import annotations

import os
import re
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.pool import NullPool

from tidyrows.dialects.redirection import redirected
from tidyrows.dialects.spaces import LOCK_SECONDS, Space
from tidyrows.dialects.sqlite.locks import is_in_memory, named_files
from tidyrows.errors import NotBoundError
from tidyrows.greenlets import wait_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import sqlalchemy as sa

    from tidyrows.dialects.driver import Errors
    from tidyrows.dialects.locks import Blocker

_LOCKED = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_BUILDING = ".building"
_COMPANIONS = ("", "-journal", "-wal", "-shm", _BUILDING)


class SQLiteFile(Space):
    """A file beside the suite's own, copied from a template: that takes half a millisecond.

    A template is complete when it has its name: it is built under another one.
    """

    kind = "file"
    is_copied = True

    def __init__(
        self, dialect: Errors, engine: sa.Engine, name: str, connection: sa.Connection | None
    ) -> None:
        super().__init__(dialect, engine, name, connection)
        self.path = _beside(engine, name)
        self._template = self.path
        self._open = self.path

    @classmethod
    def managing(cls, engine: sa.Engine) -> sa.Engine:
        if is_in_memory(engine.url):
            raise NotBoundError(
                "A database in memory has no place beside it for other files. Give isolate() an "
                "engine on a file: create_engine('sqlite:///test.db')."
            )
        return redirected(engine, engine.url, pool_class=NullPool)

    def prepare(self) -> None:
        """Nothing: it needs no connection."""

    def marks(self) -> dict[str, str | None]:
        """The files; their time of change is their mark."""
        place = _beside(self.suite_engine, "")
        named = re.compile(re.escape(place.name) + "(tidy_[0-9a-z_]+)")
        found: dict[str, str | None] = {}
        for path in place.parent.iterdir():
            match = named.fullmatch(path.name)
            if match is not None:
                with suppress(FileNotFoundError):
                    found[match[1]] = f'{{"used": {path.stat().st_mtime}}}'
        return found

    def create(self) -> None:
        self.drop()
        self._open = self.path.with_name(self.path.name + _BUILDING)

    def drop(self) -> None:
        for suffix in _COMPANIONS:
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def copy(self, template: str) -> None:
        self.drop()
        self._template = _beside(self.suite_engine, template)
        self.reset()

    def replay(self, statements: Sequence[str]) -> None:
        engine = self.engine()
        with closing(engine.raw_connection()) as connection:
            driver: Any = connection.dbapi_connection
            raw: Any = connection.driver_connection
            script = ";\n".join(statements)
            if isinstance(raw, sqlite3.Connection):
                raw.executescript(script)
            else:
                wait_for(raw.executescript(script))
            driver.commit()
        engine.dispose()

    def finish(self, mark: str) -> None:
        os.utime(self._open)
        self._open.replace(self.path)
        self._open = self.path

    def engine(self) -> sa.Engine:
        return redirected(self.suite_engine, self.suite_engine.url.set(database=str(self._open)))

    def foreign_keys_out(self) -> list[str]:
        """None: SQLite has no foreign keys between files."""
        return []

    def users(self) -> list[Blocker]:
        """The processes that lock the file, as far as Linux shows them."""
        found: list[Blocker] = self.dialect.blockers(None, [str(self.path)])  # type: ignore[attr-defined]  # of the same database
        return found

    def learn(self) -> Mapping[str, Any]:
        """Nothing: the template has it all."""
        return {}

    def recall(self, learned: Mapping[str, Any]) -> bool:
        return True

    def is_clean(self) -> bool:
        return True

    def restore(self) -> bool:
        """As after each test."""
        return self.reset()

    def reset(self, *, defined: bool = True) -> bool:
        """Copied anew; SQLite's own copy leaves the connections of other processes right."""
        until = time.monotonic() + LOCK_SECONDS

        def bounded(status: int, _remaining: int, _total: int) -> None:
            if status in _LOCKED and time.monotonic() > until:
                error = sqlite3.OperationalError(f"{self.path} is locked")
                error.sqlite_errorcode = sqlite3.SQLITE_BUSY
                raise error

        with (
            closing(sqlite3.connect(f"file:{self._template}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(self.path)) as target,
        ):
            target.execute("PRAGMA synchronous = OFF")  # what is half copied is copied again
            source.backup(target, progress=bounded, sleep=0.01)
        return True


def _beside(engine: sa.Engine, name: str) -> Path:
    file = Path(named_files(engine.url)[-1]).resolve()
    return file.with_name(f"{file.name}-{name}")
