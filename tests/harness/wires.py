"""A network between a test and its server, which can go silent."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress

import sqlalchemy as sa


class Wire:
    """A way to a server that can be made to swallow everything."""

    def __init__(self, url: sa.URL) -> None:
        port = url.port or {"postgresql": 5432, "mysql": 3306}[url.get_backend_name()]
        self._target = (url.host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = url.set(host="127.0.0.1", port=self._listener.getsockname()[1])
        self.dead = False
        self.dies_at: bytes | None = None
        self._over = False
        self._ends: dict[socket.socket, socket.socket] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def hang_up(self) -> None:
        """End every connection, as the other end of a broken network will some day."""
        for end in list(self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._over = True
        self._thread.join(10)
        for end in (self._listener, *self._ends):
            end.close()

    def _run(self) -> None:
        while not self._over:
            ready, _, _ = select.select([self._listener, *self._ends], [], [], 0.02)
            for end in ready:
                if end is self._listener:
                    here, there = end.accept()[0], socket.create_connection(self._target)
                    self._ends.update({here: there, there: here})
                elif not self.dead:
                    self._carry(end)
            if self.dead:
                threading.Event().wait(0.02)

    def _carry(self, end: socket.socket) -> None:
        if end not in self._ends:
            return
        with suppress(OSError):
            data = end.recv(65536)
            if data:
                if self.dies_at is not None and self.dies_at in data:
                    self.dead = True
                    return
                self._ends[end].sendall(data)
                return
        other = self._ends.pop(end)
        del self._ends[other]
        end.close()
        other.close()
