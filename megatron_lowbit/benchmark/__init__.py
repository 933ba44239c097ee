"""Benchmarks: emulated links, the sweep over collectives.

tools/bench_*.py are thin command lines over this.
"""
