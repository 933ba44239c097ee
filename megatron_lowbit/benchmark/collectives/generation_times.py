r"""What a served model's user waits for, native against low bits; one process a rank.

    torchrun --nproc-per-node 3 -m megatron_lowbit.benchmark.collectives.generation_times \
        --load CKPT --data TEXT --work decode

Prompts go through Megatron's static engine: until the first new token is there (time to first
token, TTFT), or through a number of steps of decoding. The ways to communicate take turns, so that
drift of the machine hits all alike. `run` starts it behind emulated links.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_lowbit import cli
from megatron_lowbit.benchmark.collectives.links import emulated_links, parse_rate
from megatron_lowbit.benchmark.collectives.ranks import plain_ranks


@dataclass(frozen=True)
class Way:
    """One way to communicate.

    Attributes:
        name: In the results.
        collective: As for `apply`.
        budget: Bits a value of a recipe planned anew for feedback; None: what the index says.
        skipped: Sync points of it that send nothing.
    """

    name: str
    collective: str
    budget: float | None = None
    skipped: int = 0


@dataclass(frozen=True)
class Work:
    """What is timed.

    Attributes:
        name: In the results.
        prompt: Tokens of the prompt.
        steps: New tokens.
        ways: The first two are native: it and its control.
    """

    name: str
    prompt: int
    steps: int
    ways: tuple[Way, ...]


_NATIVE = (Way("native", "native"), Way("native, again", "native"))
# 1.7 bits in one-shot and 2.1 in two-shot have the KL of the paper's method at 4.19.
WORKS = {
    "first-token": Work(
        "time to first token, 512 tokens",
        512,
        1,
        (
            *_NATIVE,
            Way("one-shot, recipe", "one-shot"),
            Way("two-shot, recipe", "two-shot"),
            Way("one-shot, 1.7 bits", "one-shot", 1.7),
            Way("two-shot, 2.1 bits", "two-shot", 2.1),
        ),
    ),
    "decode": Work(
        "time per token, decoding",
        16,
        32,
        (
            *_NATIVE,
            Way("one-shot, recipe", "one-shot"),
            Way("one-shot, 10 sync points skipped", "one-shot", 3.5, 10),
            Way("auto, 10 sync points skipped", "auto", 3.5, 10),
        ),
    ),
}


def run(checkpoint: Path, text: Path, *, work: str, ranks: int, link: str | None) -> list[dict]:
    """Measure behind links of rate `link`, or on loopback without one.

    Args:
        checkpoint: A Megatron checkpoint with its calibration index in ``lowbit/``.
        text: Where the prompt is taken from.
        work: One of `WORKS`.
        ranks: The tensor-parallel size of the checkpoint.
        link: Such as ``100mbit``.

    Returns:
        A dictionary for each way: ``way``, ``work``, ``ranks``, ``link``, ``ms`` a step (median),
        ``p10_ms``, ``p90_ms``, ``communication_ms`` (in collectives, codec included),
        ``sent_bytes`` of rank 0, ``speedup`` over native.
    """
    module = [sys.executable, "-m", "megatron_lowbit.benchmark.collectives.generation_times"]
    started = emulated_links(ranks, parse_rate(link)) if link else plain_ranks(ranks)
    with tempfile.TemporaryDirectory() as directory, started as group:
        out = Path(directory) / "rows.json"
        arguments = ["--load", str(checkpoint), "--data", str(text), "--output", str(out)]
        group.run([*module, *arguments, "--work", work])
        rows = json.loads(out.read_text())
    return [{"work": work, "ranks": ranks, "link": link or "loopback", **row} for row in rows]


def main() -> None:
    """What each rank does."""
    parser = cli.parser(__doc__)
    parser.add_argument("--data", required=True, type=Path, metavar="FILE")
    parser.add_argument("--work", required=True, choices=WORKS)
    parser.add_argument("--repeats", type=cli.positive, default=7, metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    _measure(parser.parse_args())


def _measure(options: argparse.Namespace) -> None:
    import torch.distributed as dist

    from megatron_lowbit.calibration.index_files import read_index
    from megatron_lowbit.integration.arguments import INDEX_NAME
    from megatron_lowbit.integration.runtime import session
    from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args

    work = WORKS[options.work]
    args = parse_megatron_args(["--load", options.load])
    session.initialize(args)
    model, tokenizer = session.load_model(args), session.build_tokenizer(args)
    index = read_index(Path(options.load) / INDEX_NAME)
    ids = tokenizer.tokenize(options.data.read_text(encoding="utf-8")[: 20 * work.prompt])
    prompt = tokenizer.detokenize(ids[: work.prompt])
    ways = [(way, _planned(index, model, way)) for way in work.ways]
    measured: dict[str, list[tuple[float, float, int]]] = {way.name: [] for way in work.ways}
    for number in range(options.repeats + 1):
        for way, its_index in ways:
            sample = _sample(args, model, tokenizer, its_index, prompt, way, work.steps)
            if number:  # the first round warms up
                measured[way.name].append(sample)
    rows = _rows(measured)
    if options.output and dist.get_rank() == 0:
        options.output.write_text(json.dumps(rows))
    session.shutdown()


def _planned(index, model, way: Way):
    """The index with this way's recipe."""
    from megatron_lowbit.calibration.planning import replanned
    from megatron_lowbit.integration.sums.sync_points import sync_points_here

    if way.budget is None:
        return index
    points, _ = sync_points_here(model)
    return replanned(index, points, way.budget, skip=way.skipped)


def _sample(
    args, model, tokenizer, index, prompt: str, way: Way, steps: int
) -> tuple[float, float, int]:
    """Seconds a step, of them in collectives, and bytes sent."""
    import torch.distributed as dist

    from megatron_lowbit.integration.apply import apply
    from megatron_lowbit.integration.runtime.text_generation import generate

    handle = apply(model, index, collective=way.collective)
    dist.barrier()
    start = time.perf_counter()
    (made,) = generate(args, model, tokenizer, [prompt], tokens=steps)
    seconds = time.perf_counter() - start
    total = handle.stats()["total"]
    handle.remove()
    count = len(made.tokens)  # fewer where the text has come to its end
    sent = sum(c["sent_bytes"] for c in total)
    return seconds / count, sum(c["seconds"] for c in total) / count, sent // count


def _rows(measured: dict[str, list[tuple[float, float, int]]]) -> list[dict]:
    rows = []
    for way, samples in measured.items():
        steps, communicating, sent = (list(column) for column in zip(*samples, strict=True))
        deciles = statistics.quantiles(steps, n=10, method="inclusive")
        rows.append(
            {
                "way": way,
                "ms": 1000 * statistics.median(steps),
                "p10_ms": 1000 * deciles[0],
                "p90_ms": 1000 * deciles[-1],
                "communication_ms": 1000 * statistics.median(communicating),
                "sent_bytes": statistics.median(sent),
            }
        )
    return [{**row, "speedup": rows[0]["ms"] / row["ms"]} for row in rows]


if __name__ == "__main__":
    cli.run(main)
