"""tools/gpu_check.sh without a GPU: what is kept when a stage fails, the page, the command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from json_places import put
from processes import is_alive, printed, wait_until

from megatron_lowbit.benchmark.gpu_check import (
    gpu_check_command,
    gpu_results,
    gpu_tables,
    stage_runner,
)
from megatron_lowbit.benchmark.gpu_check.gpu_results import FAILED, OUT_OF_TIME, PASSED, SKIPPED
from megatron_lowbit.benchmark.gpu_check.gpu_stages import STAGES, Stage
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import sources_digest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = ROOT / "megatron_lowbit" / "kernels" / "README.md"


def stage(function: str, weight: float = 1, processes: int = 1) -> Stage:
    return Stage(function, function, "fake_stages", weight, processes, function)


def checked(tmp_path, monkeypatch, *stages: Stage, seconds=60, machine="machine") -> dict:
    """The results of `stages`, as the file has them."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    content = gpu_results.new(stages, minutes=seconds / 60, is_rehearsal=False)
    setting = stage_runner.Setting(tmp_path, "cuda", tmp_path / "none")
    said = []
    stage_runner.run(
        content, stages, setting, seconds=seconds, say=said.append, machine=stage(machine)
    )
    assert len(said) == len(stages)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["gpu_check.json", "gpu_check.log"]
    return json.loads((tmp_path / "gpu_check.json").read_bytes())


def test_a_stage_that_fails_leaves_the_others_alive(tmp_path, monkeypatch):
    """One that raises, says what is wrong, dies, leaves: each with what it had found."""
    names = ("fine", "raises", "wrong", "dies", "killed", "leaves", "exits", "skips")
    found = checked(tmp_path, monkeypatch, *map(stage, names))
    assert found["machine"] == {"device": "a GPU", "driver": "1"}
    assert {name: (one["status"], one["reason"]) for name, one in found["stages"].items()} == {
        "fine": (PASSED, ""),
        "raises": (FAILED, "RuntimeError: CUDA error: an illegal memory access"),
        "wrong": (FAILED, "b: other bits (and 1 more)"),
        "dies": (FAILED, "process 0 ended by SIGSEGV: what it said last"),
        "killed": (FAILED, "process 0 ended by SIGKILL: it said nothing"),
        "leaves": (FAILED, "process 0 ended with status 3: it said nothing"),
        "exits": (FAILED, "SystemExit: 4"),
        "skips": (SKIPPED, "no file"),
    }
    for name, one in found["stages"].items():
        cases = [row["case"] for row in one["results"]]
        assert cases == {"fine": [*"abcd"], "wrong": [*"abc"]}.get(name, ["a"]), name
        assert one["seconds"] < one["limit_s"]
    log = (tmp_path / "gpu_check.log").read_text()
    assert "-- dies, process 0\nwhat it said last" in log and "Traceback" in log
    assert [text.split(" (")[0] for text in gpu_results.not_passed(found)] == [
        f"{name} failed" for name in ("raises", "wrong", "dies", "killed", "leaves", "exits")
    ]


@pytest.mark.slow
def test_a_stage_that_hangs_is_ended_and_the_time_left_is_for_the_next(tmp_path, monkeypatch):
    stages = (stage("hangs", 1), stage("fine", 9))
    found = checked(tmp_path, monkeypatch, *stages, seconds=30)["stages"]
    assert found["hangs"]["status"] == OUT_OF_TIME
    assert found["hangs"]["reason"] == "it did not end within 3 s"
    assert found["hangs"]["results"] == [{"case": "a"}]
    assert 2.5 < found["hangs"]["seconds"] < 15
    assert found["fine"]["status"] == PASSED and found["fine"]["limit_s"] > 10
    assert "it hangs" in (tmp_path / "gpu_check.log").read_text()


def test_processes_share_a_stage_and_one_that_dies_loses_its_own_part_only(tmp_path, monkeypatch):
    stages = (stage("fine", processes=3), stage("dies", processes=2))
    found = checked(tmp_path, monkeypatch, *stages)["stages"]
    parts = {row["case"]: row["part"] for row in found["fine"]["results"]}
    assert parts == {"a": 0, "b": 1, "c": 2, "d": 0}
    assert found["dies"]["reason"] == "process 1 ended by SIGSEGV: what it said last"
    assert [row["case"] for row in found["dies"]["results"]] == ["a", "b", "a"]


@pytest.mark.slow
def test_what_a_stage_started_ends_with_it(tmp_path, monkeypatch):
    found = checked(tmp_path, monkeypatch, stage("starts_another"), seconds=4)["stages"]
    [row] = found["starts_another"]["results"]
    wait_until(lambda: not is_alive(row["child"]))


@pytest.mark.parametrize(
    ("machine", "seconds", "reason"),
    [
        ("no_gpu", 60, "the machine does not serve: torch sees no GPU"),
        ("dies", 60, "the machine does not serve: process 0 ended by SIGSEGV: what it said last"),
        ("hangs", 4, "the machine does not serve: it did not end within 2 s"),
    ],
)
def test_a_machine_without_a_gpu_runs_no_stage(machine, seconds, reason, tmp_path, monkeypatch):
    stages = (stage("fine"), stage("wrong"))
    found = checked(tmp_path, monkeypatch, *stages, seconds=seconds, machine=machine)
    for one in found["stages"].values():
        assert (one["status"], one["reason"], one["results"]) == (SKIPPED, reason, [])
    assert gpu_results.not_passed(found) == [reason]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_check_that_is_stopped_has_left_its_results(number, tmp_path):
    """What was found up to then is in the file, and no stage goes on."""
    code = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
from megatron_lowbit.benchmark.gpu_check import gpu_results, stage_runner
from test_gpu_check import stage
stages = [stage("fine"), stage("hangs"), stage("wrong")]
content = gpu_results.new(stages, minutes=10, is_rehearsal=False)
setting = stage_runner.Setting(Path({str(tmp_path)!r}), "cuda", Path({str(tmp_path)!r}) / "none")
machine = stage("machine")
stage_runner.run(content, stages, setting, seconds=600, say=print, machine=machine)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(HERE)])}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    path = tmp_path / "gpu_check.json"
    hangs = wait_until(lambda: path.exists() and json.loads(path.read_bytes())["stages"]["hangs"])
    wait_until(lambda: json.loads(path.read_bytes())["stages"]["hangs"]["results"])
    assert stages_of(tmp_path)
    process.send_signal(number)
    process.wait()
    found = json.loads(path.read_bytes())["stages"]
    assert hangs and found["fine"]["status"] == PASSED and len(found["fine"]["results"]) == 4
    assert (found["hangs"]["status"], found["hangs"]["results"]) == (OUT_OF_TIME, [{"case": "a"}])
    assert found["hangs"]["reason"] == "the check was stopped in it"
    assert found["wrong"]["reason"] == "it was not begun"
    wait_until(lambda: not stages_of(tmp_path))


def stages_of(output: Path) -> list[str]:
    """The command lines of stages that hang."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"fake_stages" in words and str(output / "none").encode() in b" ".join(words):
            found.append(path.parent.name)
    return found


# -- results and the page


def speed_row(codec: str, operation: str, path: str, tokens: int, **figures) -> dict:
    return {
        **{"codec": codec, "operation": operation, "path": path, "tokens": tokens},
        **{"hidden": 8192, "median_ms": 0.004, "copy_share": 0.5, **figures},
    }


def sample_content() -> dict:
    """Results of a check in which all was measured but the norm."""
    content = gpu_results.new(STAGES, minutes=8, is_rehearsal=False)
    content |= {"date": "2026-11-28T12:00:00+00:00", "commit": "abc"}
    content["machine"] = {"device": "NVIDIA H200", "driver": "580", "torch": "2", "triton": "3"}
    for one in content["stages"].values():
        one |= {"status": PASSED, "reason": "", "results": [{"case": "a"}]}
    wanted = [*gpu_tables.SPEED.values(), *list(gpu_tables.COSTS.values())[:-1]]
    rows = [speed_row(w.codec, w.operation, w.path, tokens) for w in wanted for tokens in w.tokens]
    rows[0]["copy_share"] = 0.871
    content["stages"]["speed"] |= {"status": FAILED, "reason": "norm: other | bits"}
    content["stages"]["speed"]["results"] = [{"case": "a", "rows": rows}]
    best = {"operation": "encode", "rotation": "butterflies", "warps": 4, "median_ms": 0.0412}
    chunks = {"operation": "two-shot", "chunk_values": 4096, "median_ms": 1.5}
    content["stages"]["settings"]["results"] += [{"best": best}, {"best": chunks}]
    return content


def cells(page: str, head: str) -> dict[str, str]:
    """The last cell of each row of the table with this head, by the first."""
    rows = [line.strip("|").split("|") for line in page.partition(head)[2].split("\n")[2:]]
    end = next(n for n, row in enumerate(rows) if len(row) < 2)
    return {row[0].strip(): row[-1].strip() for row in rows[:end]}


def test_the_page_is_filled():
    before = PAGE.read_text()
    page = gpu_tables.filled(before, sample_content())
    speed, costs = (cells(page, h) for h in (gpu_tables.SPEED_HEAD, gpu_tables.COSTS_HEAD))
    assert [speed[label] for label in gpu_tables.SPEED] == [
        *("87%", "50%, missed", "50%", "50%, missed", "4.0, 4.0, 4.0 us")
    ]
    assert [costs[label] for label in gpu_tables.COSTS] == ["50%"] * 5 + ["failed"]
    for text in (
        "NVIDIA H200, driver 580, torch 2, triton 3, 2026-11-28, commit abc.",
        "checked, then timed | failed, 1 results: norm: other \\| bits |",
        "Best settings: encode by butterflies, 4 warps (0.0412 ms); two-shot in chunks of 4096",
    ):
        assert text in page
    cpu = "CPU, one thread, 512 x 4096 at 4 bits, against plain torch"
    assert speed[cpu] == cells(before, gpu_tables.SPEED_HEAD)[cpu]
    assert gpu_tables.filled(page, sample_content()) == page


def test_the_page_lists_the_stages():
    page = PAGE.read_text()
    assert all(f"| {one.name} | {one.about} | " in page for one in STAGES)


def test_what_was_not_measured_says_so():
    content = sample_content()
    content["stages"]["speed"] |= {"status": OUT_OF_TIME, "results": []}
    page = gpu_tables.filled(PAGE.read_text(), content)
    assert set(cells(page, gpu_tables.COSTS_HEAD).values()) == {"out of time"}


@pytest.mark.parametrize(
    ("commit", "sources", "text"),
    [
        ("unknown", sources_digest(), "by its sources."),
        ("unknown", "0" * 64, "sources 000000000000, which are not those here."),
        ("abc and changes", "", "commit abc and changes."),
    ],
)
def test_a_copy_without_git_is_known_by_its_sources(commit, sources, text):
    content = sample_content() | {"commit": commit, "sources": sources}
    assert text in gpu_tables.filled(PAGE.read_text(), content)


@pytest.mark.parametrize("lost", ["| `decode_sum_norm` | 10", gpu_tables.BEGIN, gpu_tables.END])
def test_a_page_without_its_places_is_refused(lost):
    page = PAGE.read_text().replace(lost, "")
    with pytest.raises(LowbitError, match="the page has no (row|part).*: put it back"):
        gpu_tables.filled(page, sample_content())


_SPEED, _ROW = "stages/speed", "stages/speed/results/0/rows/0"


@pytest.fixture
def page(tmp_path, monkeypatch) -> Path:
    """A copy of the page, which the command takes for the real one."""
    copied = shutil.copy(PAGE, tmp_path / "README.md")
    monkeypatch.setattr(gpu_check_command, "in_checkout", lambda name: copied)
    return copied


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("format", 2, "its format is 2, not 1"),
        ("date", None, "date is None"),
        ("machine", [], "does not say of which machine"),
        ("machine", {"device": []}, "of which machine"),
        ("stages", {"bits": {}}, "its stages are others"),
        (f"{_SPEED}/status", "well", "stage speed has no status"),
        (f"{_SPEED}/reason", None, "stage speed has no reason"),
        (f"{_SPEED}/results", [1], "stage speed has no results"),
        (f"{_SPEED}/results", [{"rows": 1}], "damaged results"),
        (f"{_ROW}/copy_share", "x", "copy_share is 'x'"),
        (f"{_ROW}/copy_share", -1, "copy_share is -1"),
        (f"{_ROW}/copy_share", None, "copy_share is None"),
        ("stages/settings/results", [{"best": 3}], "damaged results of the stage settings"),
        ("rehearsal", True, "nothing in it was measured on a GPU"),
    ],
)
def test_damaged_results_are_refused_and_the_page_stays(place, value, message, tmp_path, page):
    content = sample_content()
    put(content, place, value)
    _refused(json.dumps(content), message, tmp_path, page)


def test_results_that_are_none_are_refused(tmp_path, page):
    content = sample_content()
    _refused(json.dumps(content)[:-9], "is not valid JSON", tmp_path, page)
    _refused("[]", r"its format is \[\], not 1", tmp_path, page)
    for one in content["stages"].values():
        one |= {"status": SKIPPED, "reason": "torch sees no GPU"}
    said = "has no result of any stage: torch sees no GPU"
    _refused(json.dumps(content), said, tmp_path, page)


def _refused(text: str, message: str, tmp_path: Path, page: Path) -> None:
    path = tmp_path / "gpu_check.json"
    path.write_text(text)
    with pytest.raises(LowbitError, match=message) as error:
        gpu_check_command.main(["--table", str(path)])
    assert "\n" not in str(error.value)
    assert page.read_text() == PAGE.read_text()


def test_the_command_fills_the_page(tmp_path, page, capsys):
    path = tmp_path / "gpu_check.json"
    path.write_text(json.dumps(sample_content()))
    gpu_check_command.main(["--table", str(path)])
    assert page.read_text() == gpu_tables.filled(PAGE.read_text(), sample_content())
    assert capsys.readouterr().out == f"{page}: filled from {path}\n"
    with pytest.raises(LowbitError, match="cannot read .*gone.json"):
        gpu_check_command.main(["--table", str(tmp_path / "gone.json")])


# -- the command line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give one of OUT_DIR, --table JSON and --save-partials CKPT"),
        (["out", "--table", "x"], "give one of OUT_DIR"),
        (["out", "--save-partials", "x"], "give one of OUT_DIR"),
        (["--table", "x", "--minutes", "3"], "--minutes and --rehearse go with OUT_DIR"),
        (["--table", "x", "--rehearse"], "--minutes and --rehearse go with OUT_DIR"),
        (["out", "--minutes", "0"], "argument --minutes: '0' is not a finite number above zero"),
        (["out", "--minutes", "601"], "argument --minutes: 601 is more than 600"),
        (["out", "more"], "unrecognized arguments: more"),
        (["out", "--rehears"], "unrecognized arguments: --rehears"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        gpu_check_command.parse(argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LowbitError, match="OUT_DIR .* cannot be written"):
        gpu_check_command.main([str(tmp_path / "file")])


def run_tool(*argv: str, path: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh"), *argv]
    env = {"PATH": f"{path}:/usr/bin:/bin", "HOME": "/"}
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd="/")


@pytest.mark.slow
def test_the_tool_says_what_a_machine_lacks(tmp_path):
    """A line on stderr, status 1, and results that say why nothing ran."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run_tool(str(tmp_path / "out"), path=str(Path(sys.executable).parent))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    content = json.loads((tmp_path / "out" / "gpu_check.json").read_bytes())
    assert {one["status"] for one in content["stages"].values()} == {SKIPPED}
    reason = content["stages"]["bits"]["reason"]
    assert reason in done.stderr
    assert "torch sees no GPU" in reason or "pip install torch triton" in reason


@pytest.mark.slow
def test_the_tool_needs_no_torch_to_say_that_there_is_none(tmp_path):
    """A Python without any package."""
    venv.create(tmp_path / "empty", symlinks=True)
    done = run_tool(str(tmp_path / "out"), path=str(tmp_path / "empty" / "bin"))
    assert done.returncode == 1, done.stderr
    assert "No module named 'torch': pip install torch triton safetensors" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# -- what it imports

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "megatron_lowbit/benchmark/gpu_check").rglob("*.py"))
    if path.name != "__init__.py"
]
IMPORTS = """
import sys
for name in ("numpy", "pydantic", "megatron", "transformers", "tqdm", "matplotlib"):
    sys.modules[name] = None
if sys.argv[1] == "torch":
    import torch
before = set(sys.modules)
for name in sys.argv[2:]:
    __import__(name)
new = {name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(sorted(name for name in new if not name.startswith("_sysconfigdata")))
"""


def test_it_needs_torch_alone():
    """Triton comes with the first kernel, safetensors with the file of partials."""
    assert printed(IMPORTS, "torch", *MODULES) == "['megatron_lowbit']\n"


def test_what_starts_the_stages_needs_no_package():
    names = ("gpu_check_command", "stage_runner", "stage_process", "gpu_results", "gpu_tables")
    modules = [f"megatron_lowbit.benchmark.gpu_check.{name}" for name in names]
    assert printed(IMPORTS, "nothing", *modules) == "['megatron_lowbit']\n"
