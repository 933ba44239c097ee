#!/usr/bin/env python3
"""Read many wrong indexes, in a fixed order: how many were refused, and every broken promise.

python tests/calibration/fuzz_indexes.py --count 10000
"""

import argparse
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import index_mutations  # noqa: E402

_SECONDS = 30  # of one case; more is a hang
_MEMORY = 1 << 20  # KB


def main() -> int:
    """Run, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--start", type=int, default=0, help="first seed")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, _hang)
    before, started = _memory(), time.monotonic()
    found, faults = Counter(), 0
    with tempfile.TemporaryDirectory() as directory:
        base, wrong = Path(directory, "base"), Path(directory, "wrong")
        index_mutations.make(base)
        for seed in range(options.start, options.start + options.count):
            signal.alarm(_SECONDS)
            try:
                what, outcome = index_mutations.run(base, wrong, seed)
                found[f"{outcome}: {what.split()[0]}"] += 1
            except Exception as error:
                faults += 1
                print(f"{' '.join(error.__notes__)}: {type(error).__name__}: {error}", flush=True)
    signal.alarm(0)
    for name, count in sorted(found.items()):
        print(f"{count:6}  {name}")
    grown = _memory() - before
    took = f"{time.monotonic() - started:.0f} s, memory grew by {grown / 1024:.0f} MB"
    print(f"{options.count} indexes, {faults} faults, {took}")
    return 1 if faults or grown > _MEMORY else 0


def _hang(*_) -> None:
    raise TimeoutError(f"more than {_SECONDS} s")


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(main())
