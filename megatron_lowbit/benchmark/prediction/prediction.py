"""What the cost model says of hardware that is not here: times of every all-reduce of a model.

`predict` gives one `Row` for each link, model, tensor-parallel size and pass: a decode step of a
batch, or the prefill of a prompt. What it computes is communication alone; nothing overlaps with
the model's own work. `hardware` has the figures and their sources.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from megatron_lowbit.benchmark.prediction import cost_model
from megatron_lowbit.benchmark.prediction.cost_model import Message
from megatron_lowbit.benchmark.prediction.hardware import (
    LINKS,
    MODELS,
    NODE_SIZE,
    payload_bytes,
    setup,
)
from megatron_lowbit.comm.policy.timings import BF16_BYTES, MARGIN

TP_SIZES = (2, 4, 8, 16, 32, 64)
BATCHES = (1, 16, 64)
PROMPTS = (2048, 8192, 32768)
PASSES = [*(("decode", n) for n in BATCHES), *(("prefill", n) for n in PROMPTS)]
# "hierarchical-low" sends low bits inside a node, too (--lowbit-inside-node low-bit).
COLLECTIVES = ("native", "one-shot", "two-shot", "hierarchical", "hierarchical-low")


@dataclass(frozen=True)
class Row:
    """One model's pass over one link.

    Attributes:
        phase: ``decode`` or ``prefill``.
        tokens: In the pass: the batch, or the prompt.
        message_bytes: Of one all-reduce in BF16.
        sync_points: All-reduces in a pass.
        seconds: Of one all-reduce by each collective that is possible.
    """

    link: str
    model: str
    tp: int
    phase: str
    tokens: int
    message_bytes: int
    sync_points: int
    seconds: dict[str, float]

    @property
    def best(self) -> str:
        """The collective that wins."""
        return best_of(self.seconds)

    @property
    def speedup(self) -> float:
        """Of the best over native: 1 where native wins."""
        return self.seconds["native"] / self.seconds[self.best]

    def token_seconds(self, collective: str) -> float:
        """Communication a token: of one step in decode, of the pass over its tokens in prefill."""
        whole = self.sync_points * self.seconds[collective]
        return whole if self.phase == "decode" else whole / self.tokens

    def as_json(self) -> dict:
        """Everything, for a file."""
        per_token = {name: self.token_seconds(name) for name in self.seconds}
        derived = {"token_seconds": per_token, "best": self.best, "speedup": self.speedup}
        return asdict(self) | derived


def predict(
    *,
    links: Sequence[str] = tuple(LINKS),
    models: Sequence[str] = tuple(MODELS),
    tp_sizes: Sequence[int] = TP_SIZES,
    bits: tuple[int, int] = (4, 4),
) -> Iterator[Row]:
    """Yield the rows of all combinations that exist.

    Args:
        links: Names of `LINKS`.
        models: Names of `MODELS`.
        tp_sizes: Powers of two; those beyond a link's node or a model's heads are left out.
        bits: Of a partial and of the sum.

    Raises:
        LowbitError: The codec has no such bits.
    """
    for link in links:
        for model in models:
            for tp in tp_sizes:
                if possible(link, model, tp):
                    yield from _passes(link, model, tp, bits)


def best_of(seconds: dict[str, float]) -> str:
    """The fastest collective; native where no other saves `MARGIN` of its time."""
    fastest = min(seconds, key=seconds.__getitem__)
    return fastest if seconds[fastest] <= (1 - MARGIN) * seconds["native"] else "native"


def possible(link: str, model: str, tp: int) -> bool:
    """Whether the link joins so many ranks and the model has heads for them."""
    return tp <= MODELS[model].heads and (LINKS[link].inside is not None or tp <= NODE_SIZE)


def times(link: str, message: Message) -> dict[str, float]:
    """Seconds of one all-reduce over `link` by each collective that is possible."""
    costs = setup(link, message)
    seconds = {
        name: cost_model.FORMULAS[name](message, costs.flat)
        for name in ("native", "one-shot", "two-shot")
    }
    if costs.inside is not None and costs.between is not None:
        for name, low in (("hierarchical", False), ("hierarchical-low", True)):
            seconds[name] = cost_model.hierarchical(
                message,
                costs.between,
                node_size=NODE_SIZE,
                inside=costs.inside,
                low_bit_inside=low,
            )
    return seconds


def _passes(link: str, model: str, tp: int, bits: tuple[int, int]) -> Iterator[Row]:
    shape = MODELS[model]
    payload = payload_bytes(shape.hidden, bits)
    for phase, tokens in PASSES:
        values = tokens * shape.hidden
        seconds = times(link, Message(values, tp, *payload))
        size = BF16_BYTES * values
        yield Row(link, model, tp, phase, tokens, size, shape.sync_points, seconds)
