"""The Triton kernels against the plain torch that specifies them, bit for bit.

The cases of tests/kernels and of the check on a GPU: which codecs, bits and types, and what must be
equal. Plain torch runs on the CPU. Where a value is NaN only that it is NaN is compared. Everything
here raises `LowbitError` on the first difference, and where no kernel would run.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_lowbit import kernels
from megatron_lowbit.codecs import Codec, Statistics, Tables, get_codec, wire
from megatron_lowbit.codecs.carry import Carry
from megatron_lowbit.codecs.folding import fold
from megatron_lowbit.codecs.peers.group_frame import Grouped
from megatron_lowbit.codecs.peers.systems import PEERS
from megatron_lowbit.errors import LowbitError

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROTATED = ["rotated-hybrid", "shaped-hybrid"]
GATHERED = ["static-hybrid", "scaled-hybrid"]  # the body without the BF16 features
GROUPED = list(PEERS)  # numbers for each group
ALL = [*ROTATED, *GATHERED, *GROUPED, "bf16"]
# One of each way to read a partial and to write a sum: the grouped differ in between.
WAYS = [ROTATED[0], *GATHERED, GROUPED[0], "bf16"]
BITS = [4, 3, 2, 1, 5, 6]
OUTLIER = 5  # the feature that is large in "one-outlier"


@contextmanager
def with_warps(count: int) -> Iterator[None]:
    """Programs of `count` warps inside, whatever their row."""
    from megatron_lowbit.kernels.triton.launching import Tile  # once it is known that Triton runs

    plain = Tile.of
    Tile.of = lambda hidden: Tile(plain(hidden).log_tile, count)
    try:
        yield
    finally:
        Tile.of = plain


def sample(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """fp32 input of one distribution."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if kind == "normal":
        return normal
    if kind == "heavy-tailed":
        return normal * torch.randn(shape, generator=generator).exp()
    if kind == "one-outlier":
        normal[..., OUTLIER] *= 1000
        return normal
    if kind == "constant":
        return torch.full(shape, 0.7 + seed)
    if kind == "zero":
        return torch.zeros(shape)
    raise ValueError(kind)


def tables_of(
    codec: Codec, hidden: int, kept: int, *, ranks: int = 3, device: torch.device | str = "cpu"
) -> Tables:
    """Tables on `device` with a BF16 index in no order, and centred where the codec is."""
    generator = torch.Generator().manual_seed(hidden)
    index = torch.randperm(hidden, generator=generator)[: min(kept, hidden)]
    statistics = Statistics.of(sample("heavy-tailed", (ranks, 5, hidden), 1))
    return codec.tables(hidden, bf16_index=index, statistics=statistics).to(device)


def same(got: Tensor, expected: Tensor, case: str) -> None:
    """Raise unless type, shape and every bit agree, NaN for NaN."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        raise LowbitError(
            f"{case}: {got.dtype} {list(got.shape)}, not {expected.dtype} {list(expected.shape)}"
        )
    mine, right = _bits(got), _bits(expected)
    if not torch.equal(mine, right):
        raise LowbitError(f"{case}: other bits, first at {(mine != right).nonzero()[0].tolist()}")


def _bits(values: Tensor) -> Tensor:
    values = values.cpu().contiguous()
    if not values.is_floating_point():
        return values
    integer = {4: torch.int32, 2: torch.int16}[values.element_size()]
    return values.view(integer).masked_fill(values.isnan(), -1)


def same_payload(got: Tensor, expected: Tensor, codec: Codec, tables: Tables) -> None:
    """Raise unless two payloads agree: codes by their bytes, numbers as `same` does."""
    case = f"{codec}, hidden {tables.hidden}"
    if got.shape != expected.shape or got.dtype != torch.uint8 or not got.is_contiguous():
        raise LowbitError(f"{case}: a payload {got.dtype} {list(got.shape)}, {got.stride()}")
    body = tables.hidden if tables.body_index is None else tables.body_index.numel()
    body = 0 if codec.name == "bf16" else wire.packed_bytes(body, codec.bits)
    same(got[:, :body], expected[:, :body], f"{case}: codes")
    floats = [_numbers(payload.cpu(), body, codec, tables) for payload in (got, expected)]
    for mine, right in zip(*floats, strict=True):
        same(mine, right, f"{case}: numbers behind the codes")


def _numbers(payload: Tensor, body: int, codec: Codec, tables: Tables) -> list[Tensor]:
    """Kind by kind as fp32, which tells all of their bits apart but those of a NaN."""
    if not isinstance(codec, Grouped):
        return [wire.split_row(payload, body)[1]]
    hidden, groups = tables.hidden, codec._groups(tables.hidden)[0]
    offsets = codec._offsets(hidden)
    spans = zip(codec._numbers(groups), itertools.pairwise(offsets), strict=True)
    found = [payload[:, body : offsets[0]].float()]  # padding
    for (dtype, _), (start, stop) in spans:
        found.append(payload[:, start:stop].flatten().clone().view(dtype).float())
    return found


def check(codec: Codec, partials: list[Tensor], tables: Tables) -> Tensor:
    """Encode and sum `partials` where `tables` are, each step against plain torch.

    Returns:
        The payloads, ``uint8 [ranks, tokens, row_bytes]``.
    """
    payloads, device = [], tables.bf16_index.device
    for rank, partial in enumerate(partials):
        with kernels.disabled():
            expected = codec.encode(partial.cpu(), tables.to("cpu"), rank=rank)
        if codec.kernels(partial.to(device), tables) is None:
            raise LowbitError(f"{codec}: no kernel serves it ({kernels.describe('cuda')})")
        payloads.append(codec.encode(partial.to(device), tables, rank=rank))
        same_payload(payloads[-1], expected, codec, tables)
    stacked = torch.stack(payloads)
    check_sums(codec, stacked, tables)
    return stacked


def check_sums(codec: Codec, payloads: Tensor, tables: Tables, dtypes=(None,)) -> None:
    """Sum payloads into new tensors of `dtypes`, and reduce them, against plain torch."""
    on_cpu = tables.to("cpu")
    with kernels.disabled():
        total = codec.decode_sum(payloads.cpu(), on_cpu)
    for dtype in dtypes:
        into = None if dtype is None else torch.empty_like(total, dtype=dtype).to(payloads.device)
        got = codec.decode_sum(payloads, tables, out=into)
        if into is not None and got is not into:
            raise LowbitError(f"{codec}: the sum is not in `out`")
        case = f"{codec}, hidden {tables.hidden}: sum in {dtype or torch.float32}"
        same(got, total.to(dtype or torch.float32), case)
    if codec.name in ROTATED:
        with kernels.disabled():
            of_sum = codec.reduce_encode(payloads.cpu(), on_cpu)
        same_payload(codec.reduce_encode(payloads, tables), of_sum, codec.for_sum(), tables)


def new_carry(taken: Tensor | None, tokens: int, hidden: int, device: torch.device | str) -> Carry:
    """A carry that takes `taken` and gives what is 7 before it is written."""
    given = torch.full((tokens, hidden), 7.0, dtype=torch.bfloat16, device=device)
    taken = None if taken is None else taken.to(device)
    return Carry(taken, given, torch.zeros(1, dtype=torch.int64, device=device))


def check_carry(
    codec: Codec, partial: Tensor, taken: Tensor | None, tables: Tables, *, rank: int = 1
) -> int:
    """Payloads of a rank's partial and of a sum with error feedback, and what they give on.

    Returns:
        How many rows were bounded.
    """
    size, device, on_cpu = (len(partial), tables.hidden), tables.bf16_index.device, tables.to("cpu")
    right, right_sum = (new_carry(taken, *size, "cpu") for _ in range(2))
    got, got_sum = (new_carry(taken, *size, device) for _ in range(2))
    with kernels.disabled():
        expected = codec.encode_with_carry(partial.cpu(), on_cpu, right, rank=rank)
        rows = torch.stack([codec.encode(partial.cpu().flip(0), on_cpu, rank=0), expected])
        of_sum = codec.reduce_encode_with_carry(rows, on_cpu, right_sum)
    payload = codec.encode_with_carry(partial.to(device), tables, got, rank=rank)
    summed = codec.reduce_encode_with_carry(rows.to(device), tables, got_sum)
    same_payload(payload, expected, codec, tables)
    same_payload(summed, of_sum, codec.for_sum(), tables)
    for mine, other, what in ((got, right, "a partial"), (got_sum, right_sum, "a sum")):
        assert mine.given is not None and other.given is not None, "`new_carry` has them"
        assert mine.bounded is not None and other.bounded is not None
        same(mine.given, other.given, f"{codec}: what {what} gives")
        same(mine.bounded, other.bounded, f"{codec}: bounded rows of {what}")
    return int(got.bounded.item()) if got.bounded is not None else 0


def all_bits() -> list[tuple[str, int]]:
    """Every codec that has kernels with every number of its bits, the default bits first."""
    own = {name: BITS for name in ROTATED}
    own |= {"static-hybrid": [4, 3, 5, 6, 8], "scaled-hybrid": [b for b in BITS if b > 1]}
    own |= {name: list(get_codec(name).supported_bits) for name in (*GROUPED, "bf16")}
    found = [(place, name, bits) for name in own for place, bits in enumerate(own[name])]
    return [(name, bits) for _, name, bits in sorted(found, key=lambda one: one[0])]


def check_bits(
    name: str,
    bits: int | None,
    device: torch.device | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """A small shape of `dtype`; in the rotated codecs another number of bits in the sum.

    Of the grouped two groups and a part of one. By default the codec's own bits.
    """
    of_sum = (bits, 7 - bits) if bits and name in ROTATED else bits
    codec = get_codec(name, bits=of_sum)
    tokens, hidden, kept = 2, 96, 5
    if isinstance(codec, Grouped):
        tokens, hidden, kept = 1, 2 * (codec.group or 32) + 5, 0
    partials = [sample("heavy-tailed", (tokens, hidden), seed).to(dtype) for seed in range(2)]
    tables = tables_of(codec, hidden, kept, device=device)
    check_sums(codec, check(codec, partials, tables), tables, dtypes=(dtype,))


def check_carried_bits(name: str, bits: int, device: torch.device | str) -> None:
    """As `check_bits`, with carries of BF16 and of fp32, and with none."""
    codec = get_codec(name, bits=(bits, 7 - bits))
    taken = sample("normal", (2, 96), 9)
    partial = sample("heavy-tailed", (2, 96), bits).bfloat16()
    tables = tables_of(codec, 96, 5, device=device)
    check_carry(codec, partial, [taken.bfloat16(), taken, None][bits % 3], tables)


def check_folded(name: str, device: torch.device | str) -> None:
    """Rows that come rotated, with the BF16 features behind."""
    codec = get_codec(name)
    weight = torch.ones(96, 2, device=device)
    _, folded = fold(weight, tables_of(codec, 96, 5, device=device))
    partials = [sample("heavy-tailed", (2, 101), seed).bfloat16() for seed in range(2)]
    check(codec, partials, folded)


def check_long(name: str, device: torch.device | str) -> None:
    """A row of several warps."""
    codec = get_codec(name)
    partials = [sample("heavy-tailed", (1, 4096), 0).bfloat16()] * 2
    check(codec, partials, tables_of(codec, 4096, 32, device=device))
