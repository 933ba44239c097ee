"""A small causal language model whose sums are those of simulated ranks, to test planning on.

Each layer has two sync points that add to one residual stream. In fp32, so that no rounding hides
what an error does.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lowbit.calibration.index import CalibrationIndex, SyncPointRecord, select_bf16_index
from megatron_lowbit.codecs.tables import sum_in_rank_order
from megatron_lowbit.comm.feedback import Chain
from megatron_lowbit.comm.simulated import simulated_all_reduce
from megatron_lowbit.comm.traffic import Traffic
from megatron_lowbit.model.language_model import LanguageModel
from megatron_lowbit.model.stages import WHOLE

VOCAB, HIDDEN, RANKS, LAYERS = 50, 64, 2, 3
NAMES = ("self_attention.linear_proj", "mlp.linear_fc2")
POINTS = LAYERS * len(NAMES)


class Toy(nn.Module):
    """Logits of tokens; `reduce` sums a sync point's partials."""

    def __init__(self, *, weight: type[nn.Linear] = nn.Linear):
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Parameter(torch.randn(VOCAB, HIDDEN))
        self.up = nn.ModuleList(weight(HIDDEN, 2 * HIDDEN, bias=False) for _ in range(POINTS))
        self.down = nn.ParameterList(
            torch.randn(HIDDEN, 2 * HIDDEN) * 0.15 * (1 + 2 * (n == 0)) for n in range(POINTS)
        )
        self.out = nn.Parameter(torch.randn(HIDDEN, VOCAB) / HIDDEN**0.5)
        self.reduce = [_native] * POINTS

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """``[batch, seq]`` to ``[batch, seq, vocabulary]``."""
        x = self.embedding[tokens]
        for number in range(POINTS):
            seen = x / x.square().mean(dim=-1, keepdim=True).sqrt()
            if number % 2 == 0:  # in the place of attention
                seen = seen.cumsum(dim=1) / (1 + positions)[..., None]
            inner = torch.tanh(self.up[number](seen))
            each = zip(inner.chunk(RANKS, -1), self.down[number].chunk(RANKS, 1), strict=True)
            partials = torch.stack([part @ weight.T for part, weight in each])
            x = x + self.reduce[number](partials, False)
        return x / x.square().mean(dim=-1, keepdim=True).sqrt() @ self.out * 3


class Eights(nn.Linear):
    """A linear with a weight of 8 bits, which knows no gradient of it, nor of its input."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool):
        super().__init__(inputs, outputs, bias=bias)
        whole = self.weight.data
        self.scale = whole.abs().max().item() / 127
        self.weight = nn.Parameter((whole / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """As usual."""
        return x @ (self.weight.float() * self.scale).T


class Cut(nn.Linear):
    """A linear that leaves the graph."""

    def forward(self, x: Tensor) -> Tensor:
        """As usual."""
        with torch.no_grad():
            return super().forward(x)


class _NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight.T


class Opaque(nn.Linear):
    """A linear by a kernel without a derivative."""

    def forward(self, x: Tensor) -> Tensor:
        """As usual."""
        return _NoDerivative.apply(x, self.weight)


class ToySumming:
    """`model.summing.Summing` over a `Toy`; the group has one rank."""

    ranks = here = RANKS
    is_simulated = True
    stages, first = WHOLE, 0

    def __init__(self, model: Toy, group: dist.ProcessGroup):
        self._model = model
        keys = [(layer, name) for layer in range(1, LAYERS + 1) for name in NAMES]
        shared = {"chunk": 0, "apart": "", "hidden": HIDDEN, "device": torch.device("cpu")}
        self.points = [
            SimpleNamespace(layer=layer, name=name, group=group, **shared) for layer, name in keys
        ]
        self.everywhere = self.points

    def reducers(self, codecs, tables, collective: str, *, feedback: bool = False) -> list:
        chains = [Chain() for _ in range(RANKS)]

        def make(number: int):
            def reduce(partials: Tensor, scatter: bool) -> Tensor:
                steps = [
                    chain.step(number, x, HIDDEN, gives=number < POINTS - 1, needs=False)
                    for chain, x in zip(chains if feedback else [], partials, strict=feedback)
                ]
                return simulated_all_reduce(
                    partials,
                    tables[number],
                    codec=codecs[number],
                    collective=collective,
                    traffic=traffic,
                    steps=steps,
                )

            traffic = reduce.traffic = Traffic()
            return reduce

        return [make(number) for number in range(POINTS)]

    @contextmanager
    def using(self, reducers: Sequence) -> Iterator[None]:
        self._model.reduce = list(reducers)
        try:
            yield
        finally:
            self._model.reduce = [_native] * POINTS

    def watching(self, watch):
        def make(number: int):
            def reduce(partials: Tensor, scatter: bool) -> Tensor:
                total = _native(partials, scatter)
                watch(number, partials, total)
                return total

            return reduce

        return self.using([make(number) for number in range(POINTS)])

    def exact(self, point, partial: Tensor) -> Tensor:
        return sum_in_rank_order(partial)


def _native(partials: Tensor, scatter: bool) -> Tensor:
    return partials.sum(dim=0)


def language_model(model: Toy, group: dist.ProcessGroup) -> LanguageModel:
    """As planning sees it."""
    positions = torch.arange(4096)

    @torch.inference_mode()
    def logits(tokens: Tensor) -> Tensor:
        return model(tokens, positions[: tokens.shape[1]].expand_as(tokens), None)

    return LanguageModel(logits, VOCAB, 4096, group, list, str)


def sequences(count: int, length: int, *, seed: int = 0) -> Tensor:
    """int64 ``[count, length]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (count, length), generator=generator)


def calibrated(model: Toy, summing: ToySumming, texts: Tensor) -> CalibrationIndex:
    """The index of what was observed on `texts`."""
    seen: dict[int, list[Tensor]] = {}

    def watch(number: int, partial: Tensor, total: Tensor) -> None:
        seen.setdefault(number, []).append(partial.flatten(1, -2))

    run = language_model(model, None).logits
    with summing.watching(watch):
        for text in texts:
            run(text[None])
    layers: dict[int, dict[str, SyncPointRecord]] = {}
    for number, point in enumerate(summing.points):
        partials = torch.cat(seen[number], dim=1)
        record = record_of(partials)
        layers.setdefault(point.layer, {})[point.name] = record
    manifest = {
        "model": {"num_layers": LAYERS, "hidden_size": HIDDEN, "fingerprints": {"1": "toy"}},
        "tp_size": RANKS,
        "codec": {"name": "shaped-hybrid", "bits": 4, "bf16_features": 0},
        "corpus": {"sequences": len(texts), "seq_length": texts.shape[1]},
    }
    return CalibrationIndex(manifest, layers)


def record_of(partials: Tensor, kept: int = 0) -> SyncPointRecord:
    """The statistics of partials ``[ranks, tokens, hidden]``, with `kept` features in BF16."""

    def statistics(values: Tensor) -> tuple[Tensor, ...]:
        low, high = values.aminmax(dim=-2)
        return low, high, values.mean(dim=-2), values.square().mean(dim=-2)

    own = statistics(partials)
    index = select_bf16_index(2 * torch.maximum(own[0].abs(), own[1].abs()), kept)
    return SyncPointRecord(index, *own, *statistics(partials.sum(dim=0)))
