"""Whole-suite mode: the rows that a suite commits through any engine, tracked per test."""
