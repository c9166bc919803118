"""The execution option that marks tidyrows' own statements, which capture ignores."""

from __future__ import annotations

INTERNAL = "tidyrows_internal"
