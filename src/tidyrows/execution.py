"""The execution option that marks tidyrows' own statements, which capture must not hear."""

from __future__ import annotations

INTERNAL = "tidyrows_internal"
