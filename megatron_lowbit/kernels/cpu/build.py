"""Compile the C kernels at first use, keep the result, and say aloud when that fails.

The library lies in ``${XDG_CACHE_HOME:-~/.cache}/megatron_lowbit`` under a name that holds a hash
of everything it depends on: source, flags, compiler and CPU, for machines of several kinds may
share a home directory. Ranks that build at once write to names of their own and rename: the last
one wins, and all are the same. Where the cache cannot be used the library is built in a temporary
directory, for this process alone. Building takes one to three seconds.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

from megatron_lowbit.kernels.switches import SWITCH, is_disabled, switched_off_by_user

_SOURCES = Path(__file__).parent
# The bits are those of the reference only if nothing is fused, reordered or assumed finite.
_FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared"]
_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT = 300  # seconds for one run of the compiler; it takes one to three


@dataclass(frozen=True)
class _Loaded:
    """The kernels of this process, or why there are none."""

    library: ctypes.CDLL | None
    reason: str = ""


_loaded: _Loaded | None = None
_lock = threading.Lock()


def library() -> ctypes.CDLL | None:
    """The compiled kernels, built if need be; None where there are none or they are switched off.

    The first call that cannot build them warns.
    """
    return None if is_disabled() else _load_once().library


def describe() -> str:
    """What the codecs run on CPUs: ``C (gcc 12.2.0)``, or ``none: `` and the reason."""
    if is_disabled():
        return "none: disabled"
    loaded = _load_once()
    if loaded.library is None:
        return f"none: {loaded.reason}"
    loaded.library.compiler.restype = ctypes.c_char_p
    return f"C ({loaded.library.compiler().decode().strip()})"


def _load_once() -> _Loaded:
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _load()
    return _loaded


def _load() -> _Loaded:
    if reason := switched_off_by_user():
        return _Loaded(None, reason)
    try:
        return _Loaded(_build())
    except (OSError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())
        warnings.warn(
            f"megatron_lowbit: no fast CPU codec ({reason}): rotated-hybrid runs in plain torch, "
            f"about 50 times slower. Install a C compiler, or set {SWITCH}=0 to silence this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return _Loaded(None, reason)


def _build() -> ctypes.CDLL:
    """Open the library of the cache, or one made for this process alone."""
    compiler = _compiler()
    name = f"rotated_hybrid-{_key(compiler)}.so"
    try:
        return _open(compiler, _cache() / name)
    except OSError:  # no such place, or nothing can be written or run there
        # The mapping outlives the file.
        with tempfile.TemporaryDirectory(prefix="megatron_lowbit-") as directory:
            return _open(compiler, Path(directory) / name)


def _open(compiler: list[str], path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # not there yet, or damaged
        path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        _compile(compiler, temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return ctypes.CDLL(str(path))


def _compile(compiler: list[str], output: str) -> None:
    sources = sorted(map(str, _SOURCES.glob("*.c")))
    command = [*compiler, *_FLAGS, *sources, "-o", output, "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    if done.returncode:
        lines = done.stderr.splitlines() or ["no message"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise OSError(f"{shlex.join(compiler)} failed: {first}")


def _compiler() -> list[str]:
    """The command of the compiler: $CC, which may have arguments, or the first that is found."""
    asked = shlex.split(os.environ.get("CC", ""))
    if asked:
        if shutil.which(asked[0]) is None:
            raise OSError(f"no C compiler: CC names {asked[0]}, which cannot be run")
        return asked
    found = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if found is None:
        raise OSError(f"no C compiler found: looked for {', '.join(_COMPILERS)} and $CC")
    return [found]


def _cache() -> Path:
    directory = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(directory):  # the standard says: ignore a relative one
        directory = os.path.expanduser("~/.cache")
    if not os.path.isabs(directory):
        raise OSError("this user has no home directory")
    return Path(directory) / "megatron_lowbit"


def _key(compiler: list[str]) -> str:
    """A name for what the library depends on."""
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, timeout=_TIMEOUT
    )
    parts = [shlex.join(compiler), version.stdout, *_FLAGS, platform.machine(), _cpu()]
    sources = sorted(path for path in _SOURCES.iterdir() if path.suffix in (".c", ".h"))
    parts += [path.read_text() for path in sources]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _cpu() -> str:
    """The instructions that this CPU has, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
