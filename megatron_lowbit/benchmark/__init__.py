"""Benchmarks: what tools/bench_*.py, gpu_check.sh, predict.py and robustness.py run.

collectives/   speed over emulated links: the sweep, time to first token, what is asked
codecs/        speed of the codecs' kernels, each checked against plain torch first
gpu_check/     what a GPU says of the kernels, in one command
quality/       divergence of codecs, recipes and peers; how robust calibration is
prediction/    the cost model on hardware that is not here, and its check
timing         medians and percentiles, for all of them
"""
