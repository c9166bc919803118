"""Accounts outside of the database: one for a tracker and role, and gone with its rows."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import stat
import urllib.request
from http.cookiejar import CookieJar
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from harness.asynchronous import ONE_EACH, World, over
from harness.ledgers import Worker, entries, sweep
from tidyrows import (
    AccountProvider,
    Accounts,
    ArgumentError,
    CleanupError,
    CleanupManager,
    ExternalResourceError,
    Ledger,
    NoSessionError,
    ResourceTracker,
    ScopeError,
    SessionStateError,
)

SECRET = "s3cret-cookie"  # in no text
COOKIE = "sid=abc; HttpOnly; Path=/shop; Max-Age=600; SameSite=strict"
_kinds = map("test-account-{}".format, itertools.count())


class Service:
    """A service with accounts, and the provider of its tests."""

    def __init__(self):
        self.kind = next(_kinds)
        self.accounts = {}
        self.log_ins = 0
        self.expires = -1
        self.fails = None

    def create(self, username, role):
        self.accounts[username] = role
        if self.fails:
            raise self.fails
        return f"password of {username}"

    def log_in(self, username, credentials):
        assert credentials == f"password of {username}"
        assert username in self.accounts
        self.log_ins += 1
        cookie = {"name": "sid", "value": f"{SECRET}-{self.log_ins}", "domain": "shop.test"}
        return {"cookies": [{**cookie, "expires": self.expires}]}

    def delete(self, username):
        if self.fails:
            raise self.fails
        self.accounts.pop(username, None)


@pytest.fixture
def service():
    return Service()


@pytest.fixture
def accounts(service, tmp_path):
    return Accounts(service, folder=tmp_path / "logins")


@pytest.fixture
def files(tmp_path):
    return lambda: sorted((tmp_path / "logins").glob("*"))


def test_a_role_is_logged_in_once_and_gone_with_the_block(engine, service, accounts, files):
    with CleanupManager(tracker := ResourceTracker(engine)) as cleanup:
        admin, buyer = accounts.log_in("admin"), accounts.log_in("Buyer 2")
        assert accounts.log_in("admin") is admin
        assert service.log_ins == 2
        assert service.accounts == {admin.username: "admin", buyer.username: "Buyer 2"}
        assert tracker.context.tag in admin.username
        assert files() == sorted([admin.path, buyer.path])
        assert stat.S_IMODE(admin.path.stat().st_mode) == 0o600
        assert json.loads(admin.path.read_text()) == {
            "cookies": [{
                "name": "sid", "value": f"{SECRET}-1", "domain": "shop.test", "path": "/",
                "expires": -1, "httpOnly": False, "secure": False, "sameSite": "Lax",
            }],
            "origins": [],
        }  # fmt: skip  # as Playwright has it
        assert admin.cookies == {"sid": f"{SECRET}-1"}
        (cookie,) = admin.selenium_cookies
        assert (cookie["value"], "expiry" in cookie) == (f"{SECRET}-1", False)
    assert (service.accounts, files()) == ({}, [])
    assert f"{service.kind} 2 removed" in str(cleanup.report)
    with CleanupManager(tracker):
        assert accounts.log_in("admin").username != admin.username


def test_the_account_of_a_killed_worker_goes_with_the_sweep(
    database, ledgers, service, accounts, files
):
    outside = database.engine()
    with Worker(database, ledgers) as worker:
        accounts.log_in("admin")
    (entry,) = entries(outside)
    assert SECRET not in str(entry)
    assert "password" not in str(entry)
    worker.dies()
    assert (len(service.accounts), len(files())) == (1, 1)
    sweep(outside)
    assert (service.accounts, files(), entries(outside)) == ({}, [], [])


def test_an_account_is_tracked_before_it_is_made(engine, service, accounts):
    with CleanupManager(ResourceTracker(engine)):
        service.fails = RuntimeError("the answer was lost")
        with pytest.raises(RuntimeError):
            accounts.log_in("admin")
        assert len(service.accounts) == 1
        service.fails = None
        assert len(accounts.log_in("admin").cookies) == 1
        assert len(service.accounts) == 2
    assert service.accounts == {}


def test_an_account_that_stays_is_a_leftover_and_its_login_is_gone(
    sqlite_engine, service, accounts, files
):
    cleanup = CleanupManager(ResourceTracker(sqlite_engine))
    with pytest.raises(CleanupError, match="its handler failed") as raised:
        with cleanup:
            accounts.log_in("admin")
            service.fails = RuntimeError("no")
    assert SECRET not in str(raised.value)
    assert files() == []
    service.fails = None
    cleanup.cleanup()
    assert service.accounts == {}


def test_a_login_is_made_anew_when_it_expires_or_is_asked_for(sqlite_engine, service, tmp_path):
    now = [1000.0]
    accounts = Accounts(
        service, username="{tag}@example.test", folder=tmp_path, clock=lambda: now[0]
    )
    with CleanupManager(ResourceTracker(sqlite_engine)):
        service.expires = 2000
        first = accounts.log_in("admin")
        assert first.username.endswith("@example.test")
        assert first.selenium_cookies[0]["expiry"] == 2000
        assert accounts.log_in("admin") is first
        now[0] = 1950
        service.expires = 9000
        second = accounts.log_in("admin")
        assert (second.username, second.path) == (first.username, first.path)
        assert second.cookies == {"sid": f"{SECRET}-2"}
        assert SECRET + "-2" in second.path.read_text()
        assert accounts.log_in("admin", anew=True).cookies == {"sid": f"{SECRET}-3"}
        second.path.unlink()
        assert accounts.log_in("admin").path.exists()
        assert len(service.accounts) == 1


def test_no_text_shows_the_login(sqlite_engine, accounts, caplog):
    caplog.set_level(logging.DEBUG)
    with CleanupManager(tracker := ResourceTracker(sqlite_engine)) as cleanup:
        admin = accounts.log_in("admin")
        texts = [repr(admin), str(admin), repr(accounts), str(tracker.externals())]
        texts += [tracker.to_json(), str(cleanup.plan())]
    texts += [str(cleanup.report), caplog.text]
    assert f"<Login admin {admin.username}>" in texts
    assert not [text for text in texts if SECRET in text or "password" in text]


def test_a_cookie_jar_is_a_login_too(sqlite_engine, tmp_path):
    class Site(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Set-Cookie", COOKIE)
            self.end_headers()

        def log_message(self, *_):
            pass

    class Jar(Service):
        def log_in(self, username, credentials):
            jar = CookieJar()
            opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(jar))
            opener.open(f"http://127.0.0.1:{server.server_port}/shop").close()
            return jar

    with HTTPServer(("127.0.0.1", 0), Site) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        with CleanupManager(ResourceTracker(sqlite_engine)):
            login = Accounts(Jar(), folder=tmp_path).log_in("buyer")
        server.shutdown()
        thread.join()
    (cookie,) = login.selenium_cookies
    assert cookie.pop("expiry") > 600
    assert cookie == {
        "name": "sid", "value": "abc", "path": "/shop", "domain": "127.0.0.1", "secure": False,
        "httpOnly": True, "sameSite": "Strict",
    }  # fmt: skip  # one piece


def test_a_ledger_names_no_file_outside_of_the_folder(sqlite_engine, service, accounts, tmp_path):
    (tmp_path / "kept.json").touch()
    (tmp_path / "logins").mkdir()
    with CleanupManager(tracker := ResourceTracker(sqlite_engine)):
        for file in "../kept.json", str(tmp_path / "kept.json"):
            tracker.track_external(service.kind, {"username": "x", "file": file})
    assert (tmp_path / "kept.json").exists()


def test_wrong_calls_are_told(sqlite_engine, service, accounts):
    assert isinstance(service, AccountProvider)
    with pytest.raises(NoSessionError, match=r"Nobody would delete the account of 'admin'"):
        accounts.log_in("admin")
    with pytest.raises(ExternalResourceError, match="are removed by"):
        Accounts(service)
    with pytest.raises(ArgumentError, match="provider must be an AccountProvider"):
        Accounts(object())
    with pytest.raises(ScopeError, match=r"\{tag\}"):
        Accounts(Service(), username="admin")
    with CleanupManager(ResourceTracker(sqlite_engine)):
        with pytest.raises(ArgumentError, match="role must be a text"):
            accounts.log_in("")
        service.log_in = lambda *_: [SECRET]
        with pytest.raises(ArgumentError, match="returned a list, which is no login") as raised:
            accounts.log_in("admin")
        assert SECRET not in str(raised.value)


@over(*ONE_EACH)
def test_tasks_with_a_tracker_each_log_in_at_the_same_time(zoo_database, driver, service, accounts):
    async def task(engine, ledger):
        tracker = ResourceTracker(engine, ledger=ledger)
        async with CleanupManager(tracker):
            with pytest.raises(SessionStateError, match="run_sync"):
                accounts.log_in("admin")
            return await tracker.run_sync(lambda tracker: accounts.log_in("admin", tracker=tracker))

    async def main(engine):
        ledger = Ledger(engine)
        await ledger.install_async()
        try:
            logins = await asyncio.gather(*(task(engine, ledger) for _ in range(3)))
        finally:
            await asyncio.to_thread(ledger.close)
        assert len({login.username for login in logins}) == 3

    World(zoo_database, driver).run(main)
    assert service.accounts == {}
