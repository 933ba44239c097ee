"""Codecs that were tried, measured and not kept; `candidates` says why of each."""
