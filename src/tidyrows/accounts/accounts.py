"""Accounts: one for each tracker and role, an external resource that goes with its rows."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary

from tidyrows.accounts.login import Login, state_of
from tidyrows.arguments import SWITCH, checked, instance_of, name
from tidyrows.errors import ExternalResourceError, NoSessionError
from tidyrows.external import external_handler
from tidyrows.private_folder import private_folder
from tidyrows.template import check, escaped
from tidyrows.tracking.tracker import current_tracker

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from tidyrows.external import ExternalResource
    from tidyrows.tracking.tracker import ResourceTracker

CredentialsT = TypeVar("CredentialsT")

_SOON = 60
"""A login that expires within so many seconds is made anew."""
_FILE = re.compile(r"[a-z0-9][a-z0-9-]*\.json")


@runtime_checkable
class AccountProvider(Protocol[CredentialsT]):
    """What makes accounts in a service, logs them in, and deletes them.

    Each method should bound its own waiting: a running call is not interrupted.

    Attributes:
        kind: the kind of external resource of its accounts, as ``"shop-account"``.

    Example:
        >>> class ShopAccounts:
        ...     kind = "shop-account"
        ...
        ...     def create(self, username, role):
        ...         password = secrets.token_urlsafe()
        ...         api.add_user(username, password, role=role)
        ...         return password
        ...
        ...     def log_in(self, username, credentials):
        ...         with httpx.Client(base_url=URL) as client:
        ...             client.post("/login", data={"user": username, "password": credentials})
        ...             return client.cookies
        ...
        ...     def delete(self, username):
        ...         api.remove_user(username, missing_ok=True)
    """

    kind: str

    def create(self, username: str, role: str) -> CredentialsT:
        """Make an account; returns what :meth:`log_in` needs. It stays in this process."""

    def log_in(self, username: str, credentials: CredentialsT) -> Any:
        """Log in; returns the cookies of an HTTP client, or a storage state of Playwright."""

    def delete(self, username: str) -> None:
        """Delete an account. A missing account is no error: it may have been deleted before."""


@dataclass(slots=True, eq=False, repr=False)
class _Account:
    """An account of one tracker and role."""

    resource: ExternalResource
    username: str
    path: Path
    credentials: Any = None
    login: Login | None = None


class _Roles(dict[str, _Account]):
    """The accounts of one tracker, by role.

    The lock is for threads that share a tracker. Tasks that share one take turns in its
    ``run_sync``; those with a tracker each must not wait for each other in one thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Accounts:
    """The accounts of one provider, for all workers, tests and sweeps of this process.

    Make it where every process imports it, as in ``conftest.py``: it registers the handler by which
    cleanups and sweeps delete the accounts, those of killed workers too.

    Args:
        provider: makes and deletes them.
        username: template of the names, with ``{tag}``; by default the role and the tag.
        folder: for the files of logins, readable by this user alone; by default one among the
            temporary files.
        clock: gives the time in seconds since 1970.

    Raises:
        ExternalResourceError: its kind has a handler already.
        ScopeError: the template has no tag.

    Example:
        >>> accounts = Accounts(ShopAccounts())
        >>> with CleanupManager(tracker):
        ...     admin = accounts.log_in("admin")
        ...     client = httpx.Client(base_url=URL, cookies=admin.cookies)
    """

    @checked(
        provider=instance_of(AccountProvider, need="an AccountProvider", example="ShopAccounts()")
    )
    def __init__(
        self,
        provider: AccountProvider[Any],
        *,
        username: str | None = None,
        folder: str | os.PathLike[str] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if username is not None:
            check(username)
        self.provider = provider
        self._username = username
        self._folder = None if folder is None else Path(folder)
        self._clock = clock
        self._known: WeakKeyDictionary[ResourceTracker, _Roles] = WeakKeyDictionary()
        external_handler(provider.kind)(self._remove)

    @checked(role=name("admin"), anew=SWITCH)
    def log_in(
        self, role: str, *, tracker: ResourceTracker | None = None, anew: bool = False
    ) -> Login:
        """The login of a role: made once for a tracker, and used again until it expires.

        Args:
            role: such as ``"admin"``; the provider knows its meaning.
            tracker: the account goes with its rows; by default the ambient tracker.
            anew: log the account in again, as after a test that has logged it out.

        Raises:
            NoSessionError: there is no tracker here.
            ArgumentError: the provider returned no login.
        """
        owner = tracker or current_tracker()
        if owner is None:
            raise NoSessionError(
                f"Nobody would delete the account of {role!r}: no tracker is active here. Write "
                f"accounts.log_in({role!r}) inside of with CleanupManager(tracker): ..."
            )
        owner.sessions.refuse_blocking(
            f"await tracker.run_sync(lambda tracker: accounts.log_in({role!r}, tracker=tracker))"
        )
        known = self._known.setdefault(owner, _Roles())
        with known.lock:
            account = known.get(role)
            if account is None or account.resource not in owner.externals():
                account = self._tracked(owner, role)  # before it is made, should this be killed
                account.credentials = self.provider.create(account.username, role)
                known[role] = account
            login = account.login
            if login is None or anew or not self._is_valid(login):
                state = state_of(self.provider.log_in(account.username, account.credentials))
                login = account.login = Login(role, account.username, account.path, state)
                login.save()
            return login

    def _is_valid(self, login: Login) -> bool:
        return login.expires() >= self._clock() + _SOON and login.path.exists()

    def _tracked(self, owner: ResourceTracker, role: str) -> _Account:
        """An account that is tracked, and not made yet."""
        slug = re.sub("[^a-z0-9]+", "-", role.lower()).strip("-") or "role"
        username = owner.context.text(self._username or f"{escaped(slug)}-{{tag}}")
        file = owner.context.text(f"{{tag}}-{slug}.json")
        resource = owner.track_external(self.provider.kind, {"username": username, "file": file})
        return _Account(resource, username, self._place() / file)

    def _place(self) -> Path:
        folder = self._folder or private_folder(ExternalResourceError) / "logins"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def _remove(self, payload: dict[str, str]) -> None:
        """Delete the file of a login, then its account."""
        file = payload["file"]
        if _FILE.fullmatch(file):  # a ledger names files of this folder only
            (self._place() / file).unlink(missing_ok=True)
            (self._place() / file).with_suffix(".part").unlink(missing_ok=True)
        self.provider.delete(payload["username"])

    def __repr__(self) -> str:
        return f"<Accounts {self.provider.kind}>"
