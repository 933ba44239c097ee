r"""Time to first token (TTFT) of a checkpoint, native against low bits; one process a rank.

    torchrun --nproc-per-node 3 -m megatron_lowbit.benchmark.collectives.first_token \
        --load CKPT --data TEXT

A prompt goes through Megatron's static engine until the first new token is there. The ways to
communicate take turns, so that drift of the machine hits all alike. `run` starts it behind emulated
links.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from megatron_lowbit import cli
from megatron_lowbit.benchmark.collectives.links import emulated_links, parse_rate
from megatron_lowbit.benchmark.collectives.ranks import plain_ranks

# Name in the results -> collective and bits.
WAYS = {
    "native": ("native", None),
    "one-shot, 4 bits": ("one-shot", 4),
    "two-shot, 4 bits": ("two-shot", 4),
    "two-shot, 4+6 bits": ("two-shot", (4, 6)),
}


def run(
    checkpoint: Path, text: Path, *, ranks: int, link: str | None, tokens: int = 512
) -> list[dict]:
    """Measure behind links of rate `link`, or on loopback without one.

    Args:
        checkpoint: A Megatron checkpoint with its calibration index in ``lowbit/``.
        text: Where the prompt is taken from.
        ranks: The tensor-parallel size of the checkpoint.
        link: Such as ``100mbit``.
        tokens: Of the prompt.

    Returns:
        A dictionary for each of `WAYS`: ``way``, ``ranks``, ``link``, ``tokens``, ``ttft_ms``
        (median), ``communication_ms`` (in collectives, codec included), ``sent_bytes`` of rank 0,
        ``speedup`` over native.
    """
    module = [sys.executable, "-m", "megatron_lowbit.benchmark.collectives.first_token"]
    started = emulated_links(ranks, parse_rate(link)) if link else plain_ranks(ranks)
    with tempfile.TemporaryDirectory() as directory, started as group:
        out = Path(directory) / "rows.json"
        arguments = ["--load", str(checkpoint), "--data", str(text), "--output", str(out)]
        group.run([*module, *arguments, "--tokens", str(tokens)])
        rows = json.loads(out.read_text())
    return [{**row, "ranks": ranks, "link": link or "loopback", "tokens": tokens} for row in rows]


def main() -> None:
    """What each rank does."""
    parser = cli.parser(__doc__)
    parser.add_argument("--data", required=True, type=Path, metavar="FILE")
    parser.add_argument("--tokens", type=cli.positive, default=512, metavar="N")
    parser.add_argument("--repeats", type=cli.positive, default=5, metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    _measure(parser.parse_args())


def _measure(options: argparse.Namespace) -> None:
    import torch.distributed as dist

    from megatron_lowbit.calibration.index_files import read_index
    from megatron_lowbit.integration.arguments import INDEX_NAME
    from megatron_lowbit.integration.runtime import session
    from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args

    args = parse_megatron_args(["--load", options.load])
    session.initialize(args)
    model, tokenizer = session.load_model(args), session.build_tokenizer(args)
    index = read_index(Path(options.load) / INDEX_NAME)
    ids = tokenizer.tokenize(options.data.read_text(encoding="utf-8")[: 20 * options.tokens])
    prompt = tokenizer.detokenize(ids[: options.tokens])
    measured: dict[str, list[tuple[float, float, int]]] = {way: [] for way in WAYS}
    for number in range(options.repeats + 1):
        for way in WAYS:
            sample = _first_token(args, model, tokenizer, index, prompt, way)
            if number:  # the first round warms up
                measured[way].append(sample)
    rows = _rows(measured)
    if options.output and dist.get_rank() == 0:
        options.output.write_text(json.dumps(rows))
    session.shutdown()


def _first_token(args, model, tokenizer, index, prompt: str, way: str) -> tuple[float, float, int]:
    """Seconds to the first token, of them in collectives, and bytes sent."""
    import torch.distributed as dist

    from megatron_lowbit.integration.apply import apply
    from megatron_lowbit.integration.runtime.text_generation import generate

    collective, bits = WAYS[way]
    handle = apply(model, index, collective=collective, bits=bits)
    dist.barrier()
    start = time.perf_counter()
    generate(args, model, tokenizer, [prompt], tokens=1)
    seconds = time.perf_counter() - start
    total = handle.stats()["total"]
    handle.remove()
    return seconds, sum(c["seconds"] for c in total), sum(c["sent_bytes"] for c in total)


def _rows(measured: dict[str, list[tuple[float, float, int]]]) -> list[dict]:
    medians = {
        way: [statistics.median(column) for column in zip(*samples, strict=True)]
        for way, samples in measured.items()
    }
    return [
        {
            "way": way,
            "ttft_ms": 1000 * seconds,
            "communication_ms": 1000 * communicating,
            "sent_bytes": sent,
            "speedup": medians["native"][0] / seconds,
        }
        for way, (seconds, communicating, sent) in medians.items()
    ]


if __name__ == "__main__":
    cli.run(main)
