"""Packages whose schemas are borrowed."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from harness import servers


def borrowed(module: str, package: str) -> Any:
    """A module of a package of the ``dev`` extra; where it is absent, that is said loudly."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        reason = f"{package} is not at hand: `pip install {package}` ({error})"
        if servers.everything_required():
            pytest.fail(f"{servers.REQUIRE_VARIABLE}=all, but {reason}", pytrace=False)
        pytest.skip(reason)
