"""Chores of the project that `make` and CI call."""
