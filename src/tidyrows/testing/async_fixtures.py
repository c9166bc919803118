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
        # One task runs the fixtures and the test: what this one sets, the test sees.
        return _registered(item.config, _ANYIO, pytest.fixture(name=_ANYIO), starts=True)
    mark = item.get_closest_marker("asyncio")
    if mark is None or not item.config.pluginmanager.has_plugin("asyncio"):
        return None
    import pytest_asyncio  # noqa: PLC0415 -- whoever marks a test with asyncio has it

    scope: Any = mark.kwargs.get("loop_scope") or mark.kwargs.get("scope")
    scope = scope or _default(item.config)
    name = _ASYNCIO.format(scope=scope)
    fixture = pytest_asyncio.fixture(name=name, loop_scope=scope)
    return _registered(item.config, name, fixture, starts=False)


def _default(config: pytest.Config) -> str:
    try:
        return config.getini("asyncio_default_test_loop_scope") or "function"
    except ValueError:  # pytest-asyncio older than 0.26 does not know it
        return "function"


def _registered(
    config: pytest.Config, name: str, fixture: Callable[[Any], Any], *, starts: bool
) -> str:
    """Register a fixture with pytest, once."""
    if not config.pluginmanager.has_plugin(name):

        async def around_test(request: pytest.FixtureRequest) -> AsyncIterator[None]:
            test = request.node.stash[ASYNC_TEST]
            await test.begin()
            if starts:
                test.start()
            yield
            await test.end()

        holder = ModuleType(name)  # pytest looks for fixtures in modules and classes
        setattr(holder, name, fixture(around_test))
        config.pluginmanager.register(holder, name)
    return name
