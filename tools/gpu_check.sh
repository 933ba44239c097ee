#!/usr/bin/env bash
# Check and time the GPU kernels on this machine, with its own python3: torch, Triton, safetensors.
#
#   tools/gpu_check.sh OUT_DIR [--minutes 8]     writes OUT_DIR/gpu_check.json
#   tools/gpu_check.sh --table gpu_check.json    puts it into megatron_lowbit/kernels/README.md
#   tools/gpu_check.sh --help

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec python3 -m megatron_lowbit gpu-check "$@"
