"""One factory for each model, kept with the model's mapping."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

_KEY = "tidyrows.factory"


def factory_of(model: type, base: Any) -> Any:
    """The factory made from a model; it lives as long as the mapping of the model.

    Args:
        model: a mapped class.
        base: the class to derive it from, if there is none yet.
    """
    kept: dict[str, Any] = sa.inspect(model).class_manager.info
    if _KEY not in kept:
        kept.setdefault(_KEY, derived(model, base))
    return kept[_KEY]


def derived(model: type, base: Any) -> Any:
    """A new factory made from a model."""
    meta = type("Meta", (), {"model": model, "auto": True})
    return type(base)(
        f"{model.__name__}Factory", (base,), {"Meta": meta, "__module__": model.__module__}
    )
