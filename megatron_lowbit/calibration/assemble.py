"""The index of a calibration, from what all ranks have observed."""

from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import torch

from megatron_lowbit.calibration.calibration_loop import gather_over_ranks
from megatron_lowbit.calibration.index import (
    SUM_STATISTICS,
    CalibrationIndex,
    SyncPointRecord,
    select_bf16_index,
)
from megatron_lowbit.calibration.saved_state import Progress
from megatron_lowbit.calibration.statistics import STATISTICS, RunningStatistics
from megatron_lowbit.codecs import Codec
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.model.summing import Summing


def assemble(
    summing: Summing,
    statistics: RunningStatistics,
    identity: dict,
    progress: Progress,
    codec: Codec,
    bf16_features: int,
) -> CalibrationIndex:
    """The index of all ranks' statistics, the same on every rank."""
    if statistics.sequences == 0:
        raise LowbitError(f"no sequence was finite: {progress.skipped[0]}")
    points = summing.points
    device = points[0].device
    gathered = gather_over_ranks(statistics.result().to(device), points[0].group).cpu()
    # [partials here, points, statistics, ranks of the group, hidden] to
    # [points, statistics, ranks, hidden]; either all partials are here or each is on a rank.
    partials = gathered[: -len(points)].unflatten(0, (summing.here, len(points)))
    partials = partials.permute(1, 2, 0, 3, 4).flatten(2, 3)
    sums = gathered[-len(points) :, :, 0]
    here: dict[int, dict[str, SyncPointRecord]] = {}
    for point, values, of_sum in zip(points, partials, sums, strict=True):
        record = SyncPointRecord(
            bf16_index=torch.empty(0, dtype=torch.int32),
            **dict(zip(STATISTICS, values, strict=True)),
            **dict(zip(SUM_STATISTICS, of_sum, strict=True)),
        )
        chosen = select_bf16_index(record.ranges, bf16_features)
        records = here.setdefault(point.layer, {})
        records[point.name] = replace(record, bf16_index=chosen)
    layers = {n: records for part in summing.stages.gather(here) for n, records in part.items()}
    manifest = {
        **identity,
        "corpus": {**identity["corpus"], "skipped_sequences": len(progress.skipped)},
        "codec": {"name": codec.name, "bits": codec.bits, "bf16_features": bf16_features},
        "versions": _versions(),
    }
    return CalibrationIndex(manifest=manifest, layers=layers)


def _versions() -> dict[str, str]:
    """Versions of the packages that the numbers depend on."""
    found = {}
    for package in ("megatron_lowbit", "torch", "megatron-core"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # used from a checkout
            found[package] = "not installed as a package"
    return found
