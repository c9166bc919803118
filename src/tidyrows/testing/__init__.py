"""tidyrows in test frameworks: one object per test, and each framework's own way to get it."""

from tidyrows.testing.case import AsyncTidyTestCase, TidyTestCase
from tidyrows.testing.tidy import Tidy

__all__ = ["AsyncTidyTestCase", "Tidy", "TidyTestCase"]
