"""The version is that of the installed package, and importing tidyrows does not look for it."""

from __future__ import annotations

from importlib import metadata

import pytest

import tidyrows


def test_the_version_is_the_installed_packages():
    assert tidyrows.__version__ == metadata.version("tidyrows")


def test_the_version_is_read_only_where_it_is_asked_for(monkeypatch):
    assert "__version__" not in vars(tidyrows)
    monkeypatch.setattr(metadata, "version", lambda name: f"{name} 1.2.3")
    assert tidyrows.__version__ == "tidyrows 1.2.3"


def test_without_an_installed_package_there_is_no_version(monkeypatch):
    """Programs ask for it with a default, as for any module's."""

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert getattr(tidyrows, "__version__", "unknown") == "unknown"
    with pytest.raises(AttributeError, match="not installed"):
        assert tidyrows.__version__


def test_any_other_name_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'tidyrows' has no attribute 'nonsense'"):
        assert tidyrows.nonsense
