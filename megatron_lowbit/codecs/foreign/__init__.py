"""Codecs of other packages: found by name, and checked against the contract of every codec."""
