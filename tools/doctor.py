#!/usr/bin/env python3
"""`python -m megatron_lowbit doctor`, from a checkout and any working directory."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_lowbit import commands

if __name__ == "__main__":
    commands.run("doctor")
