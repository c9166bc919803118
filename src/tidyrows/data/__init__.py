"""Rows from files and files from rows: YAML, JSON and TOML, made and read through factories."""
