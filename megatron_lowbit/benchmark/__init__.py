"""Benchmarks: what tools/bench_*.py, tools/predict.py and tools/robustness.py run.

collectives/   speed over emulated links: the sweep, time to first token, what is asked
codecs/        speed of the codecs' kernels, each checked against plain torch first
quality/       divergence of codecs, recipes and peers; how robust calibration is
prediction/    the cost model on hardware that is not here, and its check
timing         medians and percentiles, for all of them
"""
