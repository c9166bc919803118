"""Which process this is, so that another one on the same machine can tell whether it has ended."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path
from typing import Any

_STARTED = 21
"""Where in /proc/<pid>/stat the start time stands, counted from 0; see proc(5)."""


def here() -> dict[str, Any]:
    """This process: host, machine (where the system tells), pid, and when it was started."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "started": _started(pid),
    }


def is_over(process: dict[str, Any]) -> bool | None:
    """Whether a process has ended, as it said itself; None where that cannot be told from here."""
    if process.get("ended"):
        return True
    machine = _machine()
    if machine is None or process.get("machine") != machine or process.get("started") is None:
        return None
    return bool(_started(int(process["pid"])) != process["started"])


@cache
def _machine() -> str | None:
    """This boot of this machine and its space of pids, where Linux tells them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks; None where there is none, or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name may have blanks and brackets
    return None if fields[0] in {"Z", "X"} else fields[_STARTED - 2]
