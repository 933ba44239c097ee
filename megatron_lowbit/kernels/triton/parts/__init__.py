"""Pieces of Triton programs, each for one token's row."""
