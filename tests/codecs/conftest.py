"""Fixtures of the codecs' tests."""

from foreign_package import installed  # noqa: F401
