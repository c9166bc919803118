"""tidyrows in test frameworks: one object per test, and each framework's own way to get it."""

from tidyrows.testing.tidy import Tidy
from tidyrows.testing.unittest_case import AsyncTidyTestCase, TidyTestCase

__all__ = ["AsyncTidyTestCase", "Tidy", "TidyTestCase"]
