"""Who holds a lock that somebody waits for."""

from __future__ import annotations

from dataclasses import dataclass

_SHOWN = 120
"""How many characters of a statement are shown."""


@dataclass(frozen=True, slots=True)
class Blocker:
    """Somebody whose lock is waited for.

    Attributes:
        pid: the server's process or connection id; on SQLite the id of the process.
        user: the database's user.
        application: what the connection calls itself (PostgreSQL's ``application_name``), or on
            SQLite the command line.
        host: where it comes from.
        state: what it is doing, in the database's words.
        seconds: the age of its transaction.
        statement: its current or last statement.
        own: what it is, if it is a session or connection of this very process.
        certain: False where the database does not tell, and it is one of those that may be it.
    """

    pid: int
    user: str | None = None
    application: str | None = None
    host: str | None = None
    state: str | None = None
    seconds: float | None = None
    statement: str | None = None
    own: str | None = None
    certain: bool = True

    def __str__(self) -> str:
        said = [f"pid {self.pid}"]
        if self.user:
            said.append(f"user {self.user}")
        if self.application:
            said.append(f"application {self.application!r}")
        if self.host:
            said.append(f"from {self.host}")
        state = self.state or ""
        if self.seconds is not None:
            state = f"{state or 'transaction open'} for {self.seconds:.1f} s"
        if state:
            said.append(state)
        text = ", ".join(said)
        if self.statement:
            line = " ".join(self.statement.split())
            text += f": {line if len(line) <= _SHOWN else line[: _SHOWN - 3] + '...'}"
        if self.own:
            text = f"{self.own} of this very process ({text}); commit, roll back or close it first"
        return text if self.certain else f"perhaps {text}"
