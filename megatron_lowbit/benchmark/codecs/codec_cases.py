"""What `codec_bench` measures of a codec: its operations, what each takes, and when it is right."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lowbit.benchmark.codecs.closeness import codes_apart, sums_apart
from megatron_lowbit.codecs import Codec, Statistics, Tables
from megatron_lowbit.codecs.carry import Carry
from megatron_lowbit.codecs.folding import fold
from megatron_lowbit.codecs.rotated_hybrid import RotatedHybrid
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels import select, switches

_PERIOD = 257  # tokens of the partials, which repeat: a prime, so that a wrong row is seen

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One operation of a codec at one shape.

    Attributes:
        name: In the results.
        call: Takes `given` and gives payloads, sums, or both.
        given: What it takes.
        moved: Bytes that it must move, each input and output once.
        rotates: Whether another rotation changes its results.
    """

    name: str
    call: Callable[..., Results]
    given: tuple[Tensor, ...]
    moved: int
    rotates: bool = False


def cases(codec: Codec, tables: Tables, partials: list[Tensor]) -> list[Case]:
    """Every operation of a codec, with payloads of all of `partials` where it sums."""
    payloads = torch.stack([codec.encode(x, tables, rank=r) for r, x in enumerate(partials)])
    partial, out, ranks = partials[0], torch.empty_like(partials[0]), len(partials)
    sent, received, dense = payloads[0].nbytes, payloads.nbytes, partial.nbytes
    rotates = tables.encode_scale is not None

    def encode(x: Tensor) -> Results:
        return (codec.encode(x, tables),)

    def decode_sum(rows: Tensor) -> Results:
        return (codec.decode_sum(rows, tables, out=out),)

    def both(x: Tensor, rows: Tensor) -> Results:
        return encode(x) + decode_sum(rows)

    def reduce_encode(rows: Tensor) -> Results:
        return (codec.reduce_encode(rows, tables),)

    found = [Case("encode", encode, (partial,), dense + sent, rotates)]
    if codec.carries:
        found.append(_carrying(codec, tables, partials, dense, sent))
    if rotates:
        found.append(_folded(codec, tables, partial, sent))
    summed = f"decode_sum of {ranks}"
    found += [
        Case(summed, decode_sum, (payloads,), received + dense, rotates),
        # A message without the sending, which puts this rank's payload among the others.
        Case(f"encode + {summed}", both, (partial, payloads), 2 * dense + sent + received, rotates),
    ]
    if not codec.needs_statistics or tables.of_sum is not None:
        found.append(Case(f"reduce_encode of {ranks}", reduce_encode, (payloads,), received + sent))
    if isinstance(codec, RotatedHybrid):
        found += _of_rotated_sums(codec, tables, partials, payloads)
    return found


def _carrying(codec: Codec, tables: Tables, partials: list[Tensor], dense: int, sent: int) -> Case:
    """Encode with error feedback: another partial stands for the error that is taken."""
    taken, given = partials[-1], torch.empty_like(partials[0])

    def encode(x: Tensor, carry: Tensor) -> Results:
        return codec.encode_with_carry(x, tables, Carry(carry, given)), given

    return Case("encode with a carry", encode, (partials[0], taken), 3 * dense + sent)


def _folded(codec: Codec, tables: Tables, partial: Tensor, sent: int) -> Case:
    """Encode of what a folded weight makes: any values do for the rotated ones."""
    _, folded = fold(torch.ones(tables.hidden, 1, device=partial.device), tables)
    wide = torch.cat([partial, partial[:, tables.bf16_index]], dim=1)
    return Case("encode, folded", lambda x: (codec.encode(x, folded),), (wide,), wide.nbytes + sent)


def _of_rotated_sums(
    codec: RotatedHybrid, tables: Tables, partials: list[Tensor], payloads: Tensor
) -> list[Case]:
    """The sum of two-shot with error feedback, and the sum with residual and norm."""
    partial, ranks, dense = partials[0], len(payloads), partials[0].nbytes
    given, weight = torch.empty_like(partial), torch.ones_like(partial[0])

    def reduce_encode(rows: Tensor, taken: Tensor) -> Results:
        return codec.reduce_encode_with_carry(rows, tables, Carry(taken, given)), given

    def norm(rows: Tensor, residual: Tensor) -> Results:
        return codec.decode_sum_norm(rows, tables, weight=weight, epsilon=1e-5, residual=residual)

    given_of, moved = (payloads, partials[-1]), payloads.nbytes + 2 * dense
    sent = payloads[0].nbytes
    found = [Case(f"reduce_encode of {ranks} with a carry", reduce_encode, given_of, moved + sent)]
    if codec.kernels(payloads, tables, family=select.NORM) is not None:  # on GPUs
        found.append(Case(f"decode_sum_norm of {ranks}", norm, given_of, moved + dense))
    return found


def check_rotated(
    way: str,
    got: Results,
    expected: Results,
    codec: Codec,
    tables: Tables,
    partials: list[Tensor],
    what: str,
) -> None:
    """Raise if a result is not plain torch's, or by tensor cores not close to it."""
    if way == switches.BUTTERFLIES:
        check_equal(got, expected, what)
    else:
        exact = torch.stack(partials).sum(dim=0, dtype=torch.float64)
        check_close(got, expected, codec, tables, exact, what)


def check_equal(got: Results, expected: Results, what: str) -> None:
    """Raise if any bit of a result is not plain torch's.

    Raises:
        LowbitError: Says of `what` where.
    """
    for mine, right in zip(got, expected, strict=True):
        if not torch.equal(mine, right):
            place = (mine != right).nonzero()[0].tolist()
            raise LowbitError(
                f"wrong result of {what}: kernel and plain torch differ first at {place}"
            )


def check_close(
    got: Results, expected: Results, codec: Codec, tables: Tables, exact: Tensor, what: str
) -> None:
    """Raise if payloads (uint8) and sums are not within the bounds of `closeness`.

    `exact` is the sum of the partials, ``[tokens, hidden]``.

    Raises:
        LowbitError: Says of `what` how far apart they are.
    """
    for mine, right in zip(got, expected, strict=True):
        if mine.dtype == torch.uint8:
            apart = codes_apart(mine, right, codec, tables)
        else:
            apart = sums_apart(mine, right, exact)
        if apart:
            raise LowbitError(f"wrong result of {what} on tensor cores: {apart}")


def make_partials(shape: tuple[int, int], ranks: int, device: torch.device) -> list[Tensor]:
    """BF16 ``[tokens, hidden]`` of each rank, seeded."""
    tokens, hidden = shape
    period = min(tokens, _PERIOD)
    partials = []
    for rank in range(ranks):
        generator = torch.Generator().manual_seed(rank)
        base = torch.randn(period, hidden, generator=generator).to(torch.bfloat16)
        partials.append(base.repeat(-(-tokens // period), 1)[:tokens].to(device))
    return partials


def make_tables(codec: Codec, partials: list[Tensor]) -> Tables:
    """Tables as a calibration on the first tokens of these partials makes them."""
    tables = own_tables(codec, torch.stack([x[:_PERIOD].cpu() for x in partials]))
    return tables.to(partials[0].device)


def own_tables(codec: Codec, partials: Tensor) -> Tables:
    """Tables as a calibration on partials ``[ranks, tokens, hidden]`` makes them."""
    statistics, hidden = Statistics.of(partials), partials.shape[-1]
    assert statistics.ranges is not None, "`of` has made all"
    widest = statistics.ranges.sum(dim=0).argsort(descending=True)
    index = widest[: codec.default_bf16_features(hidden)]
    return codec.tables(hidden, bf16_index=index, statistics=statistics)
