#!/usr/bin/env python3
"""`python -m megatron_lowbit doctor`, from a checkout and any working directory."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs from a plain checkout

from megatron_lowbit import cli


def main() -> None:
    """Tell whether low bits pay on this machine."""
    from megatron_lowbit.benchmark.doctor import doctor_command

    doctor_command.main(sys.argv[1:])


if __name__ == "__main__":
    cli.run(main)
