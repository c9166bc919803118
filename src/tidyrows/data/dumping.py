"""dump_rows: what a test has made, as a file for load_rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.orm import Mapper

from tidyrows.arguments import checked, instance_of, optional
from tidyrows.data.loading import FACTORIES
from tidyrows.data.written_rows import Writer
from tidyrows.errors import DataFileError
from tidyrows.factories import TrackedFactory
from tidyrows.tracking.tracker import ResourceTracker

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

_BREAKS = frozenset("\x85\u2028\u2029")
"""Characters that YAML takes for the end of a line."""
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


@checked(
    tracker=instance_of(ResourceTracker, need="a ResourceTracker", example="tracker"),
    factories=optional(FACTORIES),
)
def dump_rows(
    tracker: ResourceTracker,
    path: str | os.PathLike[str] | None = None,
    *,
    factories: Mapping[str, type[TrackedFactory[Any]]] | None = None,
) -> str:
    """Write the committed rows of a tracker as a data file, which :func:`load_rows` loads again.

    Rows are named by number, and refer to each other. What the database counts, and values that are
    the column's default, are left out. The tag of the test becomes ``{tag}``.

    Args:
        tracker: has the rows.
        path: where the text is written; the ending is ``.yaml``, ``.yml`` or ``.json``.
        factories: the factories by the names that the file shall have for them. By default, all
            that this process knows, by the name of the model: ``order_line`` for ``OrderLine``.

    Returns:
        The text; YAML where there is no path.

    Raises:
        DataFileError: a table has no factory, a value has no form in a file, or rows reference
            each other in a circle.
    """
    suffix = ".yaml" if path is None else Path(path).suffix.lower()
    writer = _WRITERS.get(suffix)
    if writer is None:
        raise DataFileError(
            f"{path}: dump_rows writes {', '.join(_WRITERS)}, by the ending of the name.",
            file=str(path),
        )
    tracker.sessions.refuse_blocking("run_sync(dump_rows)")
    tracker.engines.resolve()
    text = writer(Writer(tracker, factories or _known_factories(tracker)).entries())
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def _known_factories(tracker: ResourceTracker) -> dict[str, type[TrackedFactory[Any]]]:
    """The factories of this process, the first of each model, by the model's name.

    Where other models have the same name, it is that of the model whose rows are here.
    """
    held = {each.table.table for each in tracker.store.snapshot() if each}
    waiting: list[type[TrackedFactory[Any]]] = TrackedFactory.__subclasses__()[::-1]
    known: dict[Mapper[Any], type[TrackedFactory[Any]]] = {}
    while waiting:
        factory = waiting.pop()
        options: Any = factory._meta  # noqa: SLF001 -- factory_boy has no public name
        model = None if options.abstract else options.get_model_class()
        mapper = sa.inspect(model, raiseerr=False)
        if isinstance(mapper, Mapper):
            known.setdefault(mapper, factory)
        waiting += factory.__subclasses__()[::-1]
    found: dict[str, type[TrackedFactory[Any]]] = {}
    for mapper in sorted(known, key=lambda mapper: held.isdisjoint(mapper.tables)):
        found.setdefault(_HUMP.sub("_", mapper.class_.__name__).lower(), known[mapper])
    return found


def _yaml(entries: dict[str, Any]) -> str:
    try:
        import yaml  # noqa: PLC0415 -- an optional dependency
    except ModuleNotFoundError as error:
        raise DataFileError(
            'YAML needs PyYAML. Write pip install "tidyrows[yaml]", or give a path that ends in '
            ".json."
        ) from error

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML ships no types
        pass

    def write(dumper: Any, text: str) -> Any:
        style = None if _BREAKS.isdisjoint(text) else '"'  # with an escape for each
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, write)
    text: str = yaml.dump(
        entries,
        Dumper=Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=100,
    )
    return text


def _json(entries: dict[str, Any]) -> str:
    return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"


_WRITERS = {".yaml": _yaml, ".yml": _yaml, ".json": _json}
