"""Commands of the installed package: `python -m megatron_lowbit COMMAND`, and tools/*.py."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_lowbit import commands
from megatron_lowbit.codecs import CALIBRATED_CODEC, CODECS

ROOT = Path(__file__).resolve().parents[1]
OF_A_CHECKOUT = {"support_matrix.py"}  # it runs the tests

HELP = """
import contextlib, io, sys
from importlib import import_module
from megatron_lowbit import commands
for command, module in commands.COMMANDS.items():
    sys.argv = [f"{commands.PROGRAM} {command}"]
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        import_module(f"megatron_lowbit.{module}").main([HELP_OPTION])
    print("|".join((command, text.getvalue().split("[", 1)[0])))
print([m for m in ("torch", "triton", "megatron", "numpy", "transformers") if m in sys.modules])
"""


def run(*arguments, cwd=None, path=ROOT) -> subprocess.CompletedProcess:
    """Runs Python without a word of the checkout but `path`."""
    env = {"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin", "HOME": str(cwd or path)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)


def test_all_are_listed_in_one_line_each():
    done = run("-m", "megatron_lowbit", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for command in commands.COMMANDS:
        assert re.search(rf"^  {command} +[A-Z].*[^.]$", done.stdout, re.MULTILINE), command
    nothing = run("-m", "megatron_lowbit")
    assert (nothing.returncode, nothing.stdout) == (2, done.stdout)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("calibrat", "unknown command 'calibrat': did you mean calibrate?"),
        ("convert_hf", "unknown command 'convert_hf': did you mean convert?"),
        ("bench", "unknown command 'bench': did you mean bench-all-reduce or bench-codecs or"),
        ("xyz", "unknown command 'xyz': choose one of convert, calibrate, evaluate,"),
    ],
)
def test_an_unknown_one_is_one_line_with_the_near_ones(command, message):
    done = run("-m", "megatron_lowbit", command, "--load", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"python -m megatron_lowbit: error: {message}")
    assert done.stderr.count("\n") == 1


def test_help_names_the_command_and_imports_nothing_heavy():
    done = run("-c", HELP.replace("HELP_OPTION", "'--help'"))
    *usages, heavy = done.stdout.splitlines()
    names = dict(line.split("|") for line in usages if "|" in line)
    assert names == {c: f"usage: python -m megatron_lowbit {c} " for c in commands.COMMANDS}
    assert heavy == "[]"


def test_no_command_takes_an_abbreviation():
    """`--hel` is then no option: nothing is said but that, on stderr."""
    done = run("-c", HELP.replace("HELP_OPTION", "'--hel'"))
    lines = dict(line.split("|") for line in done.stdout.splitlines() if "|" in line)
    assert lines == dict.fromkeys(commands.COMMANDS, "")


def test_errors_name_the_command():
    done = run("-m", "megatron_lowbit", "calibrate", "--load", "x", "--data", "y", "--skip", "1")
    expected = "python -m megatron_lowbit calibrate: error: --skip 1 is for a recipe: "
    assert (done.returncode, done.stderr.startswith(expected)) == (1, True), done.stderr
    typo = run("-m", "megatron_lowbit", "report", "--indx", "x")
    assert typo.returncode == 2
    assert typo.stderr.splitlines()[-1].startswith("python -m megatron_lowbit report: error: the")


def test_every_tool_is_a_command():
    tools = {path.name: path.read_text() for path in (ROOT / "tools").glob("*.py")}
    of = {
        name: re.findall(r'commands\.run\("(.+)"\)', text)
        for name, text in tools.items()
        if name not in OF_A_CHECKOUT
    }
    assert all(len(named) == 1 and named[0] in commands.COMMANDS for named in of.values()), of
    assert all(len(text.splitlines()) < 20 for name, text in tools.items() if name in of)


def test_a_tool_of_a_checkout_has_its_own_name():
    done = run(ROOT / "tools" / "report.py", "--help", cwd="/", path="")
    assert done.stdout.startswith("usage: report.py "), done.stderr


def test_help_of_calibrate_knows_the_codecs():
    """It does not import them: that would take seconds."""
    text = " ".join(run("-m", "megatron_lowbit", "calibrate", "--help").stdout.split())
    text = text.replace("- ", "-")  # a name may be broken at its hyphen
    names, default = re.search(
        r"index is for: (.*), a peer's .*? \(default: ([\w-]+)\)", text
    ).groups()
    assert default == CALIBRATED_CODEC
    assert names.split(", ") == list(CODECS)[:5]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the contents of a wheel."""
    pytest.importorskip("setuptools")
    source = tmp_path_factory.mktemp("source")
    for name in ("megatron_lowbit", "patches"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", source)
    done = run(*pip, source)
    assert done.returncode == 0, done.stderr
    (wheel,) = source.glob("*.whl")
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(target)
    return target


def test_a_wheel_has_what_commands_need(installed, tmp_path):
    from_wheel = {"cwd": tmp_path, "path": installed}
    assert run("-m", "megatron_lowbit", "--help", **from_wheel).stdout == commands.usage() + "\n"
    one = run("-m", "megatron_lowbit", "predict", "--link", "pcie-4", "--json", "p", **from_wheel)
    assert one.returncode == 0 and (tmp_path / "p").is_file(), one.stderr
    core = tmp_path / "tree" / "megatron" / "core"
    (core / "tensor_parallel").mkdir(parents=True)
    (core / "package_info.py").write_text("MAJOR = 9\nMINOR = 9\nPATCH = 9\n")
    (core / "tensor_parallel" / "layers.py").write_text("no linear of Megatron's\n")
    state = run("-m", "megatron_lowbit", "patch", "status", tmp_path / "tree", **from_wheel)
    assert state.returncode == 0, state.stderr
    assert re.search(r"^  row_parallel_hook +does not fit ", state.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["robustness", "--load", "x", "--output", "y"], "examples/data is not in the package"),
        (["bench-quality", "--load", ".", "--output", "y"], "examples/data is not in the package"),
        (["patch", "make", "x"], "make would change an installed package: give --patches DIR"),
    ],
    ids=["robustness", "bench-quality", "patch make"],
)
def test_what_needs_a_checkout_says_so(installed, tmp_path, arguments, message):
    done = run("-m", "megatron_lowbit", *arguments, cwd=tmp_path, path=installed)
    assert done.returncode == 1
    assert message in done.stderr and "checkout" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
