"""What a collective must give, computed in one process, and the check that it does.

Every rank can make the partials of all ranks from their seeds. They repeat after `_PERIOD` tokens,
a prime, so that a chunk or share that ends in another place than it should is seen; and since a
token's result depends on that token alone, one period's sum is enough to check all of a message.
"""

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.benchmark.codecs.codec_cases import own_tables
from megatron_lowbit.codecs import Codec, Tables, get_codec
from megatron_lowbit.comm.agreement import on_every_rank, require_equal
from megatron_lowbit.comm.feedback.chain import Chain, Step
from megatron_lowbit.comm.simulated import simulated_all_reduce
from megatron_lowbit.comm.traffic import Traffic
from megatron_lowbit.errors import LowbitError

_PERIOD = 127
# Rows that are compared at a time: 16 MB of fp32 at hidden 4096.
_ROWS = 1024
# dB, normal input, any number of ranks, by the smaller number of bits: below what each codec gives
# (4 bits twice quantized: 17; FP8: 31), far above what any error leaves, about 0.
_FLOORS = {2: 6.0, 3: 10.0, 4: 14.0, 5: 18.0, 6: 22.0, 8: 26.0, 16: 30.0}
NATIVE_FLOOR = 30.0


class Partials:
    """The partials of all ranks at one message shape."""

    def __init__(self, ranks: int, tokens: int, hidden: int, device: torch.device):
        self.tokens, self.hidden = tokens, hidden
        period = min(tokens, _PERIOD)
        self.base = [_normal(rank, period, hidden).to(device) for rank in range(ranks)]
        self.exact = torch.stack(self.base).double().sum(dim=0)

    def of_rank(self, rank: int) -> Tensor:
        """BF16 ``[tokens, hidden]``: what `rank` sends."""
        repeats = -(-self.tokens // len(self.base[rank]))
        return self.base[rank].repeat(repeats, 1)[: self.tokens]

    def tables(self, codec: Codec) -> Tables:
        """Tables as a calibration on these very partials makes them."""
        return own_tables(codec, torch.stack(self.base))


def simulate(
    base: list[Tensor],
    tables: Tables,
    *,
    codec: Codec,
    collective: str,
    node_size: int | None,
    feedback: bool = False,
) -> Tensor | None:
    """BF16 ``[tokens, hidden]``: what `collective` must give, bit for bit.

    Of a first call with error feedback, which takes nothing yet, the same, but where sums are sent:
    those are then encoded anew. Nothing of hierarchical, which nobody simulates with feedback.
    """
    if feedback and collective == "hierarchical":
        return None
    if collective == "hierarchical":
        assert node_size is not None, collective
        return _two_levels(torch.stack(base).float().split(node_size), tables, codec).bfloat16()
    assert collective in ("one-shot", "two-shot", "reduce-scatter"), collective
    if collective != "two-shot":
        return _sum(torch.stack(base), tables, codec, "one-shot")
    carrying = base if feedback else ()
    steps = [Chain().step(0, x, tables.hidden, gives=True, needs=False) for x in carrying]
    return _sum(torch.stack(base), tables, codec, "two-shot", steps)


def _two_levels(nodes: Sequence[Tensor], tables: Tables, codec: Codec) -> Tensor:
    """BF16 inside the nodes, whose fp32 partials ``[ranks, tokens, hidden]`` are given."""
    inside = get_codec("bf16")
    plain = inside.tables(tables.hidden, device=nodes[0].device)
    sums = torch.stack([_sum(node, plain, inside, "one-shot") for node in nodes])
    between = "one-shot" if len(sums) <= 2 else "two-shot"
    return _sum(sums, tables.of_nodes(len(sums)), codec, between)


def _sum(
    partials: Tensor, tables: Tables, codec: Codec, collective: str, steps: Sequence[Step] = ()
) -> Tensor:
    return simulated_all_reduce(
        partials, tables, codec=codec, collective=collective, traffic=Traffic(), steps=steps
    )


def sqnr_floor(codec: Codec) -> float:
    """dB that any sum by `codec` must clear."""
    bits = min(codec.bits, codec.sum_bits)
    return max((floor for least, floor in _FLOORS.items() if least <= bits), default=0.0)


def check(
    got: Tensor, partials: Partials, *, start: int, expected: Tensor | None, floor: float, case: str
) -> None:
    """Check a collective's result, ``[rows, hidden]`` from token `start` on; call it on every rank.

    Args:
        expected: One period from `simulate`; None where only closeness is promised (native), and
            then the ranks may differ, too.
        floor: Signal to quantization noise ratio in dB that it must clear.

    Raises:
        LowbitError: On every rank, with the first failing rank's message.
    """
    on_every_rank(lambda: _check_local(got, partials.exact, start, expected, floor, case))
    if expected is not None and len(got) == partials.tokens:
        digest = hashlib.blake2b(got.view(torch.uint8).cpu().numpy().data, digest_size=8)
        require_equal(f"result of {case}", digest.hexdigest())


def _check_local(got, exact, start, expected, floor, case) -> None:
    signal = noise = 0.0
    for first in range(0, len(got), _ROWS):
        rows = got[first : first + _ROWS]
        place = torch.arange(start + first, start + first + len(rows), device=got.device)
        place %= len(exact)
        if expected is not None and not torch.equal(rows, expected[place]):
            token, feature = (rows != expected[place]).nonzero()[0].tolist()
            wrong, right = rows[token, feature].item(), expected[place[token], feature].item()
            raise LowbitError(
                f"wrong result of {case}: rank {dist.get_rank()} has {wrong} at token "
                f"{start + first + token}, feature {feature}, and one process gives {right}"
            )
        should = exact[place]
        signal += should.square().sum().item()
        noise += (should - rows.double()).square().sum().item()
    # `not >=`: a NaN fails, too.
    if not signal >= 10 ** (floor / 10) * noise:
        ratio = signal / noise
        raise LowbitError(
            f"wrong result of {case}: noise is 1/{ratio:.1f} of the signal's power on rank "
            f"{dist.get_rank()}, at least {floor:.0f} dB are expected"
        )


def _normal(rank: int, tokens: int, hidden: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + rank)
    return torch.randn(tokens, hidden, generator=generator).to(torch.bfloat16)
