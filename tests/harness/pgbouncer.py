"""A PgBouncer of a test's own, in transaction mode: a connection to it is nobody's session."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from harness.pip_postgresql import UNPRIVILEGED, free_port
from harness.servers import AbsentError

SECONDS = 20
DRIVER_OPTIONS = {"prepare_threshold": None}
"""For psycopg's connections: what one client prepares would meet what another prepared."""
_PROGRAMS = ("/usr/sbin/pgbouncer", "/usr/local/sbin/pgbouncer")


@contextmanager
def pgbouncer(url: sa.URL, *, servers: int = 2) -> Iterator[sa.URL]:
    """A pooler before a PostgreSQL.

    Args:
        url: the database, for psycopg.
        servers: how many connections to it all clients share.

    Returns:
        The same database, through it.

    Raises:
        AbsentError: its program is not at hand.
    """
    program = shutil.which("pgbouncer") or next(filter(os.path.exists, _PROGRAMS), None)
    if program is None:
        raise AbsentError("PgBouncer is not at hand: install the package pgbouncer")
    home = Path(tempfile.mkdtemp(prefix="tidyrows-pgbouncer-"))
    process = None
    try:
        through = url.set(host="127.0.0.1", port=free_port())
        _configure(home, url, through, servers)
        user = UNPRIVILEGED if os.geteuid() == 0 else None  # it refuses to run as root
        with (home / "log").open("ab") as log:
            process = subprocess.Popen(
                [program, str(home / "pgbouncer.ini")],
                user=user,
                group=None if user is None else pwd.getpwnam(user).pw_gid,
                extra_groups=None if user is None else [],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip  # one command reads best on few lines
        _wait_for(through, process, home / "log")
        yield through
    finally:
        if process is not None:
            process.kill()
            process.wait(SECONDS)
        shutil.rmtree(home)


def _configure(home: Path, url: sa.URL, through: sa.URL, servers: int) -> None:
    home.chmod(0o755)
    users = home / "users"
    users.write_text(f'"{url.username}" "{url.password or ""}"\n')
    (home / "pgbouncer.ini").write_text(
        f"""[databases]
{url.database} = host={url.host or "127.0.0.1"} port={url.port or 5432}
[pgbouncer]
listen_addr = {through.host}
listen_port = {through.port}
unix_socket_dir =
auth_type = trust
auth_file = {users}
pool_mode = transaction
default_pool_size = {servers}
max_client_conn = 50
"""
    )


def _wait_for(url: sa.URL, process: subprocess.Popen[bytes], log: Path) -> None:
    engine = sa.create_engine(url, poolclass=NullPool, connect_args=DRIVER_OPTIONS)
    asked = threading.Event()
    for _ in range(SECONDS * 50):
        try:
            with engine.connect():
                return
        except sa.exc.OperationalError:
            if process.poll() is not None:
                break
            asked.wait(0.02)
    raise RuntimeError(f"PgBouncer did not start:\n{log.read_text()}")
