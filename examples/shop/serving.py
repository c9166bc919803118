"""Start the shop in a process of its own, and what stands for its payment service."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import httpx

HERE = Path(__file__).parent


@contextmanager
def running_shop(database, payments=None):
    """The shop's URL while it runs, on a port that nobody else can have taken.

    Args:
        database: its database's URL.
        payments: its payment service's.
    """
    env = {**os.environ, "SHOP_DATABASE_URL": database}
    if payments:
        env["SHOP_PAYMENTS_URL"] = payments
    with tempfile.TemporaryFile() as errors:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            # The socket listens already: who connects is waited for, not refused.
            process = subprocess.Popen(
                [sys.executable, "-m", "app.web", "--fd", str(listening.fileno())],
                cwd=HERE,
                env=env,
                stdin=subprocess.PIPE,
                stderr=errors,
                pass_fds=[listening.fileno()],
            )
        try:
            try:
                httpx.get(f"{url}/health", timeout=60).raise_for_status()
            except httpx.HTTPError as error:
                errors.seek(0)
                error.add_note(errors.read().decode())
                raise
            yield url
        finally:
            process.stdin.close()
            process.terminate()
            process.wait(timeout=30)


class Held:
    """A payment that is answered when the test says so."""

    def __init__(self):
        self.arrived = Event()
        self.answer = Event()


class Payments(ThreadingHTTPServer):
    """Stands for the payment service. Everything is paid but what a test says.

    Attributes:
        refused: email addresses whose payments are refused.
        held: by email address, payments that wait.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Payment)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.refused = set()
        self.held = {}

    def hold(self, email):
        self.held[email] = Held()
        return self.held[email]


class _Payment(BaseHTTPRequestHandler):
    def do_POST(self):
        charge = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        held = self.server.held.get(charge["email"])
        if held:
            held.arrived.set()
            held.answer.wait(60)
        answer = json.dumps({"paid": charge["email"] not in self.server.refused}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_args):
        pass


@contextmanager
def running_payments(service=Payments):
    """The payment service, in a thread of this process."""
    with service() as payments:
        thread = Thread(target=payments.serve_forever, daemon=True)
        thread.start()
        try:
            yield payments
        finally:
            payments.shutdown()
            thread.join()
