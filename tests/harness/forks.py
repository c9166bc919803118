"""Processes that begin with the imports done: to import SQLAlchemy takes longer than most suites.

A server, one per process of the tests, has imported third-party packages, and nothing of tidyrows;
it forks once per request. Of the interpreter's own options it knows ``-W`` and ``PYTHONPATH``.
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
import warnings
from pathlib import Path
from typing import Any

import execnet.gateway_base
import execnet.gateway_io

PRELOADED = (
    "asyncio", "email", "unittest", "tempfile", "subprocess", "ssl",
    "_pytest.assertion", "_pytest.config", "_pytest.doctest", "_pytest.fixtures",
    "_pytest.junitxml", "_pytest.logging", "_pytest.pytester", "_pytest.terminal",
    "_pytest.unittest",
    "sqlalchemy", "sqlalchemy.orm", "sqlalchemy.ext.asyncio", "sqlalchemy.dialects.postgresql",
    "sqlalchemy.dialects.mysql", "sqlalchemy.dialects.sqlite",
    "psycopg", "pymysql", "factory", "factory.alchemy", "faker", "tenacity", "networkx",
)  # fmt: skip  # by whom
_SERVE = """
import sys
sys.path.insert(0, sys.argv[1])
from harness import forks
del sys.path[0]
forks.main(sys.argv[2], int(sys.argv[3]))
"""
_address: list[str] = []
"""Of the server, once it has been started."""


class Process(subprocess.Popen[Any]):
    """As ``Popen([sys.executable, ...])`` of a script, ``-m`` and a module, or ``-c`` and code.

    ``-W`` may come before that.

    Attributes:
        pid: the process that was asked for; its parent is the server.
    """

    def _execute_child(self, *given: Any, **_: Any) -> None:
        args, _exe, _preexec, _close, _pass, cwd, env, _info, _flags, _shell, *fds = given[:16]
        standard_input, _, _, output, _, errors = fds
        request = {
            "command": args[1:],
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
        }
        ours, theirs = socket.socketpair()
        with theirs, Path(os.devnull).open("r+b", 0) as nothing:
            sent = [theirs.fileno()]
            for fd, standard in ((standard_input, -1), (output, 1), (errors, 2)):
                sent.append(fd if fd != -1 else nothing.fileno() if standard == -1 else standard)
            with _server() as server:
                socket.send_fds(server, [b"."], sent)
        ours.sendall(json.dumps(request).encode() + b"\n")
        self._answers = ours.makefile("rb", buffering=0)
        ours.close()
        self.pid = int(self._answers.readline())
        self._child_created = True
        self._close_pipe_fds(*fds)  # type: ignore[attr-defined]  # as Popen's own does

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        return self._ended(0)

    def _wait(self, timeout: float | None) -> int:
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._answers], [], [], timeout)[0]:
            self.returncode = int(self._answers.readline())
            self._answers.close()
        return self.returncode


def run(
    command: list[str],
    text_in: str | None = None,
    *,
    check: bool = False,
    timeout: float = 120,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run``, with what it printed as text."""
    pipe = subprocess.PIPE
    options = {"stdin": pipe, "stdout": pipe, "stderr": pipe, "text": True, **options}
    with Process(command, **options) as process:
        try:
            output, errors = process.communicate(text_in, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


def _server() -> socket.socket:
    """A new connection to the server, which this process or one before it has started."""
    if not _address:
        name = f"tidyrows-tests-{os.getpid()}"
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"\0{name}")
            listening.listen(64)
            process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(Path(__file__).parent.parent), name,
                 str(listening.fileno())],
                pass_fds=[listening.fileno()],
                stdin=subprocess.PIPE,
            )  # fmt: skip  # one command
        _address.append(name)
        atexit.register(_stop, process, os.getpid())
    server = socket.socket(socket.AF_UNIX)
    server.connect(f"\0{_address[0]}")
    return server


def _stop(process: subprocess.Popen[bytes], pid: int) -> None:
    if pid == os.getpid():
        process.communicate()


# -- in the server -------------------------------------------------------------------------------


def _serve(listening: socket.socket) -> dict[str, Any] | None:
    """Fork for each request: returns it in the new process, and None when there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    while True:
        if 0 in select.select([listening, 0], [], [])[0]:  # what has started the server has ended
            return None
        connection, _ = listening.accept()
        with connection:
            _, fds, _, _ = socket.recv_fds(connection, 1, 4)
        if not os.fork():
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _begin(socket.socket(fileno=fds[0]), fds[1:])
        for each in fds:
            os.close(each)


def _begin(answers: socket.socket, standard: list[int]) -> dict[str, Any]:
    """Fork what runs the request, and tell its number and its exit code."""
    request: dict[str, Any] = json.loads(answers.makefile().readline())
    pid = os.fork()
    if pid:
        for each in (*standard, 0, 1, 2):
            os.close(each)
        answers.sendall(f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        answers.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    answers.close()
    for fd, each in enumerate(standard):
        os.dup2(each, fd)
    for each in standard:
        os.close(each)
    return request


def _run(program: str, arguments: list[str]) -> None:
    """As the interpreter would, in the module ``__main__``."""
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    while program == "-W":
        warnings._processoptions(arguments[:1])  # type: ignore[attr-defined]  # what -W calls
        sys.warnoptions.append(arguments[0])
        program, arguments = arguments[1], arguments[2:]
    if program == "-m":
        sys.argv[:] = ["-m", *arguments[1:]]
        sys.path[0] = str(Path.cwd())
        runpy._run_module_as_main(arguments[0])  # type: ignore[attr-defined]  # what -m calls
        return
    names = sys.modules["__main__"].__dict__
    kept = {"__builtins__": names["__builtins__"], "__name__": "__main__", "__spec__": None}
    if program == "-c":
        code = compile(arguments[0], "<string>", "exec")
        sys.argv[:], sys.path[0] = ["-c", *arguments[1:]], ""
    else:
        code = compile(Path(program).read_bytes(), program, "exec")
        sys.argv[:], sys.path[0] = [program, *arguments], str(Path(program).resolve().parent)
        kept["__file__"] = program
    names.clear()
    names.update(kept)
    exec(code, names)


class _Worker(execnet.gateway_io.Popen2IOMaster):
    """A worker of pytest-xdist is forked too."""

    def __init__(self, args: list[str], execmodel: Any) -> None:
        command = [each for each in args if each != "-u"]
        self.popen = Process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        execnet.gateway_base.Popen2IO.__init__(
            self, self.popen.stdin, self.popen.stdout, execmodel=execmodel
        )


def main(address: str, listening: int) -> None:
    """Serve; in the new processes, run what was asked for."""
    for name in PRELOADED:
        importlib.import_module(name)
    request = _serve(socket.socket(fileno=listening))
    if request is None:
        return
    _address.append(address)
    execnet.gateway_io.Popen2IOMaster = _Worker
    sys.modules["faker.generator"].random.seed()  # or all would draw the same values
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    _run(request["command"][0], request["command"][1:])
