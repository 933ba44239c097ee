"""Formats of other systems, for comparison in the same harness; `systems` says whose they are."""
