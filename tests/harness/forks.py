"""Processes that begin with the imports done: to import SQLAlchemy takes longer than most suites.

A server, one per process of the tests, has imported third-party packages, and nothing of tidyrows;
it forks once per request. What reads the interpreter's own options (``-W``, ``PYTHONPATH``) needs a
process that starts anew.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PRELOADED = (
    "asyncio", "email", "unittest", "tempfile", "subprocess", "ssl",
    "_pytest.assertion", "_pytest.config", "_pytest.doctest", "_pytest.fixtures",
    "_pytest.junitxml", "_pytest.logging", "_pytest.pytester", "_pytest.terminal",
    "_pytest.unittest",
    "sqlalchemy", "sqlalchemy.orm", "sqlalchemy.ext.asyncio", "sqlalchemy.dialects.postgresql",
    "sqlalchemy.dialects.mysql", "sqlalchemy.dialects.sqlite",
    "psycopg", "pymysql", "factory", "factory.alchemy", "faker", "tenacity", "networkx",
)  # fmt: skip  # by whom
_servers: dict[int, tuple[subprocess.Popen[bytes], socket.socket]] = {}


def run(
    module: str, *arguments: str, cwd: Path, env: dict[str, str], timeout: float
) -> tuple[int, str]:
    """As ``python -m module``, to its end: its exit code, and what it printed.

    Raises:
        TimeoutError: it has not ended in this time, and was killed.
    """
    read, write = os.pipe()
    ours, theirs = socket.socketpair()
    with os.fdopen(read, "rb") as output, ours:
        with theirs:
            socket.send_fds(_server(), [b"."], [theirs.fileno(), write])
        os.close(write)
        ours.sendall(
            json.dumps({"argv": [module, *arguments], "cwd": str(cwd), "env": env}).encode() + b"\n"
        )
        answers = ours.makefile()
        pid = int(answers.readline())
        try:
            text = b"".join(_chunks(output.fileno(), time.monotonic() + timeout))
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
        return int(answers.readline()), text.decode(errors="replace")


def _chunks(output: int, until: float) -> Iterator[bytes]:
    while True:
        if not select.select([output], [], [], max(until - time.monotonic(), 0))[0]:
            raise TimeoutError("the process has not ended in time")
        chunk = os.read(output, 65_536)
        if not chunk:
            return
        yield chunk


def _server() -> socket.socket:
    if os.getpid() not in _servers:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        _servers[os.getpid()] = process, ours
        atexit.register(_stop, os.getpid())
    return _servers[os.getpid()][1]


def _stop(pid: int) -> None:
    if pid == os.getpid():
        process, connection = _servers.pop(pid)
        connection.close()
        process.wait()


# -- in the server -------------------------------------------------------------------------------


def _serve(connection: socket.socket) -> dict[str, object] | None:
    """Fork for each request: returns it in the new process, and None when there are no more."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    while True:
        _, fds, _, _ = socket.recv_fds(connection, 1, 2)
        if not fds:
            return None
        if not os.fork():
            connection.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _begin(socket.socket(fileno=fds[0]), fds[1])
        for each in fds:
            os.close(each)


def _begin(answers: socket.socket, output: int) -> dict[str, object]:
    """Fork what runs the request, and tell its number and its exit code."""
    request: dict[str, object] = json.loads(answers.makefile().readline())
    pid = os.fork()
    if pid:
        os.close(output)
        answers.sendall(f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        answers.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    answers.close()
    for fd in (1, 2):
        os.dup2(output, fd)
    os.close(output)
    return request


def main() -> None:
    """Serve; in the new processes, run what was asked for."""
    for name in PRELOADED:
        importlib.import_module(name)
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if request is None:
        return
    sys.modules["faker.generator"].random.seed()  # or all would draw the same values
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["env"])  # type: ignore[call-overload]
    os.chdir(str(request["cwd"]))
    sys.argv[:] = request["argv"]  # type: ignore[call-overload]
    sys.path[0] = str(request["cwd"])
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
