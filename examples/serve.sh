#!/usr/bin/env bash
# Megatron's text-generation server in low bits, at TP 3 on this machine's CPU, asked with curl.
#
#   examples/serve.sh ["A PROMPT" ...]
#
# Serves the checkpoint that examples/quickstart.sh makes (run that first), asks for 16 tokens after
# each prompt, prints the answers, and stops the server.
#
#   CKPT=DIR   another checkpoint for TP 3, with a calibration index in DIR/lowbit
#   ARGS=...   more arguments of Megatron's, for what --use-checkpoint-args forgets
#   PORT=N     default: 5000
#   KEEP=1     leave the server running, until Ctrl-C

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=tools/setup_env.sh
source "$ROOT/tools/setup_env.sh"

CKPT="${CKPT:-$ROOT/out/quickstart/ckpt}"
PORT="${PORT:-5000}"
LOG="$ROOT/out/serve.log"
mkdir -p "$ROOT/out"
TOKENS=16
PROMPTS=("$@")
((${#PROMPTS[@]})) || PROMPTS=("The capital of France is")

die() { echo "serve: $*" >&2; exit 1; }
command -v curl >/dev/null || die "curl is not installed"
[[ -d "$CKPT/lowbit" ]] || die "no calibration index in $CKPT/lowbit: run examples/quickstart.sh first"
if curl -s -o /dev/null "http://127.0.0.1:$PORT/"; then
    die "something listens on port $PORT already: set PORT to another"
fi

export OMP_NUM_THREADS=1 PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export no_proxy="localhost,127.0.0.1${no_proxy:+,$no_proxy}"
if [[ -e /sys/class/net/lo ]]; then
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
fi

ALL=(--load "$CKPT" --use-checkpoint-args --tensor-model-parallel-size 3 --bf16)
ALL+=(--micro-batch-size 1 --port "$PORT" --lowbit-tp-comm --lowbit-collective one-shot)
read -ra more <<<"${ARGS:-}"
SCRIPT="$ROOT/examples/text_generation_server.py"

# Without torchrun, whose store listens on every address: rank 0's listens on this one alone.
export MASTER_ADDR=127.0.0.1 WORLD_SIZE=3 LOCAL_WORLD_SIZE=3
MASTER_PORT="$("$ENV_PYTHON" -c 'import socket
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    print(free.getsockname()[1])')"
export MASTER_PORT
RANKS=()
for rank in 0 1 2; do
    RANK=$rank LOCAL_RANK=$rank "$ENV_PYTHON" -m megatron_lowbit.launch "$SCRIPT" "${ALL[@]}" "${more[@]}" \
        >"${LOG%.log}.rank$rank.log" 2>&1 &
    RANKS+=($!)
done
LOG="${LOG%.log}.rank0.log"
stop() {
    kill "${RANKS[@]}" 2>/dev/null || true
    wait "${RANKS[@]}" 2>/dev/null || true
}
trap stop EXIT

echo "serve: starting the server on port $PORT; its messages go to ${LOG#"$ROOT"/}"
until curl -s -o /dev/null "http://127.0.0.1:$PORT/"; do
    for pid in "${RANKS[@]}"; do
        kill -0 "$pid" 2>/dev/null || {
            tail -n 20 "${LOG%0.log}"*.log >&2
            die "a rank of the server has ended; the last messages are above"
        }
    done
    sleep 1
done
grep "^> low-bit" "$LOG"

for prompt in "${PROMPTS[@]}"; do
    request="$("$ENV_PYTHON" -c 'import json, sys
print(json.dumps({"prompts": [sys.argv[1]], "tokens_to_generate": int(sys.argv[2]), "top_k": 1}))' \
        "$prompt" "$TOKENS")"
    echo "serve: PUT /api $request"
    curl -sS --max-time 300 -X PUT -H "Content-Type: application/json" -d "$request" "http://127.0.0.1:$PORT/api" |
        "$ENV_PYTHON" -c 'import json, sys
answer = json.load(sys.stdin)
print("serve:", answer["text"][0] if "text" in answer else answer)'
done
if [[ -n "${KEEP:-}" ]]; then
    echo "serve: the server stays up on port $PORT; Ctrl-C ends it"
    wait -n "${RANKS[@]}"
fi
