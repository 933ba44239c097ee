"""The patch files of patches/, and what `python -m megatron_lowbit patch` does with them.

On every release that is installed, and on a checkout that MEGATRON_LM names.
"""

import ast
import contextlib
import io
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from releases import MAIN, NEWEST, OLDER, RELEASES, ROOT, folder_of

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.patching import patch_command
from megatron_lowbit.integration.patching.edits import EDITS

PATCHES = ROOT / "patches"
LAYERS, ARGUMENTS, LOADING = (edit.path for edit in EDITS)
VERSION = "megatron/core/package_info.py"
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")


def folder(release: str) -> Path:
    """Where a release's package lies, or a skipped test."""
    return Path(sysconfig.get_path("purelib")) if release == NEWEST else folder_of(release)


def copy_of(release: str, target: Path) -> Path:
    """The files of a release that the patches and the tool look at."""
    for path in (VERSION, LAYERS, ARGUMENTS, LOADING):
        if (folder(release) / path).exists():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder(release) / path, target / path)
    return target


def contents(tree: Path) -> dict[str, bytes]:
    """Every file of a tree, git's own left out."""
    names = [p.relative_to(tree) for p in tree.rglob("*") if p.is_file()]
    return {str(p): (tree / p).read_bytes() for p in names if p.parts[0] != ".git"}


def patchctl(*arguments, fails: str | None = None) -> str:
    """What the command prints, or where it must fail its one line, which holds `fails`."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        if fails is None:
            patch_command.main([str(argument) for argument in arguments])
            return said.getvalue()
        with pytest.raises(LowbitError) as error:
            patch_command.main([str(argument) for argument in arguments])
    assert fails in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def git(tree: Path, *arguments) -> None:
    """Run git in a tree, as somebody."""
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", tree, *name, *arguments], check=True, capture_output=True)


def assert_patched(tree: Path) -> None:
    """Each file compiles, and the calls lie in the functions that they belong in."""
    assert places(tree / LAYERS, "lowbit_reduce(") == ["RowParallelLinear", "forward"]
    if (tree / ARGUMENTS).exists():
        assert places(tree / ARGUMENTS, "hooks.add_arguments(") == ["add_megatron_arguments"]
        assert places(tree / LOADING, "hooks.checkpoint_loaded(") == ["load_checkpoint"] * 2


def places(path: Path, call: str) -> list[str]:
    """The classes and functions that hold a call, from outside in, each as often as it is there."""
    compile(path.read_bytes(), path, "exec")
    nodes = [
        node
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    ]
    return [node.name for node in nodes for _ in range(ast.unparse(node).count(call))]


def windows(raw: bytes) -> bytes:
    return raw.replace(b"\n", b"\r\n")


def as_new_release(tree: Path, path: str, change) -> dict[str, bytes]:
    """Turn a tree into a release that nobody has seen, by a change in one file; its contents."""
    (tree / VERSION).write_text("MAJOR = 9\nMINOR = 9\nPATCH = 9\n")
    text = (tree / path).read_text()
    assert change(text) != text
    (tree / path).write_text(change(text))
    return contents(tree)


@pytest.fixture
def tree(tmp_path) -> Path:
    """The newest release's files."""
    return copy_of(NEWEST, tmp_path / "tree")


@pytest.fixture
def patches(tmp_path) -> Path:
    """The patch files, to be changed."""
    return shutil.copytree(PATCHES, tmp_path / "patches")


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_is_patched_in_the_right_functions_and_back(release, tmp_path):
    tree = copy_of(release, tmp_path)
    before = contents(tree)
    edits = [edit for edit in EDITS if (tree / edit.path).exists()]
    names = ", ".join(edit.name for edit in edits)
    assert patchctl("check", tree).count("not applied") == len(edits)
    assert patchctl("apply", tree) == f"applied: {names}\n"
    assert_patched(tree)
    after = contents(tree)
    changed = sorted(path for path in after if after[path] != before[path])
    assert changed == sorted(edit.path for edit in edits)
    assert patchctl("apply", tree) == "applied: nothing, all are in\n"
    assert contents(tree) == after
    status = patchctl("status", tree)
    assert f"the files of {'main-' if release == MAIN else release}" in status
    assert status.count(" applied ") == len(edits)
    assert status.count("no such file") == len(EDITS) - len(edits)
    assert patchctl("revert", tree) == f"reverted: {names}\n"
    assert contents(tree) == before
    assert patchctl("revert", tree) == "reverted: nothing, none is in\n"
    assert contents(tree) == before


@needs_git
@pytest.mark.parametrize("release", RELEASES)
def test_git_makes_the_same_of_the_patch_files(release, tmp_path):
    tree = copy_of(release, tmp_path)
    before = contents(tree)
    patchctl("apply", tree)
    after = contents(tree)
    patches = [PATCHES / f"{edit.name}.patch" for edit in EDITS if (tree / edit.path).exists()]
    git(tree, "apply", "--reverse", *patches)
    assert contents(tree) == before
    git(tree, "apply", *patches)
    assert contents(tree) == after


def test_patch_files_and_manifest_are_what_make_makes(tmp_path):
    """They are never edited by hand; `make` is given where each release comes from."""
    listed = json.loads((PATCHES / "manifest.json").read_text())
    installed = [r for r in OLDER if (Path(sys.prefix) / f"megatron-core-{r}").is_dir()]
    for name in (NEWEST, *installed):
        upstream = listed["releases"][name]["upstream"]
        named = ("--release", name, "--upstream", upstream, "--patches", tmp_path)
        patchctl("make", folder(name), *named)
    made = json.loads((tmp_path / "manifest.json").read_text())
    assert made["releases"].items() <= listed["releases"].items()
    for edit, ours, theirs in zip(EDITS, listed["patches"], made["patches"], strict=True):
        assert {*OLDER, NEWEST} <= ours["files"].keys() <= listed["releases"].keys()
        assert any(name.startswith("main-") for name in ours["files"])
        assert ours["files"].items() >= theirs["files"].items()
        for derived in ("files", "applies_to", "sha256"):
            del theirs[derived]
        assert ours.items() >= theirs.items()
        text, remade = ((d / f"{edit.name}.patch").read_text() for d in (PATCHES, tmp_path))
        assert text[text.index("diff --git") :] == remade[remade.index("diff --git") :]
        assert f"Applies to: {ours['applies_to']}" in text
        assert edit.purpose in text and edit.removal in text
        assert text.count("diff --git") == 1, "one purpose"
        assert 1 <= text.count("\n@@ ") <= 2


@pytest.mark.parametrize("has_git", [False, pytest.param(True, marks=needs_git)])
def test_own_changes_are_refused_unless_told_and_kept(tree, monkeypatch, has_git):
    """Without git, and in a folder that the checkout around it does not know, such as a .venv."""
    if has_git:
        git(tree.parent, "init", "-q")
    else:
        monkeypatch.setenv("PATH", "")
    edited = tree / ARGUMENTS
    edited.write_text(edited.read_text() + "# mine\n")
    before = contents(tree)
    for command in ("apply", "check", "revert"):
        patchctl(command, tree, fails=f"{ARGUMENTS} in {tree} has changes of yours")
    assert f"{ARGUMENTS} has changes of yours" in patchctl("status", tree)
    assert contents(tree) == before
    patchctl("apply", tree, "--dirty")
    assert_patched(tree)
    patchctl("revert", tree, fails="has changes of yours")
    patchctl("revert", tree, "--dirty")
    assert contents(tree) == before


@needs_git
@pytest.mark.parametrize("autocrlf", ["false", "true"])
def test_a_fork_is_unlisted_once_it_is_committed(tree, autocrlf):
    """Its own changes are dirty before that, and the patches never are."""
    git(tree, "init", "-q")
    git(tree, "config", "core.autocrlf", autocrlf)
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "upstream")
    for path in contents(tree):
        (tree / path).unlink()
    git(tree, "checkout", ".")
    before = contents(tree)
    end = b"\r\n" if autocrlf == "true" else b"\n"
    assert all(raw.count(end) == raw.count(b"\n") > 0 for raw in before.values())
    patchctl("apply", tree)
    assert "changes of yours" not in patchctl("status", tree)
    mine = b"# the fork's" + end
    (tree / LAYERS).write_bytes((tree / LAYERS).read_bytes() + mine)
    patchctl("revert", tree, fails=f"{LAYERS} in {tree} has changes of yours")
    git(tree, "commit", "-qam", "a fork with patches")
    patched = contents(tree)
    patchctl("apply", tree, fails="is not a release that patches/manifest.json lists")
    assert patchctl("apply", tree, "--unlisted") == "applied: nothing, all are in\n"
    assert patchctl("revert", tree, "--unlisted").startswith("reverted: row_parallel_hook, arg")
    fork = {**before, LAYERS: before[LAYERS] + mine}
    assert contents(tree) == fork
    git(tree, "commit", "-qam", "a fork without patches")
    assert patchctl("apply", tree, "--unlisted").startswith("applied: row_parallel_hook, arg")
    assert "changes of yours" not in patchctl("status", tree)
    assert contents(tree) == patched
    patchctl("revert", tree, "--unlisted")
    assert contents(tree) == fork


def test_windows_line_ends_are_kept_and_mixed_ones_said(tree, patches):
    """core.autocrlf=true, in Megatron's checkout and in ours: the same patches, byte for byte."""
    unix = contents(tree)
    patchctl("apply", tree)
    expected = {path: windows(raw) for path, raw in contents(tree).items()}
    for path, raw in unix.items():
        (tree / path).write_bytes(windows(raw))
    for path in patches.iterdir():
        path.write_bytes(windows(path.read_bytes()))
    patchctl("apply", tree, "--patches", patches)
    assert contents(tree) == expected
    assert "the files of" in patchctl("status", tree)
    patchctl("revert", tree)
    assert contents(tree) == {path: windows(raw) for path, raw in unix.items()}
    lines = unix[LAYERS].split(b"\n")
    mixed = b"\n".join(line + b"\r" * (number % 2) for number, line in enumerate(lines))
    (tree / LAYERS).write_bytes(mixed)
    message = "some of its lines end as on Windows and others do not"
    patchctl("apply", tree, "--dirty", fails=message)


def test_an_unlisted_release_is_refused_unless_told_and_can_be_listed(tree, patches):
    docstring = '"""Forward of RowParallelLinear'
    before = as_new_release(tree, LAYERS, lambda text: text.replace(docstring, '"""Other\n\n'))
    patchctl("apply", tree, fails=f"{tree} (megatron-core 9.9.9) is not a release that")
    assert "megatron-core 9.9.9, not a listed release" in patchctl("status", tree)
    patchctl("apply", tree, "--unlisted")
    assert_patched(tree)
    patchctl("make", tree, "--patches", tree / "new", fails="is patched already")
    patchctl("revert", tree, "--unlisted")
    assert contents(tree) == before
    served = patchctl("make", tree, "--patches", patches)
    assert f"{tree} is served by row_parallel_hook.patch, arguments.patch, load_hook" in served
    patchctl("apply", tree, "--patches", patches)
    listed = json.loads((patches / "manifest.json").read_text())
    assert listed["releases"]["9.9.9"] == {"version": "9.9.9", "upstream": "megatron-core==9.9.9"}
    assert all(patch["applies_to"] == "0.13.1 to 9.9.9" for patch in listed["patches"])


LINE, MORE = "    parser = _add_validation_args(parser)\n", "    parser = _add_more(parser)\n"


def test_a_release_with_other_lines_around_gets_a_patch_file_of_its_own(tree, patches):
    before = as_new_release(tree, ARGUMENTS, lambda text: text.replace(LINE, MORE + LINE))
    patchctl("apply", tree, "--unlisted", fails="arguments.patch does not fit")
    assert contents(tree) == before, "all or nothing"
    assert "arguments-9.9.9.patch" in patchctl("make", tree, "--patches", patches)
    patchctl("apply", tree, "--patches", patches)
    assert_patched(tree)
    assert "the files of 9.9.9" in patchctl("status", tree, "--patches", patches)
    patchctl("revert", tree, "--patches", patches)
    assert contents(tree) == before
    other = copy_of(NEWEST, tree / "other")
    patchctl("apply", other, "--patches", patches)
    assert_patched(other)
    as_new_release(tree, ARGUMENTS, lambda text: text.replace(MORE, ""))
    assert "-9.9.9" not in patchctl("make", tree, "--patches", patches), "made anew"
    assert not (patches / "arguments-9.9.9.patch").exists()


def test_make_takes_no_patch_file_that_would_change_another_function(tree, patches):
    def change(text: str) -> str:
        lines = text[text.index("    parser = _add_checkpointing_args(") :].splitlines(True)[:6]
        return "".join([text.replace(LINE, MORE + LINE), "\n\ndef other(parser):\n", *lines])

    as_new_release(tree, ARGUMENTS, change)
    patchctl("apply", tree, "--unlisted", fails="outside add_megatron_arguments")
    assert "arguments-9.9.9.patch" in patchctl("make", tree, "--patches", patches)


FORWARD = "if self.explicit_expert_comm:\n            assert self.skip_bias_add"
MATRIX = "        # Matrix multiply."
WITHIN = "\n    def elsewhere(self, output_parallel):\n"
MISFITS = {
    "a hunk's line changed": (LAYERS, FORWARD, "if 1:", f"does not fit {{}}/{LAYERS}"),
    "a line of context changed": (LOADING, "# Some utilities", "# Some", f"fit {{}}/{LOADING}"),
    "lines that stand twice": (ARGUMENTS, None, None, f"does not fit {{}}/{ARGUMENTS}"),
    "the function renamed": (ARGUMENTS, "def add_megatron_", "def add_", "has 0 add_megatron_arg"),
    "the class renamed": (LAYERS, "class RowPar", "class Par", "has 0 RowParallelLinear.forward"),
    "another function": (LAYERS, MATRIX, WITHIN + MATRIX, "outside RowParallelLinear.forward"),
    "no Python": (ARGUMENTS, "megatron_arguments(", "megatron_arguments((", "does not compile"),
}


@pytest.mark.parametrize(("path", "old", "new", "message"), MISFITS.values(), ids=MISFITS)
def test_a_tree_that_a_patch_does_not_belong_in(tree, path, old, new, message):
    """Refused, and nothing is changed."""

    def change(text: str) -> str:
        return text + text if old is None else new.join(text.rsplit(old, 1))

    before = as_new_release(tree, path, change)
    patchctl("apply", tree, "--unlisted", fails=message.format(tree))
    assert contents(tree) == before


BY_HAND = (PATCHES / "load_hook.patch").read_text().replace("it says why not", "as it says")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("manifest.json", None, "holds no manifest.json"),
        ("manifest.json", "[]", "manifest.json: Input should be a valid dictionary"),
        ("manifest.json", "{", "manifest.json is not valid JSON (Exp"),
        ("manifest.json", '{"format": 1, "format": 1}', "'format' twice): restore it, or run"),
        ("manifest.json", '{"format": 2}', "format: Input should be 1 (2); restore it, or run"),
        ("load_hook.patch", None, "load_hook.patch is missing"),
        ("load_hook.patch", BY_HAND, "was changed by hand"),
        ("load_hook.patch", "\xff", "was changed by hand"),
    ],
)
def test_broken_patches_are_refused(tree, patches, name, text, message):
    (patches / name).unlink()
    if text is not None:
        (patches / name).write_text(text, encoding="latin-1")
    patchctl("apply", tree, "--patches", patches, fails=message)


@pytest.mark.parametrize("command", ["status", "check", "apply", "revert", "make"])
def test_what_is_no_megatron_is_refused(tmp_path, command):
    patchctl(command, tmp_path, fails=f"{tmp_path} holds no {VERSION}: name a Megatron-LM")
    (tmp_path / VERSION).parent.mkdir(parents=True)
    (tmp_path / VERSION).write_text("MAJOR = 9\n")
    patchctl(command, tmp_path, fails=f"{VERSION} names no version: not a Megatron")
    (tmp_path / VERSION).write_text("MAJOR = 9\nMINOR = 9\nPATCH = 9\n")
    if command != "make":
        patchctl(command, tmp_path, fails="has none of the files that the patches change")


def test_make_says_which_anchor_is_gone(tree):
    as_new_release(tree, LOADING, lambda text: text.replace("return 0, 0", "return 0, None"))
    message = "load_checkpoint has 0 lines 'return 0, 0', not one: describe load_hook anew"
    patchctl("make", tree, "--patches", tree / "new", fails=message)
    assert not (tree / "new").exists()


def test_make_refuses_to_mix_descriptions(tree, patches):
    listed = json.loads((patches / "manifest.json").read_text())
    listed["patches"][1]["files"][NEWEST]["after"] = 64 * "0"
    (patches / "manifest.json").write_text(json.dumps(listed))
    before = contents(patches)
    message = "arguments is described otherwise than when arguments.patch was made: make all"
    patchctl("make", tree, "--patches", patches, fails=message)
    assert contents(patches) == before
