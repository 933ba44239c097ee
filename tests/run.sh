#!/usr/bin/env bash
# Run the checks of the project: lint, formatting, types, tests.
#
#   tests/run.sh                         everything, on every release of Megatron-core: 20 minutes
#   tests/run.sh unit                    what needs neither Megatron nor Triton, and is not slow
#   tests/run.sh [unit] PYTEST ARGUMENTS
#                                        e.g. tests/run.sh unit -k wire
#                                             tests/run.sh tests/codecs/test_wire.py -x
#                                             tests/run.sh -n 0 -s tests/codecs/test_wire.py
#
# unit is tests/codecs, comm, calibration, evaluation, benchmark and tests/test_*.py, without what
# has the mark "slow". It installs neither the older releases of Megatron-core nor
# lm-evaluation-harness (620 MB); a later full run does.
#
# Two workers of pytest-xdist share the files of tests; -n 0 runs all in one process.
# Makes or reuses the environment .venv (see tools/setup_env.sh). Paths among the arguments are
# relative to the root of the checkout. All checks run even when one fails; the exit status is 0
# only if all of them passed.

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"

for argument in "$@"; do
    if [[ "$argument" == -h || "$argument" == --help ]]; then
        sed -n '2,/^$/s/^# \{0,1\}//p' "$ROOT/tests/run.sh"
        exit
    fi
done

TESTS=()
case "${1:-}" in
unit)
    shift
    TESTS=(-m "not slow" tests/{codecs,comm,calibration,evaluation,benchmark} tests/test_*.py)
    export LOWBIT_OLDER_MEGATRONS=no
    ;;
-* | "") export LOWBIT_LM_EVAL=yes ;;
*)
    if [[ ! -e "${1%%::*}" ]]; then
        echo "tests/run.sh: $1 is neither unit nor a path: see tests/run.sh --help" >&2
        exit 2
    fi
    ;;
esac

# shellcheck source=tools/setup_env.sh
source "$ROOT/tools/setup_env.sh"

# Multi-process tests: one compute thread a rank, and Gloo on the loopback interface, whatever
# the host name resolves to and whatever proxy the shell has set.
export OMP_NUM_THREADS=1
if [[ -e /sys/class/net/lo ]]; then
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
fi
export no_proxy="localhost,127.0.0.1,::1${no_proxy:+,$no_proxy}"
export NO_PROXY="$no_proxy"

SOURCES=(megatron_lowbit tools examples tests setup.py)
summary=()
failures=0

# check NAME COMMAND...: run it, and note how it ended.
check() {
    local name="$1" start=$SECONDS status=0
    shift
    echo "== $name"
    "$@" || status=$?
    if ((status == 0)); then
        summary+=("$name: ok ($((SECONDS - start)) s)")
    else
        summary+=("$name: FAILED, exit status $status ($((SECONDS - start)) s)")
        failures=$((failures + 1))
    fi
}

check "ruff check" "$ENV_PYTHON" -m ruff check "${SOURCES[@]}"
check "ruff format" "$ENV_PYTHON" -m ruff format --check "${SOURCES[@]}"
check "mypy" "$ENV_PYTHON" -m mypy --config-file .mypy.ini
# By file, since the tests of one share what is slow to make, and in the order of tests/conftest.py,
# not of the number of tests in a file, which says nothing about its time.
WORKERS=(-n 2 --dist loadfile --no-loadscope-reorder)
check "pytest" "$ENV_PYTHON" -m pytest -c tests/pytest.ini --rootdir=. "${WORKERS[@]}" \
    "${TESTS[@]}" "$@"

echo "== summary"
printf '%s\n' "${summary[@]}"
if ((failures > 0)); then
    echo "$failures of ${#summary[@]} checks failed"
    exit 1
fi
echo "all ${#summary[@]} checks ok"
