"""The megatron-core releases that are supported, and how to run a script on each.

`tools/setup_env.sh` installs them. ``main`` is Megatron-LM's current main branch: a checkout that
the environment variable MEGATRON_LM names.
"""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAIN = "main"
# The one that `import megatron.core` finds by itself, and the older ones, each in its folder.
NEWEST = re.search(
    r"^megatron-core==(\S+)", (ROOT / "tools" / "requirements.txt").read_text(), re.MULTILINE
)[1]
OLDER = re.findall(
    r"^[\d.]+$", (ROOT / "tools" / "megatron_releases.txt").read_text(), re.MULTILINE
)
RELEASES = [*OLDER, NEWEST, MAIN]


# What a launcher sets: a test that runs in a rank starts processes that are none.
_OF_A_RANK = re.compile("RANK|WORLD_SIZE|(LOCAL|MASTER|TORCHELASTIC)_.*")


def environment(release: str = NEWEST) -> dict[str, str]:
    """Environment variables that make `import megatron.core` take `release`, or a skipped test."""
    path = [str(ROOT)]
    if release != NEWEST:
        path.insert(0, str(folder_of(release)))
    env = {name: value for name, value in os.environ.items() if not _OF_A_RANK.fullmatch(name)}
    return {**env, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def folder_of(release: str) -> Path:
    """The folder that holds the package `megatron` of a release that is not the newest."""
    if release == MAIN:
        if not os.environ.get("MEGATRON_LM"):
            pytest.skip("MEGATRON_LM does not name a checkout of Megatron-LM")
        folder = Path(os.environ["MEGATRON_LM"]).resolve()
    else:
        folder = Path(sys.prefix) / f"megatron-core-{release}"
    if not (folder / "megatron" / "core").is_dir():
        pytest.skip(f"there is no megatron-core {release} in {folder}: run tests/run.sh")
    return folder


def is_release(version: str, release: str) -> bool:
    """Whether `megatron.core.__version__`, which may name a commit, is that of `release`."""
    return release == MAIN or version.startswith(release)


@functools.cache
def describe_main() -> str:
    """Version and commit of the checkout that MEGATRON_LM names."""
    folder = folder_of(MAIN)
    text = (folder / "megatron" / "core" / "package_info.py").read_text()
    version = ".".join(re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)", text, re.MULTILINE))
    git = ["git", "-C", str(folder), "log", "-1", "--format=%h of %cs"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    is_checkout = (folder / ".git").exists() and done.returncode == 0
    return f"Megatron-LM {version}" + (f", commit {done.stdout.strip()}" if is_checkout else "")


def run(*command: str | Path, env: dict[str, str] | None = None, status=0, timeout=300, **more):
    """Run a command, which must end with `status`; stdout and stderr are captured as text."""
    words = [str(part) for part in command]
    texts = {"capture_output": True, "text": True, "check": False}
    done = subprocess.run(words, env=env or environment(), timeout=timeout, **texts, **more)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def torchrun(ranks: int, *command: str | Path, **more):
    """As `run` does, a script under torchrun."""
    runner = ["-m", "torch.distributed.run", "--nproc-per-node", ranks, "--master-port", 0]
    runner += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return run(sys.executable, *runner, *command, **more)
