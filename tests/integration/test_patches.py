"""The patch files of patches/, tools/patchctl.py, and low bits in a patched Megatron.

What only looks at files does so for every release that is installed, and for a checkout that
MEGATRON_LM names. A patched Megatron runs on the newest release and on 0.16.1, or with
LOWBIT_PATCHED=all on every one.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from forks import forked
from releases import NEWEST, OLDER, RELEASES, ROOT, folder_of

from megatron_lowbit import files
from megatron_lowbit.integration.patching.diffs import Diff
from megatron_lowbit.integration.patching.edits import EDITS
from megatron_lowbit.integration.patching.make import make

PATCHES, TOOL = ROOT / "patches", ROOT / "tools" / "patchctl.py"
WORKER = Path(__file__).with_name("patch_worker.py")
LAYERS, ARGUMENTS, LOADING = (edit.path for edit in EDITS)
VERSION = "megatron/core/package_info.py"
MODES = ("one-shot", "two-shot")
EVERY = os.environ.get("LOWBIT_PATCHED") == "all"
RUN_ON = [r for r in RELEASES if r != NEWEST] if EVERY else ["0.16.1"]


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
    """Run the tool: its output, or where it must fail its one line, which holds `fails`."""
    command = [sys.executable, TOOL, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if fails is None:
        assert done.returncode == 0, done.stderr
        return done.stdout
    assert done.returncode == 1, done.stdout
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("patchctl.py: error: ")
    assert fails in done.stderr
    return done.stderr


def git(tree: Path, *arguments, autocrlf="false") -> None:
    """Run git in a tree, as somebody."""
    name = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", f"core.autocrlf={autocrlf}"]
    subprocess.run(["git", "-C", tree, *name, *arguments], check=True, capture_output=True)


def calls(path: Path, name: str) -> list[str]:
    """Dotted names of the functions in which a file calls `name`, by its syntax tree."""
    found = []

    def visit(node: ast.AST, within: tuple[str, ...]) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            within = (*within, node.name)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
            found.append(".".join(within))
        for child in ast.iter_child_nodes(node):
            visit(child, within)

    visit(ast.parse(path.read_text()), ())
    return found


@pytest.fixture
def tree(tmp_path) -> Path:
    """The newest release's files."""
    return copy_of(NEWEST, tmp_path / "tree")


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_is_patched_in_the_right_functions_and_back(release, tmp_path):
    tree = copy_of(release, tmp_path)
    before = contents(tree)
    names = [edit.name for edit in EDITS if (tree / edit.path).exists()]
    assert patchctl("check", tree).count("not applied") == len(names)
    assert patchctl("apply", tree) == f"applied: {', '.join(names)}\n"
    assert calls(tree / LAYERS, "lowbit_reduce") == ["RowParallelLinear.forward"]
    if len(names) > 1:
        assert calls(tree / ARGUMENTS, "hooks.add_arguments") == ["add_megatron_arguments"]
        assert calls(tree / LOADING, "hooks.checkpoint_loaded") == ["load_checkpoint"] * 2
    after = contents(tree)
    assert sorted(p for p in after if after[p] != before[p]) == sorted(
        edit.path for edit in EDITS if edit.name in names
    )
    assert patchctl("apply", tree) == "applied: nothing, all are in\n"
    assert contents(tree) == after
    status = patchctl("status", tree)
    assert "the files of" in status
    assert status.count(" applied ") == len(names)
    assert status.count("no such file") == len(EDITS) - len(names)
    assert patchctl("revert", tree) == f"reverted: {', '.join(names)}\n"
    assert contents(tree) == before
    assert patchctl("revert", tree) == "reverted: nothing, none is in\n"
    assert contents(tree) == before


@pytest.mark.parametrize("release", RELEASES)
def test_git_makes_the_same_of_the_patch_files(release, tmp_path):
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    ours, gits = copy_of(release, tmp_path / "ours"), copy_of(release, tmp_path / "gits")
    before = contents(gits)
    patchctl("apply", ours)
    patches = [PATCHES / f"{edit.name}.patch" for edit in EDITS if (gits / edit.path).exists()]
    git(gits, "apply", *patches)
    assert contents(gits) == contents(ours)
    git(gits, "apply", "--reverse", *patches)
    assert contents(gits) == before


def test_patch_files_and_manifest_are_what_make_makes(tmp_path):
    """They are never edited by hand, and the description of the edits is theirs."""
    committed = json.loads((PATCHES / "manifest.json").read_text())
    installed = [r for r in OLDER if (Path(sys.prefix) / f"megatron-core-{r}").is_dir()]
    for release in (NEWEST, *installed):
        make(folder(release), tmp_path, release=release, upstream=None)
    made = json.loads((tmp_path / "manifest.json").read_text())
    assert [patch["file"] for patch in made["patches"]] == [f"{e.name}.patch" for e in EDITS]
    for ours, theirs in zip(committed["patches"], made["patches"], strict=True):
        assert ours["files"].items() >= theirs["files"].items()
        derived = {"files", "applies_to", "sha256"}
        assert {k: v for k, v in ours.items() if k not in derived} == {
            k: v for k, v in theirs.items() if k not in derived
        }
        texts = [(d / ours["file"]).read_text() for d in (PATCHES, tmp_path)]
        assert len({text[text.index("diff --git") :] for text in texts}) == 1
        for part in (ours["purpose"], ours["removal"], f"Applies to: {ours['applies_to']}"):
            assert part in texts[0]


def test_one_purpose_a_file_and_two_hunks_at_most():
    for edit in EDITS:
        text = (PATCHES / f"{edit.name}.patch").read_text()
        assert text.count("diff --git") == 1
        assert 1 <= text.count("\n@@ ") <= 2


def test_the_manifest_lists_the_releases_that_are_supported():
    listed = json.loads((PATCHES / "manifest.json").read_text())
    for patch in listed["patches"]:
        assert {*OLDER, NEWEST} <= set(patch["files"]) <= set(listed["releases"])
        assert any(release.startswith("main-") for release in patch["files"])


def test_own_changes_are_refused_unless_told(tree):
    edited = tree / ARGUMENTS
    edited.write_text(edited.read_text() + "# mine\n")
    before = contents(tree)
    for command in ("apply", "check"):
        patchctl(command, tree, fails=f"{ARGUMENTS} in {tree} has changes of yours")
    assert contents(tree) == before
    assert f"{ARGUMENTS} has changes of yours" in patchctl("status", tree)
    patchctl("apply", tree, "--dirty")
    assert calls(edited, "hooks.add_arguments") == ["add_megatron_arguments"]
    patchctl("revert", tree, fails="has changes of yours")
    patchctl("revert", tree, "--dirty")
    assert contents(tree) == before


def test_a_checkout_with_windows_line_ends_is_patched_and_keeps_them(tree, tmp_path):
    """core.autocrlf=true, in Megatron's checkout and in ours: the same patches, byte for byte."""
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "upstream")
    windows, patches = tmp_path / "windows", tmp_path / "patches"
    clone = ["clone", "-q", "-c", "core.autocrlf=true"]
    git(tmp_path, *clone, tree, windows, autocrlf="true")
    before = contents(windows)
    assert all(raw.count(b"\r\n") == raw.count(b"\n") > 0 for raw in before.values())
    patches.mkdir()
    for file in PATCHES.iterdir():
        (patches / file.name).write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    ours = ("--patches", patches)
    assert "the files of" in patchctl("check", windows, *ours)
    patchctl("apply", windows, *ours)
    patchctl("apply", tree)
    unix = {path: raw.replace(b"\n", b"\r\n") for path, raw in contents(tree).items()}
    assert contents(windows) == unix
    status = patchctl("status", windows)
    assert (status.count(" applied "), "changes of yours" in status) == (3, False)
    patchctl("revert", windows)
    assert contents(windows) == before
    (windows / LAYERS).write_bytes(before[LAYERS] + b"# mine\r\n")
    patchctl("apply", windows, fails=f"{LAYERS} in {windows} has changes of yours")
    patchctl("apply", windows, "--dirty")
    patchctl("revert", windows, "--dirty")
    assert contents(windows)[LAYERS] == before[LAYERS] + b"# mine\r\n"


def test_mixed_line_ends_are_said(tree):
    lines = (tree / LAYERS).read_bytes().split(b"\n")
    (tree / LAYERS).write_bytes(b"\n".join(line + b"\r" * (n % 2) for n, line in enumerate(lines)))
    patchctl(
        "apply", tree, "--dirty", fails="some of its lines end as on Windows and others do not"
    )


def test_a_fork_is_unlisted_once_it_is_committed(tree):
    """Its own changes are dirty before that, and the patches never are."""
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "upstream")
    patchctl("apply", tree)
    assert "changes of yours" not in patchctl("status", tree)
    (tree / LAYERS).write_text((tree / LAYERS).read_text() + "# the fork's\n")
    patchctl("revert", tree, fails=f"{LAYERS} in {tree} has changes of yours")
    git(tree, "commit", "-qam", "a fork with patches")
    before = contents(tree)
    patchctl("apply", tree, fails="is not a release that patches/manifest.json lists")
    assert patchctl("apply", tree, "--unlisted") == "applied: nothing, all are in\n"
    assert patchctl("revert", tree, "--unlisted").startswith("reverted: row_parallel_hook, arg")
    assert patchctl("apply", tree, "--unlisted").startswith("applied: row_parallel_hook, arg")
    assert contents(tree) == before


def as_release(tree: Path, version: str, path: str, old: str, new: str) -> None:
    """Turn a tree into a release that nobody has seen, by one change in one file."""
    numbers = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    (tree / VERSION).write_text("".join(f"{name} = {number}\n" for name, number in numbers))
    text = (tree / path).read_text()
    assert text.count(old) == 1, text.count(old)
    (tree / path).write_text(text.replace(old, new))


def test_an_unlisted_release_is_refused_unless_told_and_can_be_listed(tree, tmp_path):
    as_release(tree, "9.9.9", LAYERS, "class RowParallelLinear(", "\n\nclass RowParallelLinear(")
    before = contents(tree)
    patchctl("apply", tree, fails=f"{tree} (megatron-core 9.9.9) is not a release that")
    assert "megatron-core 9.9.9, not a listed release" in patchctl("status", tree)
    patchctl("apply", tree, "--unlisted")
    assert calls(tree / LAYERS, "lowbit_reduce") == ["RowParallelLinear.forward"]
    patchctl("make", tree, "--patches", tmp_path / "new", fails="is patched already")
    patchctl("revert", tree, "--unlisted")
    assert contents(tree) == before
    patches = tmp_path / "patches"
    shutil.copytree(PATCHES, patches)
    served = patchctl("make", tree, "--patches", patches)
    assert f"{tree} is served by row_parallel_hook.patch, arguments.patch, load_hook" in served
    patchctl("apply", tree, "--patches", patches)
    listed = json.loads((patches / "manifest.json").read_text())
    assert listed["releases"]["9.9.9"] == {"version": "9.9.9", "upstream": "megatron-core==9.9.9"}
    assert all(patch["applies_to"] == "0.13.1 to 9.9.9" for patch in listed["patches"])


def test_a_release_with_other_lines_around_gets_a_patch_file_of_its_own(tree, tmp_path):
    line = "    parser = _add_validation_args(parser)\n"
    as_release(tree, "9.9.9", ARGUMENTS, line, f"    parser = _add_more(parser)\n{line}")
    before = contents(tree)
    patchctl("apply", tree, "--unlisted", fails="arguments.patch does not fit")
    assert contents(tree) == before, "all or nothing"
    patches = tmp_path / "patches"
    shutil.copytree(PATCHES, patches)
    assert "arguments-9.9.9.patch" in patchctl("make", tree, "--patches", patches)
    patchctl("apply", tree, "--patches", patches)
    assert calls(tree / ARGUMENTS, "hooks.add_arguments") == ["add_megatron_arguments"]
    assert "the files of 9.9.9" in patchctl("status", tree, "--patches", patches)
    patchctl("revert", tree, "--patches", patches)
    assert contents(tree) == before
    other = copy_of(NEWEST, tmp_path / "other")
    patchctl("apply", other, "--patches", patches)
    patchctl("make", tree, "--patches", patches)
    as_release(tree, "9.9.9", ARGUMENTS, "    parser = _add_more(parser)\n", "")
    assert "-9.9.9" not in patchctl("make", tree, "--patches", patches), "made anew"
    assert not (patches / "arguments-9.9.9.patch").exists()


@pytest.mark.parametrize(
    ("path", "old", "new", "message"),
    [
        (
            LAYERS,
            "if self.explicit_expert_comm:\n            assert self.skip_bias_add",
            "if 1:",
            0,
        ),
        (LAYERS, '"""Forward of RowParallelLinear', '"""', None),
        (LOADING, "    # Some utilities want to load", "    # Some want to load", 0),
        (ARGUMENTS, "def add_megatron_arguments(", "def add_arguments(", "has 0 add_megatron_"),
        (LAYERS, "class RowParallelLinear(", "class Row(", "has 0 RowParallelLinear.forward, not"),
        (ARGUMENTS, "def add_megatron_arguments(", "def add_megatron_arguments((", "not compile"),
    ],
)
def test_a_tree_that_a_patch_does_not_belong_in(tree, path, old, new, message):
    """Refused with the file's name, and nothing is changed; other changes do no harm."""
    as_release(tree, "9.9.9", path, old, new)
    before = contents(tree)
    if message is None:
        assert patchctl("apply", tree, "--unlisted").count(",") == 2
        return
    patchctl("apply", tree, "--unlisted", fails=message or f"does not fit {tree / path}")
    assert contents(tree) == before


def test_a_hunk_that_would_land_in_another_function_is_refused(tree):
    text = (tree / LAYERS).read_text()
    start = text.rindex("        # Matrix multiply.")
    moved = text[:start] + "\n    def elsewhere(self, output_parallel):\n" + text[start:]
    (tree / LAYERS).write_text(moved)
    (tree / VERSION).write_text("MAJOR = 9\nMINOR = 9\nPATCH = 9\n")
    patchctl("apply", tree, "--unlisted", fails="outside RowParallelLinear.forward (lines")
    assert (tree / LAYERS).read_text() == moved


def test_lines_that_stand_twice_are_not_guessed_at():
    (edit,) = [edit for edit in EDITS if edit.path == ARGUMENTS]
    diff = Diff((PATCHES / f"{edit.name}.patch").read_text())
    text = (folder(NEWEST) / ARGUMENTS).read_text()
    with pytest.raises(ValueError, match="stand 2 times in it"):
        diff.apply(text + text)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda d: (d / "manifest.json").write_text("[]"), "not a manifest of patches"),
        (lambda d: (d / "manifest.json").write_text("{"), "manifest.json is not valid JSON (Exp"),
        (
            lambda d: (d / "manifest.json").write_text('{"format": 1, "format": 1}'),
            "an object has the key 'format' twice): restore it, or run",
        ),
        (lambda d: (d / "manifest.json").write_text('{"format": 2}'), "format 2, this is for"),
        (lambda d: (d / "load_hook.patch").unlink(), "load_hook.patch is missing"),
        (lambda d: (d / "load_hook.patch").write_text("--- a\n"), "was changed by hand"),
    ],
)
def test_broken_patches_are_refused(tree, tmp_path, break_it, message):
    patches = tmp_path / "patches"
    shutil.copytree(PATCHES, patches)
    break_it(patches)
    patchctl("apply", tree, "--patches", patches, fails=message)


def test_what_is_no_megatron_is_refused(tmp_path):
    for command in ("status", "make"):
        patchctl(command, tmp_path, fails="holds no megatron/core/package_info.py")


def test_make_says_which_anchor_is_gone(tree, tmp_path):
    as_release(tree, "9.9.9", LOADING, "        return 0, 0\n", "        return 0, None\n")
    message = "load_checkpoint has 0 lines 'return 0, 0', not one: describe load_hook anew"
    patchctl("make", tree, "--patches", tmp_path / "new", fails=message)
    assert not (tmp_path / "new").exists()


def test_make_refuses_to_mix_descriptions(tree, tmp_path):
    patches = tmp_path / "patches"
    shutil.copytree(PATCHES, patches)
    listed = json.loads((patches / "manifest.json").read_text())
    listed["patches"][1]["files"][NEWEST]["after"] = "0"
    (patches / "manifest.json").write_text(json.dumps(listed))
    before = contents(patches)
    message = "arguments is described otherwise than when arguments.patch was made: make all"
    patchctl("make", tree, "--patches", patches, fails=message)
    assert contents(patches) == before


def test_files_are_replaced_together_or_not_at_all(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(b"old")
    paths[0].chmod(0o640)
    linked = tmp_path / "linked"
    linked.hardlink_to(paths[0])
    real = os.replace

    def failing(source, target):
        if Path(target) == paths[2] and Path(source).read_bytes() == b"new":
            raise OSError(28, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(files.os, "replace", failing)
        files.replace_together(dict.fromkeys(paths, b"new"))
    assert [path.read_bytes() for path in paths] == [b"old"] * 3
    files.replace_together(dict.fromkeys(paths, b"new"))
    assert [path.read_bytes() for path in paths] == [b"new"] * 3
    assert paths[0].stat().st_mode & 0o777 == 0o640
    assert linked.read_bytes() == b"old", "a package manager's cache"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "linked"]


def run_patched(release: str, ranks: int, out: Path, *arguments) -> list[dict]:
    """What each rank of patch_worker.py saw in a patched copy of a release."""
    tree = out / "tree"
    shutil.copytree(folder(release) / "megatron", tree / "megatron")
    patchctl("apply", tree)
    path = os.pathsep.join([str(tree), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = forked(ranks, WORKER, out, *arguments, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]
    assert all(Path(result["file"]).is_relative_to(tree) for result in results)
    return results


@pytest.fixture(scope="module")
def newest(calibrated, tmp_path_factory):
    """The newest release, patched, at TP 3, with a checkpoint for megatron.training."""
    return run_patched(NEWEST, 3, tmp_path_factory.mktemp("newest"), calibrated)


@pytest.fixture(scope="module", params=[NEWEST, *RUN_ON])
def patched(request, tmp_path_factory):
    """Each release, patched: what its ranks saw."""
    if request.param == NEWEST:
        return request.getfixturevalue("newest")
    return run_patched(request.param, 2, tmp_path_factory.mktemp("patched"))


@pytest.mark.parametrize("kind", ["plain", "sequence_parallel"])
def test_low_bits_are_the_same_bits_with_the_patch_and_without(patched, kind):
    for rank in patched:
        result = rank[kind]
        for mode in MODES:
            assert torch.equal(result["patched", mode], result["unpatched", mode])
            assert torch.equal(result["patched", mode], patched[0][kind]["patched", mode])
            assert not torch.equal(result["patched", mode], result["native"])
            assert result["patched", mode, "calls"] == result["unpatched", mode, "calls"]
            assert min(result["patched", mode, "calls"]) > 0
        assert result["restored"]
        assert result["left"] == []


def test_gradients_are_the_same_bits(patched):
    for rank in patched:
        for mode in MODES:
            patched_one, plain = (
                rank["plain"][name, mode, "gradient"] for name in ("patched", "unpatched")
            )
            assert plain.abs().max() > 0
            assert torch.equal(patched_one, plain)


def test_a_patched_linear_is_neither_muted_nor_hooked(patched):
    for rank in patched:
        for mode in MODES:
            assert rank["refusals"]["route"] == "PatchedRoute"
            assert set(rank["plain"]["patched", mode, "muted"]) == {False}
            assert set(rank["plain"]["patched", mode, "hooks"]) == {0}
            assert set(rank["plain"]["unpatched", mode, "muted"]) == {True}
            assert rank["plain"]["patched", mode, "state"] == rank["plain"]["state"]


def test_a_linear_that_adds_its_bias_itself_is_a_sync_point(patched):
    """With the same bits as where the layer adds it after the linear."""
    for rank in patched:
        assert torch.equal(rank["own_bias"]["inside"], rank["own_bias"]["beside"])
        assert "adds its bias itself" in rank["own_bias"]["unpatched"]


def test_what_the_patched_route_leaves_alone(patched):
    for rank in patched:
        result = rank["refusals"]
        assert result["own"] == "LocalRoute", "a forward that does not read the hook"
        assert "is already attached" in result["twice"]
        assert result["muted"] == {
            "layer 1 self_attention.linear_proj": "already muted by Megatron, which sums it "
            "elsewhere"
        }


def test_megatron_loads_a_checkpoint_in_low_bits(newest):
    """By its own arguments and its own load_checkpoint, with the bits of `apply`."""
    for rank in newest:
        result = rank["training"]
        (text,) = result["handles"]
        assert "4 sync points use shaped-hybrid" in text
        assert torch.equal(result["hooked"], result["unpatched"])
        assert not torch.equal(result["hooked"], result["native"])
        assert result["without the flag"]


def test_a_patch_under_the_launcher_sums_once_and_says_so(newest):
    for number, rank in enumerate(newest):
        result = rank["training"]
        assert result["again"] is None
        assert torch.equal(result["hooked again"], result["hooked"])
        assert ("this Megatron is patched and the launcher runs it" in result["said"]) == (
            number == 0
        )


def test_low_bits_without_a_checkpoint_are_refused(newest):
    for rank in newest:
        assert "was calibrated on other weights" in rank["training"]["not found"]
        assert rank["training"]["made"] == 1


def test_megatron_has_our_arguments_where_they_can_be_met(newest):
    expected = {"installed": True, "absent": False, "absent, but asked for": True}
    assert all(rank["groups"] == expected for rank in newest)
