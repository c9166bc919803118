"""Fixtures that run in an asynchronous test's own loop, as pytest-asyncio and anyio give them.

Connections of an asynchronous engine belong to a loop, so the cleanup must run in the test's.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_ANYIO, _ASYNCIO = "_tidy_anyio", "_tidy_asyncio_{scope}"


class Turn(Protocol):
    """What is to be awaited before a test and after it."""

    async def begin(self, *, start: bool) -> None:
        """Before the test; ``start``: in the context that the test will have too."""

    async def end(self) -> None:
        """After it."""


TURN = pytest.StashKey[Turn]()
"""An item's turn."""


def fixture_for(item: pytest.Item) -> str | None:
    """The fixture that awaits an item's turn in the item's own loop; None where it has none."""
    if "anyio_backend" in getattr(item, "fixturenames", ()):
        return _offered(item.config, _ANYIO, _for_anyio)
    mark = item.get_closest_marker("asyncio")
    if mark is None or not item.config.pluginmanager.has_plugin("asyncio"):
        return None
    scope = mark.kwargs.get("loop_scope") or mark.kwargs.get("scope") or _default(item.config)
    name = _ASYNCIO.format(scope=scope)
    return _offered(item.config, name, lambda: _for_asyncio(scope))


def _default(config: pytest.Config) -> str:
    try:
        return config.getini("asyncio_default_test_loop_scope") or "function"
    except ValueError:  # pytest-asyncio older than 0.26 does not know it
        return "function"


def _offered(config: pytest.Config, name: str, make: Any) -> str:
    """Let pytest know of a fixture, once."""
    if not config.pluginmanager.has_plugin(name):
        holder = ModuleType(name)  # pytest looks for fixtures in modules and classes
        setattr(holder, name, make())
        config.pluginmanager.register(holder, name)
    return name


def _for_anyio() -> Any:
    @pytest.fixture(name=_ANYIO)
    async def awaited(request: pytest.FixtureRequest) -> AsyncIterator[None]:
        turn = request.node.stash[TURN]
        await turn.begin(start=True)  # one task runs the fixtures and the test
        yield
        await turn.end()

    return awaited


def _for_asyncio(scope: Any) -> Any:
    import pytest_asyncio  # noqa: PLC0415 -- whoever marks a test with asyncio has it

    @pytest_asyncio.fixture(name=_ASYNCIO.format(scope=scope), loop_scope=scope)
    async def awaited(request: pytest.FixtureRequest) -> AsyncIterator[None]:
        turn = request.node.stash[TURN]
        await turn.begin(start=False)  # a task of its own: what it sets the test does not see
        yield
        await turn.end()

    return awaited
