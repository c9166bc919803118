"""YAML with the place of each value, by PyYAML's safe loader."""

from __future__ import annotations

from typing import Any

from tidyrows.data.nodes import Node, Place, at, twice
from tidyrows.errors import DataFileError

_MERGE = "tag:yaml.org,2002:merge"
_COLLECTIONS = {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}


def read_yaml(file: str, text: str) -> Node:
    """The nodes of a YAML text."""
    try:
        import yaml  # noqa: PLC0415 -- an optional dependency
    except ModuleNotFoundError as error:
        raise DataFileError(
            f'{file}: YAML needs PyYAML. Write pip install "tidyrows[yaml]", or use JSON or TOML.',
            file=file,
        ) from error
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)  # the same in C, where it is built
    try:
        root = loader.get_single_node()
        return Node({}, Place(1, 1)) if root is None else _Nodes(file, loader).node(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise at(file, _place(mark), f"no YAML that is read here: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise at(file, Place(), f"no YAML that is read here: {error}.") from error
    finally:
        loader.dispose()


def _place(mark: Any) -> Place:
    return Place() if mark is None else Place(mark.line + 1, mark.column + 1)


class _Nodes:
    """Our nodes of PyYAML's, which keep duplicate names."""

    def __init__(self, file: str, loader: Any) -> None:
        self.file, self.loader = file, loader

    def node(self, found: Any, above: tuple[int, ...] = ()) -> Node:
        place = _place(found.start_mark)
        if id(found) in above:
            raise at(self.file, place, "this anchor contains itself.")
        above = (*above, id(found))
        if found.id != "scalar" and found.tag not in _COLLECTIONS:
            raise at(self.file, place, f"{found.tag} is not read here. Write a mapping or a list.")
        if found.id == "mapping":
            return self.mapping(found, place, above)
        if found.id == "sequence":
            return Node([self.node(each, above) for each in found.value], place)
        return Node(self.scalar(found, place), place)

    def scalar(self, found: Any, place: Place) -> Any:
        try:
            return self.loader.construct_object(found, deep=True)
        except ValueError as error:  # 2026-02-31
            raise at(self.file, place, f"{found.value} is no value: {error}.") from error

    def mapping(self, found: Any, place: Place, above: tuple[int, ...]) -> Node:
        node = Node({}, place)
        bases: list[Node] = []
        for key, value in found.value:
            start = _place(key.start_mark)
            if key.tag == _MERGE:
                bases += self.bases(value, above)
                continue
            if key.id != "scalar":
                raise at(self.file, start, "a name is a text, and this is a list or a mapping.")
            name: str = key.value  # as it is written: on and 1 are names too
            if name in node.value:
                raise at(self.file, start, twice(name, node.names[name]))
            node.names[name] = start
            node.value[name] = self.node(value, above)
        for base in bases:  # <<: *base; what is written here wins
            for name, value in base.value.items():
                if name not in node.value:
                    node.names[name], node.value[name] = base.names[name], value
        return node

    def bases(self, value: Any, above: tuple[int, ...]) -> list[Node]:
        found = [
            self.node(each, above) for each in (value.value if value.id == "sequence" else [value])
        ]
        for each in found:
            if not isinstance(each.value, dict):
                raise at(self.file, each.place, "<< takes a mapping.")
        return found
