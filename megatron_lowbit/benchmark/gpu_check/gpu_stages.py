"""The stages of the check, in order of worth."""

from dataclasses import dataclass

from megatron_lowbit.files import ROOT

# What --save-partials writes and the last stage reads.
PARTIALS = ROOT / "out" / "gpu_partials.safetensors"
AS_MANY_AS_CORES = 0
_WORK = "megatron_lowbit.benchmark.gpu_check.work"
MOST_PROCESSES = 16  # of a stage: each has a context on the GPU, of about 0.5 GB


@dataclass(frozen=True)
class Stage:
    """A part of the check that fails or ends alone.

    Attributes:
        name: In results.
        about: What it checks: a cell of the page's table.
        module: Of its work.
        weight: Its share of the time, among the stages that are left.
        processes: That work at once; `AS_MANY_AS_CORES` for as many as the machine has.
        function: In the module: takes a `stage_tasks.Task`, yields rows.
    """

    name: str
    about: str
    module: str
    weight: float
    processes: int = 1
    function: str = "run"


MACHINE = Stage("machine", "what it is", "megatron_lowbit.benchmark.gpu_check.gpu_machine", 1)
STAGES = (
    Stage(
        "bits",
        "every kernel, family, number of bits and type on small shapes: the bits of plain torch",
        f"{_WORK}.bit_stage",
        140,
        AS_MANY_AS_CORES,
    ),
    Stage(
        "speed",
        "4096 x 8192, and 1, 16, 64 tokens under graph replay: checked, then timed",
        f"{_WORK}.speed_stage",
        110,
    ),
    Stage(
        "capture",
        "CUDA graphs with changing inputs; NaN, strides, int64 offsets",
        f"{_WORK}.capture_stage",
        60,
        AS_MANY_AS_CORES,
    ),
    Stage(
        "symmetric-2",
        "symmetric memory of 2 ranks on one GPU: bits, carries, graphs, a missing rank",
        f"{_WORK}.peer_stage",
        35,
        2,
    ),
    Stage("symmetric-4", "the same of 4 ranks", f"{_WORK}.peer_stage", 35, 4),
    Stage(
        "settings",
        "warps with butterflies and with tensor cores, chunks of two-shot: timed",
        f"{_WORK}.settings_stage",
        60,
    ),
    Stage(
        "partials",
        "a model's own partials of all ranks, chained with carries: the CPU's bits",
        f"{_WORK}.chain_stage",
        40,
    ),
)
