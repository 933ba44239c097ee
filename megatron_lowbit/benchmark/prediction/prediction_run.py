"""The steps of tools/predict.py: choose the cases, print them, write files, or check."""

import argparse
import json
from collections.abc import Collection
from pathlib import Path

from megatron_lowbit.benchmark.plots import check_plot
from megatron_lowbit.benchmark.prediction import prediction_check, prediction_report
from megatron_lowbit.benchmark.prediction.hardware import LINKS, MODELS, networks, payload_bytes
from megatron_lowbit.benchmark.prediction.prediction import TP_SIZES, Row, predict
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import check_output, write_atomic


def run(options: argparse.Namespace) -> None:
    """Do what the options of tools/predict.py say.

    Raises:
        LowbitError: An unknown name or size, bits that the codec lacks, no matplotlib for a plot,
            a check that fails.
    """
    if options.check:
        return check(options)
    if options.json:
        check_output(options.json, "--json")
    if options.plot:
        check_plot(options.plot)
    bits = parse_bits(options.bits)
    rows = select(options.link, options.model, options.tp, bits)
    narrowed = options.link or options.model or options.tp
    print(prediction_report.preamble(bits), end="\n\n")
    print((prediction_report.details if narrowed else prediction_report.summary)(rows))
    if options.json:
        _write_json(options.json, rows, bits)
    if options.plot:
        from megatron_lowbit.benchmark.prediction.prediction_plot import plot

        plot(options.plot, links=[options.link] if options.link else list(LINKS), bits=bits)


def select(link: str | None, model: str | None, tp: int | None, bits: tuple[int, int]) -> list[Row]:
    """The rows of one link, model and TP size, or of all.

    Raises:
        LowbitError: Unknown, or together impossible.
    """
    rows = list(
        predict(
            links=_one("link", link, LINKS),
            models=_one("model", model, MODELS),
            tp_sizes=_one("tensor-parallel size", tp, TP_SIZES),
            bits=bits,
        )
    )
    if not rows:
        raise LowbitError(
            f"no case of {link or 'these links'}, {model or 'these models'} and TP {tp}: NVLink "
            "and PCIe join 8 ranks, and 8b has 32 heads; networks are " + ", ".join(networks())
        )
    return rows


def parse_bits(text: str) -> tuple[int, int]:
    """Bits of partial and sum from ``4`` or ``4,6``.

    Raises:
        LowbitError: Not one or two numbers, or none that the codec has.
    """
    parts = text.split(",")
    if len(parts) > 2 or not all(part.strip().isdigit() for part in parts):
        raise LowbitError(f"--bits {text}: give one number, or two with a comma, as in 4,6")
    bits = (int(parts[0]), int(parts[-1]))
    payload_bytes(64, bits)  # raises
    return bits


def check(options: argparse.Namespace) -> None:
    """Measure behind emulated links, print as it goes.

    Raises:
        LowbitError: No links here, or a prediction is off.
    """
    if any((options.link, options.model, options.tp, options.json, options.plot)):
        raise LowbitError("--check takes no other option: it has its own links, sizes and ranks")
    results = []
    print(prediction_report.check_heading(), flush=True)
    for case in prediction_check.CASES:
        results += _attempts(case)
    judged, off = ([r for r in results if r.judged], [r for r in results if not r.ok])
    limit = f"{prediction_check.TOLERANCE:.0%}"
    if off:
        raise LowbitError(
            f"{len(off)} of {len(judged)} predictions are off by more than {limit} (OFF above); a "
            "machine that does something else at the same time does this, too"
        )
    worst = max(abs(r.error) for r in judged)
    print(f"all {len(judged)} predictions are within {limit}, the worst off by {worst:.0%}")


def _attempts(case: tuple) -> list[prediction_check.Result]:
    """Measure a group of cases until all are near enough, or the last time; print each."""
    for left in reversed(range(prediction_check.ATTEMPTS)):
        found = prediction_check.measure(*case)
        print(prediction_report.checked(found), flush=True)
        if all(result.ok for result in found):
            break
        if left:
            print("measured again:", flush=True)
    return found


def _one(what: str, asked: str | int | None, known: Collection) -> list:
    if asked is not None and asked not in known:
        raise LowbitError(f"unknown {what} {asked}: choose one of {', '.join(map(str, known))}")
    return list(known) if asked is None else [asked]


def _write_json(path: Path, rows: list[Row], bits: tuple[int, int]) -> None:
    content = {"bits": bits, "seconds": "predicted", "rows": [row.as_json() for row in rows]}
    write_atomic(path, json.dumps(content, indent=1).encode() + b"\n")
