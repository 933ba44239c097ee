"""Benchmarks: what tools/bench_*.py, gpu_check.sh, predict.py and robustness.py run."""
