"""Locks that a project asks for by name, and what is done once per run."""
