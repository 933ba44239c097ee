"""tests/run.sh and tools/setup_env.sh: what they run and install, seen by stand-ins for Python."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RELEASES = (ROOT / "tools" / "megatron_releases.txt").read_text().split("\n")
OLDER = [line for line in RELEASES if line and not line.startswith("#")]


def bash(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), **environment}
    done = ["bash", *command]
    return subprocess.run(
        done, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def alone(tmp_path) -> Path:
    """The script without anything that it could make an environment with."""
    (tmp_path / "tests").mkdir()
    return shutil.copy(ROOT / "tests" / "run.sh", tmp_path / "tests")


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["unit", "--help"]])
def test_help_comes_at_once(alone, tmp_path, words):
    done = bash(str(alone), *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tests/run.sh unit" in done.stdout
    assert done.stdout.startswith("Run the checks of the project")
    assert "set -euo" not in done.stdout


@pytest.mark.parametrize("word", ["untis", "tests/codecs/test_wires.py", "nowhere/test_x.py::test"])
def test_a_typo_is_named_before_anything_is_installed(alone, tmp_path, word):
    done = bash(str(alone), word, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"tests/run.sh: {word} is neither unit nor a path: see tests/run.sh --help\n"
    )


@pytest.fixture
def noted(alone, tmp_path) -> Path:
    """A file that gets a line for each check, instead of the check."""
    (tmp_path / "tools").mkdir()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "older=${LOWBIT_OLDER_MEGATRONS:-yes} $*" >>noted\n')
    python.chmod(0o755)
    (tmp_path / "tools" / "setup_env.sh").write_text(f"ENV_PYTHON={python}\n")
    return tmp_path / "noted"


def test_unit_leaves_out_what_is_slow_and_passes_arguments_on(alone, noted, tmp_path):
    done = bash(str(alone), "unit", "-k", "a b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    checks = noted.read_text().splitlines()
    assert [line.split()[:3] for line in checks] == [
        ["older=no", "-m", name] for name in ("ruff", "ruff", "mypy", "pytest")
    ]
    words = checks[-1].split()
    assert words[-3:] == ["-k", "a", "b"]
    paths = [word for word in words if word.startswith("tests/") and not word.endswith(".ini")]
    assert paths[:-1] == [
        f"tests/{name}" for name in "codecs comm calibration evaluation benchmark".split()
    ]
    assert all((ROOT / path).is_dir() for path in paths[:-1])


@pytest.mark.parametrize("words", [[], ["-x"], ["tests/run.sh::test_x[a b]", "-x"]])
def test_without_unit_all_is_run_and_installed(alone, noted, tmp_path, words):
    done = bash(str(alone), *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *lint, tests = noted.read_text().splitlines()
    assert len(lint) == 3
    assert tests.startswith("older=yes -m pytest ")
    assert tests.endswith(" ".join(["--no-loadscope-reorder", *words]))


def test_a_failing_check_is_in_the_summary_and_the_status(alone, noted, tmp_path):
    fail = '#!/bin/sh\ntest "$2" != mypy\n'
    (tmp_path / "python").write_text(fail)
    done = bash(str(alone), "unit", cwd=tmp_path)
    assert done.returncode == 1
    assert "mypy: FAILED, exit status 1" in done.stdout
    assert "pytest: ok" in done.stdout
    assert done.stdout.endswith("1 of 4 checks failed\n")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout with a .venv whose Python notes what pip is to install."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(
        f'#!/bin/sh\nif [ "$2" = pip ]; then echo "$*" >>{tmp_path}/pip.log\n'
        f'else exec {sys.executable} "$@"; fi\n'
    )
    python.chmod(0o755)
    (tmp_path / ".venv" / "bin" / "pip").write_text(f"#!{python}\n")
    return tmp_path


def installed(checkout: Path, **environment: str) -> list[str]:
    """The last words of the pip calls of one more run."""
    log = checkout / "pip.log"
    log.write_text("")
    command = "source tools/setup_env.sh && echo $ENV_PYTHON"
    done = bash("-c", command, cwd=checkout, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{checkout}/.venv/bin/python\n")
    return [line.split()[-1] for line in log.read_text().splitlines()]


def test_the_older_releases_are_added_when_they_are_first_wanted(checkout):
    first = installed(checkout, LOWBIT_OLDER_MEGATRONS="no")
    assert any(word.startswith("torch==") or word.startswith("setuptools==") for word in first)
    older = [f"megatron-core=={release}" for release in OLDER]
    assert not set(first) & set(older)
    assert installed(checkout, LOWBIT_OLDER_MEGATRONS="no") == []
    assert installed(checkout) == older
    assert installed(checkout) == []
    assert installed(checkout, LOWBIT_OLDER_MEGATRONS="no") == []


def test_lm_eval_is_added_when_it_is_first_wanted(checkout):
    assert not any("lm_eval" in word for word in installed(checkout))
    pins = str(checkout / "tools" / "lm_eval_requirements.txt")
    assert installed(checkout, LOWBIT_LM_EVAL="yes") == [pins]
    assert installed(checkout, LOWBIT_LM_EVAL="yes") == []
    assert installed(checkout) == []


def test_a_new_pin_installs_again(checkout):
    installed(checkout)
    with (checkout / "tools" / "requirements.txt").open("a") as pins:
        pins.write("# another\n")
    assert len(installed(checkout)) >= 4


def test_an_interrupted_installation_is_repeated(checkout):
    python = checkout / ".venv" / "bin" / "python"
    whole = python.read_text()
    python.write_text(whole.replace("then echo", "then exit 1; echo"))
    done = bash("-c", "source tools/setup_env.sh", cwd=checkout)
    assert done.returncode == 1
    assert "setup: pip could not install torch" in done.stderr
    python.write_text(whole)
    assert f"megatron-core=={OLDER[0]}" in installed(checkout)
