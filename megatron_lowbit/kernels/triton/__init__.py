"""Triton kernels: a module a family, with the same functions as the family's module for CPUs.

`parts` has what programs are made of. Nothing here is imported before the first GPU tensor comes.
"""
