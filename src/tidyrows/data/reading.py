"""A data file as nodes; the ending of its name says which language it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tidyrows.data.json_nodes import read_json
from tidyrows.data.nodes import Place, at
from tidyrows.data.toml_nodes import read_toml
from tidyrows.data.yaml_nodes import read_yaml
from tidyrows.errors import DataFileError

if TYPE_CHECKING:
    import os

    from tidyrows.data.nodes import Node

_READERS = {".yaml": read_yaml, ".yml": read_yaml, ".json": read_json, ".toml": read_toml}


def read(path: str | os.PathLike[str]) -> tuple[str, Node]:
    """The name of a file for errors, and its nodes."""
    file = str(path)
    reader = _READERS.get(Path(file).suffix.lower())
    if reader is None:
        raise DataFileError(
            f"{file}: the ending of the name says no language. It can be {', '.join(_READERS)}.",
            file=file,
        )
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataFileError(f"{file} cannot be read: {error}.", file=file) from error
    root = reader(file, text)
    if not isinstance(root.value, dict):
        raise at(
            file, Place(1, 1), "a file has a mapping of factories, as in user: {ada: {name: Ada}}."
        )
    return file, root
