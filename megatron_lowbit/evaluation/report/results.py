"""Evaluation files, as the report reads them: each by `evaluation_schema`, or an error in one line.

Every number may be null (it was not finite), and what is beyond 1e30 counts as such; a section that
is null or empty was not measured.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.evaluation_schema import Evaluation
from megatron_lowbit.evaluation.output import read_summary
from megatron_lowbit.json_files import shown
from megatron_lowbit.schema import validated


@dataclass(frozen=True)
class ResultFile:
    """An evaluation, and the file that it was read from, as the user named it.

    Its label has the file's name, where two evaluations have the same; its date is in UTC.
    """

    path: Path
    date: datetime
    label: str
    data: Evaluation


def read_results(paths: list[Path]) -> list[ResultFile]:
    """Read evaluation files, in the order given.

    Raises:
        LowbitError: One is not an evaluation of this format; the message names the file and key.
        OSError: One cannot be read.
    """
    evaluations = [_read(path) for path in paths]
    labels = [evaluation.label for evaluation in evaluations]
    files = []
    for path, data in zip(paths, evaluations, strict=True):
        name = path.name.encode(errors="backslashreplace").decode()  # it may be no Unicode
        label = data.label if labels.count(data.label) == 1 else f"{data.label}, {name}"
        date = datetime.fromtimestamp(path.stat().st_mtime, tz=UTC)
        files.append(ResultFile(path=path, date=date, label=label, data=data))
    return files


def _read(path: Path) -> Evaluation:
    content = read_summary(path)
    evaluation = validated(Evaluation, content, str(path))
    names = [variant.name for variant in evaluation.variants]
    for name in names:
        if names.count(name) > 1:
            raise LowbitError(f"{path}: variants has {shown(name)} more than once")
    _check_variants(content, set(names), path)
    return evaluation


def _check_variants(value, known: set[str], path: Path) -> None:
    """Raise if any result, at any depth, is of a variant that `variants` lacks."""
    if isinstance(value, list):
        for one in value:
            _check_variants(one, known, path)
    elif isinstance(value, dict):
        named = {value.get("variant")} if isinstance(value.get("variant"), str) else set()
        for key in ("sqnr", "worst_token_sqnr", "stream_sqnr"):
            named |= set(value[key]) if isinstance(value.get(key), dict) else set()
        for name in sorted(str(name) for name in named - known):
            raise LowbitError(f"{path}: a result is of variant {shown(name)}: variants lacks it")
        for one in value.values():
            _check_variants(one, known, path)
