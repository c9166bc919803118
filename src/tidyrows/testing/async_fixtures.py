"""Fixtures that run in an asynchronous test's own loop, as pytest-asyncio and anyio give them.

Connections of an asynchronous engine belong to a loop, so the cleanup must run in the test's.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

_ANYIO, _ASYNCIO = "_tidy_anyio", "_tidy_asyncio_{scope}"


@dataclass(frozen=True)
class AsyncTest:
    """What is awaited before and after one test."""

    begin: Callable[[], Coroutine[Any, Any, None]]
    start: Callable[[], None]  # in the context that the test will have too
    end: Callable[[], Coroutine[Any, Any, None]]


ASYNC_TEST = pytest.StashKey[AsyncTest]()
"""In an item's stash."""


def fixture_for(item: pytest.Item) -> str | None:
    """The fixture that awaits an item's :data:`ASYNC_TEST` in its loop; None without a loop."""
    if "anyio_backend" in getattr(item, "fixturenames", ()):
        return _registered(item.config, _ANYIO, _anyio_fixture)
    mark = item.get_closest_marker("asyncio")
    if mark is None or not item.config.pluginmanager.has_plugin("asyncio"):
        return None
    scope = mark.kwargs.get("loop_scope") or mark.kwargs.get("scope") or _default(item.config)
    name = _ASYNCIO.format(scope=scope)
    return _registered(item.config, name, lambda: _asyncio_fixture(scope))


def _default(config: pytest.Config) -> str:
    try:
        return config.getini("asyncio_default_test_loop_scope") or "function"
    except ValueError:  # pytest-asyncio older than 0.26 does not know it
        return "function"


def _registered(config: pytest.Config, name: str, make: Any) -> str:
    """Register a fixture with pytest, once."""
    if not config.pluginmanager.has_plugin(name):
        holder = ModuleType(name)  # pytest looks for fixtures in modules and classes
        setattr(holder, name, make())
        config.pluginmanager.register(holder, name)
    return name


def _anyio_fixture() -> Any:
    @pytest.fixture(name=_ANYIO)
    async def around_test(request: pytest.FixtureRequest) -> AsyncIterator[None]:
        test = request.node.stash[ASYNC_TEST]
        await test.begin()
        test.start()  # here: one task runs the fixtures and the test
        yield
        await test.end()

    return around_test


def _asyncio_fixture(scope: Any) -> Any:
    import pytest_asyncio  # noqa: PLC0415 -- whoever marks a test with asyncio has it

    @pytest_asyncio.fixture(name=_ASYNCIO.format(scope=scope), loop_scope=scope)
    async def around_test(request: pytest.FixtureRequest) -> AsyncIterator[None]:
        test = request.node.stash[ASYNC_TEST]
        await test.begin()  # a task of its own: what it sets the test does not see
        yield
        await test.end()

    return around_test
