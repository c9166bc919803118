"""The tracker, and what it holds."""
