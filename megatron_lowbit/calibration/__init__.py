"""Calibration: statistics of a model's partials, BF16 indexes, recipes, and the files they lie in.

Written over `model.summing`, so that nothing here knows Megatron.
"""
