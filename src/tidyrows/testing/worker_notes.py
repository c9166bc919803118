"""What a worker leaves where its controller looks, should it not live to report it.

A report is sent when a phase of a test has ended. A worker that crashes in the first setup has sent
none, and what workers say while Ctrl-C ends the controller is not heard: it reads it here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


class Board:
    """A folder that is made with the first note, and taken away by the controller.

    Args:
        folder: where; a remote worker makes one of its own machine, which nobody reads.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._pinned: list[dict[str, Any]] = []

    def pin(self, worker: str, said: dict[str, Any]) -> None:
        """Leave a note, in place of what the worker has said under the same names."""
        if said in self._pinned:
            return
        self._pinned = [each for each in self._pinned if each.keys() != said.keys()]
        self._pinned.append(said)
        file = Path(self.folder) / f"{worker}.json"
        file.parent.mkdir(mode=0o700, exist_ok=True)
        new = file.with_suffix(".new")  # a worker may be killed while it writes
        new.write_text(json.dumps(self._pinned), encoding="utf-8")
        new.replace(file)

    def read(self, worker: str = "*") -> list[dict[str, Any]]:
        """What a worker has left here, or all have."""
        files = sorted(Path(self.folder).glob(f"{worker}.json"))
        return [said for file in files for said in json.loads(file.read_text(encoding="utf-8"))]

    def clear(self) -> None:
        """Take it away."""
        shutil.rmtree(self.folder, ignore_errors=True)
