#!/usr/bin/env bash
# Megatron's OpenAI-compatible server in low bits, at TP 3 on this machine's CPU, asked with curl.
#
#   examples/serve.sh ["A PROMPT" ...]
#
# Serves the checkpoint that examples/quickstart.sh makes (run that first), asks for 16 tokens after
# each prompt, prints the answers, and stops the server. The server answers from Megatron's dynamic
# engine; where that cannot be had, from the static one, and says so.
#
#   CKPT=DIR   another checkpoint for TP 3, with a calibration index in DIR/lowbit
#   ARGS=...   more arguments of Megatron's, for what --use-checkpoint-args forgets
#   PORT=N     default: 5000
#   ENGINE=... dynamic (default) or static, Megatron's older server
#   KEEP=1     leave the server running, until Ctrl-C

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=tools/setup_env.sh
source "$ROOT/tools/setup_env.sh"

CKPT="${CKPT:-$ROOT/out/quickstart/ckpt}"
PORT="${PORT:-5000}"
ENGINE="${ENGINE:-dynamic}"
LOGS="$ROOT/out/serve-$PORT.rank" # and the rank, and .log
mkdir -p "$ROOT/out"
TOKENS=16
PROMPTS=("$@")
((${#PROMPTS[@]})) || PROMPTS=("The capital of France is")

die() { echo "serve: $*" >&2; exit 1; }
command -v curl >/dev/null || die "curl is not installed"
[[ -d "$CKPT/lowbit" ]] || die "no calibration index in $CKPT/lowbit: run examples/quickstart.sh first"
[[ "$ENGINE" == dynamic || "$ENGINE" == static ]] || die "ENGINE=$ENGINE: dynamic or static"
if curl -s -o /dev/null "http://127.0.0.1:$PORT/"; then
    die "something listens on port $PORT already: set PORT to another"
fi

export OMP_NUM_THREADS=1 PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export no_proxy="localhost,127.0.0.1${no_proxy:+,$no_proxy}"
if [[ -e /sys/class/net/lo ]]; then
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
fi

ALL=(--load "$CKPT" --use-checkpoint-args --tensor-model-parallel-size 3 --bf16)
if [[ "$ENGINE" == dynamic ]]; then
    missing="$("$ENV_PYTHON" -c 'import importlib.util as u
print(*(name for name in ("quart", "hypercorn", "zmq", "msgpack") if u.find_spec(name) is None))')"
    if [[ -n "$missing" ]]; then
        echo "serve: the static engine, since the dynamic one's endpoint lacks $missing:" \
            'pip install "megatron_lowbit[serve]"'
        ENGINE=static
    fi
fi
ALL+=(--micro-batch-size 1 --port "$PORT" --lowbit-tp-comm --lowbit-collective one-shot)
read -ra more <<<"${ARGS:-}"
SCRIPT="$ROOT/examples/openai_server.py"
[[ "$ENGINE" == dynamic ]] || SCRIPT="$ROOT/examples/text_generation_server.py"

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
        >"$LOGS$rank.log" 2>&1 &
    RANKS+=($!)
done
stop() {
    kill "${RANKS[@]}" 2>/dev/null || true
    wait "${RANKS[@]}" 2>/dev/null || true
}
trap stop EXIT

echo "serve: starting the $ENGINE engine on port $PORT; its messages go to ${LOGS#"$ROOT"/}0.log"
until curl -s -o /dev/null --max-time 5 "http://127.0.0.1:$PORT/"; do
    for pid in "${RANKS[@]}"; do
        kill -0 "$pid" 2>/dev/null || {
            tail -n 20 "$LOGS"*.log >&2
            die "a rank of the server has ended; the last messages are above"
        }
    done
    sleep 1
done
grep "^> low-bit" "${LOGS}0.log"

# ask_dynamic PROMPT, ask_static PROMPT: the request, and the text of the answer
ask_dynamic() {
    ask "$1" POST /v1/completions '{"prompt": sys.argv[1], "max_tokens": int(sys.argv[2]), "temperature": 0}' \
        'answer["choices"][0]["text"]'
}
ask_static() {
    ask "$1" PUT /api '{"prompts": [sys.argv[1]], "tokens_to_generate": int(sys.argv[2]), "top_k": 1}' \
        'answer["text"][0].removeprefix(sys.argv[1])'
}

# ask PROMPT METHOD PATH REQUEST TEXT: the last two in Python
ask() {
    local request
    request="$("$ENV_PYTHON" -c "import json, sys; print(json.dumps($4))" "$1" "$TOKENS")"
    echo "serve: $2 $3 $request"
    curl -sS --max-time 300 -X "$2" -H "Content-Type: application/json" -d "$request" \
        "http://127.0.0.1:$PORT$3" | "$ENV_PYTHON" -c "import json, sys
answer = json.load(sys.stdin)
print('serve:', sys.argv[1] + $5 if 'error' not in answer else answer)" "$1"
}

for prompt in "${PROMPTS[@]}"; do
    "ask_$ENGINE" "$prompt"
done
if [[ -n "${KEEP:-}" ]]; then
    echo "serve: the server stays up on port $PORT; Ctrl-C ends it"
    wait -n "${RANKS[@]}"
fi
