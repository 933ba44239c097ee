#!/usr/bin/env python3
"""Time what a client of examples/openai_server.py waits for, behind links of a chosen rate.

Each way to communicate has a server of its own, one process a rank, each behind an emulated link
(as root, with iproute2). The client is beside rank 0. Requests are greedy and end at no word.

example:
  python examples/serve_times.py --load CKPT --link 100mbit --output times.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs from a plain checkout

from megatron_lowbit import cli
from megatron_lowbit.benchmark.collectives.links import emulated_links, parse_rate
from megatron_lowbit.calibration.corpus import read_corpus
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import ROOT, check_output, write_atomic
from megatron_lowbit.integration.convert.hf_source import saved_tokenizer
from megatron_lowbit.text_table import markdown

LOW_BITS = "--lowbit-tp-comm --lowbit-collective"
WAYS = {
    "native": "",
    "one-shot": f"{LOW_BITS} one-shot",
    "two-shot": f"{LOW_BITS} two-shot",
}
PROMPT, SHORT, TOKENS, AT_ONCE, REPEATS = 512, 16, 32, 8, 5
PORT = 5000
URL = f"http://127.0.0.1:{PORT}/v1"
DONE = "measured.json"  # all ranks end when it is there


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.described(__doc__)
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="CKPT", help="with its calibration index")
    add("--ranks", type=cli.positive, default=3, metavar="N", help="TP size of CKPT, default: 3")
    add("--link", default="100mbit", metavar="RATE", help="default: 100mbit")
    add(
        "--data",
        type=Path,
        default=ROOT / "examples" / "data" / "persuasion.txt",
        metavar="FILE",
        help="text of the prompts, default: examples/data/persuasion.txt",
    )
    add("--args", default="", help="more arguments of Megatron's, as one string")
    add("--output", type=Path, metavar="FILE", help="JSON")
    return parser.parse_args()


def main() -> None:
    """Serve in each way, and print a table."""
    options = parse()
    if not (options.load / "lowbit").is_dir():
        raise LowbitError(f"no calibration index in {options.load}/lowbit: calibrate it first")
    if options.output is not None:
        check_output(options.output)
    prompts = prompts_of(options)
    rows = []
    for way in WAYS:
        rows.append(measure(way, prompts, options))
        cli.say(f"{way}: measured")
    print(table(rows))
    if options.output is not None:
        content = {"command": " ".join(sys.argv), "link": options.link, "ways": rows}
        write_atomic(options.output, json.dumps(content, indent=1).encode())


def measure(way: str, prompts: list[list[int]], options: argparse.Namespace) -> dict:
    """Start the ranks behind their links, and let the one beside the client measure."""
    flags = f"{WAYS[way]} {options.args}".split()
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "prompts.json").write_text(json.dumps(prompts))
        command = [sys.executable, __file__, "--rank", directory]
        command += ["--load", str(options.load), "--use-checkpoint-args", "--bf16"]
        command += ["--tensor-model-parallel-size", str(options.ranks), "--micro-batch-size", "1"]
        with emulated_links(options.ranks, parse_rate(options.link)) as ranks:
            ranks.run([*command, *flags])
        return {"way": way, **json.loads((Path(directory) / DONE).read_text())}


def table(rows: list[dict]) -> str:
    """The rows in Markdown, ratios against the first."""
    head = ["way", f"time to first token, {PROMPT} tokens", "tokens a second, one request"]
    first = rows[0]
    cells = [
        [
            row["way"],
            f"{row['ttft']:.2f} s ({first['ttft'] / row['ttft']:.2f}x)",
            f"{row['alone']:.2f} ({row['alone'] / first['alone']:.2f}x)",
            f"{row['together']:.2f} ({row['together'] / first['together']:.2f}x)",
        ]
        for row in rows
    ]
    return markdown([*head, f"{AT_ONCE} at once"], cells)


class Rank:
    """One rank: the server, until the client beside rank 0 is done.

    Args:
        directory: Where rank 0 leaves what it has measured, and each rank its log.
        arguments: Of the server.
    """

    def __init__(self, directory: Path, arguments: list[str]):
        self._done, self._log = directory / DONE, directory / f"rank{cli.RANK}.log"
        command = [sys.executable, "-m", "megatron_lowbit.launch"]
        command += [str(ROOT / "examples" / "openai_server.py"), *arguments, "--port", str(PORT)]
        # Each is a machine of its own: the engine's sockets are reached over the links.
        env = {**os.environ, "PYTHONPATH": str(ROOT), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        with self._log.open("w") as log:
            self._server = subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def run(self, prompts: list[list[int]]) -> None:
        """Until all is measured.

        Raises:
            LowbitError: The server has ended, or does not answer as it should.
        """
        try:
            if cli.RANK == 0:
                while not is_up():
                    self._wait()
                found = ask(prompts)
                write_atomic(self._done, json.dumps(found).encode())
            while not self._done.exists():
                self._wait()
        finally:
            self._server.terminate()
            self._server.wait(timeout=30)

    def _wait(self) -> None:
        time.sleep(0.2)
        if self._server.poll() is not None:
            last = "\n".join(self._log.read_text().splitlines()[-15:])
            raise LowbitError(f"the server has ended; its last messages:\n{last}")


def is_up() -> bool:
    """Whether the endpoint answers."""
    try:
        with urllib.request.urlopen(f"{URL}/health", timeout=5):
            return True
    except OSError:
        return False


def ask(prompts: list[list[int]]) -> dict[str, float]:
    """What the client measures: medians, after a request of each kind.

    Returns:
        ``ttft`` in seconds; ``alone`` and ``together``: tokens a second.
    """
    some, short = prompts[: REPEATS + 1], [prompt[:SHORT] for prompt in prompts]
    first = [complete(prompt[:PROMPT], 1) for prompt in some]
    alone = [TOKENS / complete(prompt[:SHORT], TOKENS) for prompt in some]
    together = []
    with ThreadPoolExecutor(AT_ONCE) as clients:
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            list(clients.map(lambda prompt: complete(prompt, TOKENS), short))
            together.append(AT_ONCE * TOKENS / (time.perf_counter() - start))
    named = {"ttft": first, "alone": alone, "together": together}
    return {name: statistics.median(values[1:]) for name, values in named.items()}


def complete(prompt: list[int], tokens: int) -> float:
    """Seconds of a request for so many tokens, greedy, at no word's end."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{URL}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    start = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as answer:
        usage = json.load(answer)["usage"]
    seconds = time.perf_counter() - start
    if usage["completion_tokens"] != tokens:
        raise LowbitError(f"asked for {tokens} tokens, got {usage['completion_tokens']}")
    return seconds


def prompts_of(options: argparse.Namespace) -> list[list[int]]:
    """Tokens of `AT_ONCE` prompts, `PROMPT` of each and one more."""
    tokenizer = saved_tokenizer(options.load / "tokenizer", "--load")
    return read_corpus([options.data], tokenizer.encode).first(AT_ONCE, PROMPT).tolist()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        directory = Path(sys.argv[2])
        prompts = json.loads((directory / "prompts.json").read_text())
        cli.run(lambda: Rank(directory, sys.argv[3:]).run(prompts))
    else:
        cli.run(main)
