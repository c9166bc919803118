"""A login: its cookies in the forms that browsers and HTTP clients take, and its file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from http.cookiejar import Cookie, CookieJar
from typing import TYPE_CHECKING, Any

from tidyrows.errors import ArgumentError

if TYPE_CHECKING:
    from pathlib import Path

_DEFAULTS = {"path": "/", "expires": -1, "httpOnly": False, "secure": False, "sameSite": "Lax"}


class Login:
    """An account that is logged in. No text shows its cookies.

    Attributes:
        role: as given to :meth:`Accounts.log_in`.
        username: of the account.
        path: the storage-state file, in Playwright's form; readable by this user alone.
    """

    def __init__(self, role: str, username: str, path: Path, state: dict[str, Any]) -> None:
        self.role = role
        self.username = username
        self.path = path
        self._state = state

    @property
    def cookies(self) -> dict[str, str]:
        """The values of the cookies by name, as for ``httpx.Client(cookies=...)``."""
        return {each["name"]: each["value"] for each in self._state["cookies"]}

    @property
    def selenium_cookies(self) -> list[dict[str, Any]]:
        """The cookies for Selenium's ``driver.add_cookie``, where their site is open."""
        return [_for_selenium(each) for each in self._state["cookies"]]

    def expires(self) -> float:
        """When the first cookie expires, in seconds since 1970; infinite where none does."""
        limits = [each["expires"] for each in self._state["cookies"] if each["expires"] >= 0]
        return min(limits, default=float("inf"))

    def save(self) -> None:
        """Write the file, under another name first, so that nobody reads half of it."""
        __tracebackhide__ = True  # pytest would show the arguments of json.dump
        part = self.path.with_suffix(".part")
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(self._state, file)
        part.replace(self.path)

    def __repr__(self) -> str:
        return f"<Login {self.role} {self.username}>"


def state_of(login: Any) -> dict[str, Any]:
    """A storage state in Playwright's form.

    Args:
        login: such a state, or a cookie jar of httpx, requests or urllib.

    Raises:
        ArgumentError: it is neither; the text does not show it.
    """
    __tracebackhide__ = True  # pytest would show the arguments
    jar = getattr(login, "jar", login)  # of httpx's Cookies
    if isinstance(jar, CookieJar):
        return {"cookies": [_of_jar(each) for each in jar], "origins": []}
    cookies = login.get("cookies") if isinstance(login, Mapping) else None
    needed = {"name", "value", "domain"}
    if not isinstance(cookies, list) or not all(
        isinstance(each, Mapping) and needed <= each.keys() for each in cookies
    ):
        raise ArgumentError(
            f"log_in returned a {type(login).__name__}, which is no login. Return the cookies of "
            f"an HTTP client, as client.cookies, or Playwright's context.storage_state().",
            argument="log_in",
        )
    full = [{**_DEFAULTS, **each} for each in cookies]
    return {"cookies": full, "origins": list(login.get("origins", ()))}


def _of_jar(cookie: Cookie) -> dict[str, Any]:
    is_local = cookie.domain == "localhost.local"  # what a jar makes of localhost
    return {
        **_DEFAULTS,
        "name": cookie.name,
        "value": cookie.value or "",
        "domain": "localhost" if is_local else cookie.domain,
        "path": cookie.path,
        "expires": -1 if cookie.expires is None else cookie.expires,
        "httpOnly": cookie.has_nonstandard_attr("HttpOnly"),
        "secure": cookie.secure,
        "sameSite": (cookie.get_nonstandard_attr("SameSite") or "Lax").capitalize(),
    }


def _for_selenium(cookie: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("name", "value", "path", "domain", "secure", "httpOnly", "sameSite")
    form = {name: cookie[name] for name in kept}
    if cookie["expires"] >= 0:
        form["expiry"] = int(cookie["expires"])
    return form
