"""Observing: every engine of the process, and a sink that holds no rows."""
