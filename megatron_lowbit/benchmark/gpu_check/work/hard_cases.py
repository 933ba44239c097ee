"""What is hard for kernels: strides, rows that are not finite, far addresses, CUDA graphs.

As `kernel_cases`, for tests/kernels and for the check on a GPU.
"""

import torch
from torch import Tensor

from megatron_lowbit.benchmark.gpu_check.work.kernel_cases import (
    DTYPES,
    GATHERED,
    ROTATED,
    check,
    check_carry,
    check_sums,
    new_carry,
    same,
    sample,
    tables_of,
)
from megatron_lowbit.codecs import Tables, get_codec
from megatron_lowbit.codecs.carry import Carry
from megatron_lowbit.errors import LowbitError

_GRAPH_SHAPE = (16, 4096)


def check_strides(name: str, dtype: torch.dtype, device: torch.device | str) -> None:
    """A partial of `dtype` and payloads of any strides, sums of every type."""
    codec = get_codec(name)
    wide = sample("heavy-tailed", (48, 100), 3).to(device, dtype)  # a copy has no such strides
    tables = tables_of(codec, 48, 3, device=device)
    views = [wide[:4:2, 3:51], wide[:, :2].T, wide[:1, 4:52].expand(2, 48)]
    payloads = check(codec, views, tables)
    check_sums(codec, payloads[:, :1], tables, dtypes=DTYPES)
    row = payloads.shape[2]
    wider = torch.empty(3, 2, row + 3, dtype=torch.uint8, device=device)[..., 1 : row + 1]
    check_sums(codec, wider.copy_(payloads), tables)  # and at odd addresses
    check_sums(codec, payloads[2:].expand(3, 2, row), tables)
    check_sums(codec, payloads.transpose(1, 2).contiguous().transpose(1, 2), tables)
    out = torch.zeros(48, 2, dtype=dtype, device=device)
    codec.decode_sum(payloads, tables, out=out.T)
    same(out.T, codec.decode_sum(payloads, tables).to(dtype), f"{codec}: a transposed result")


def check_carry_strides(dtype: torch.dtype, device: torch.device | str) -> None:
    """A partial of `dtype` and both carries of any strides."""
    codec = get_codec("shaped-hybrid")
    wide = sample("heavy-tailed", (48, 100), 3).to(device)
    tables = tables_of(codec, 48, 3, device=device)
    check_carry(codec, wide[:4:2, 3:51].to(dtype), wide[:, :2].to(dtype).T, tables)
    taken = wide[:1, 4:52].bfloat16().expand(2, 48)
    check_carry(codec, wide[:, :2].to(dtype).T, taken, tables)
    near = new_carry(wide[:2, :48], 2, 48, device)
    codec.encode_with_carry(wide[2:4, :48], tables, near)
    spread = torch.zeros(48, 4, dtype=torch.bfloat16, device=device)
    codec.encode_with_carry(wide[2:4, :48], tables, near._replace(given=spread[:, ::2].T))
    assert near.given is not None, "`new_carry` has it"
    same(spread[:, ::2].T, near.given, "a strided carry")
    if spread[:, 1::2].any():
        raise LowbitError("a strided carry is written between its own values")


def check_not_finite(name: str, device: torch.device | str) -> None:
    """NaN and infinities in every feature in some token, in the body and in BF16; and in none.

    Of a group, whose features are alike to the kernels, in the first, one between and the last.
    """
    codec = get_codec(name)
    tables = tables_of(codec, 12, 6, device=device)
    features = range(12) if name in (*ROTATED, *GATHERED) else (0, 5, 11)
    partials = [sample("normal", (len(features) + 1, 12), seed) for seed in range(2)]
    for token, feature in enumerate(features):
        partials[1][token, feature] = (torch.nan, torch.inf, -torch.inf)[token % 3]
    payloads = check(codec, partials, tables)
    nan = codec.decode_sum(payloads, tables).isnan().any(dim=1).tolist()
    if nan != [True] * len(features) + [False]:
        raise LowbitError(f"{codec}: tokens with NaN are {nan}, those put in are all but the last")


def check_carry_not_finite(device: torch.device | str) -> None:
    """In the body, in a BF16 feature and in what is taken; huge and tiny rows; the others stay."""
    codec = get_codec("shaped-hybrid", bits=2)
    tables = tables_of(codec, 12, 4, device=device)
    partial, taken = sample("normal", (2, 9, 12), 0)
    index = tables.bf16_index.tolist()
    body = next(i for i in range(12) if i not in index)
    for row, bad in enumerate((torch.nan, torch.inf)):
        partial[row, body], partial[2 + row, index[1]], taken[4 + row, body] = bad, bad, bad
    partial[6], taken[6], partial[7], taken[7] = 3e38, 3e38, 1e-45, 0.0
    check_carry(codec, partial, taken, tables)


def far_memory(device: torch.device | str) -> Tensor | None:
    """4 GiB, reserved and not touched; None where there are none."""
    try:
        return torch.empty(2**32 + 4096, dtype=torch.uint8, device=device)
    except RuntimeError:  # of the allocators, on a CPU and on a GPU
        return None


def check_far(name: str, far: Tensor) -> None:
    """Offsets above 2**31, in elements and in bytes, of all that a kernel reads and writes."""
    codec, device = get_codec(name), far.device
    tables = tables_of(codec, 64, 1, device=device)
    row = codec.row_bytes(tables)
    partial = far.view(torch.bfloat16).as_strided((2, 64), (2**31, 1))
    check(codec, [partial.copy_(sample("normal", (2, 64), 0))], tables)
    for strides in ((2**32, row, 1), (row, 2**32, 1)):
        payloads = far.as_strided((2, 2, row), strides)
        check_sums(codec, payloads.random_(0, 256), tables)
    zeros = torch.zeros(1, 2, row, dtype=torch.uint8, device=device)
    _check_far_sum(name, zeros, tables, partial, "a far result")
    columns = far.view(torch.bfloat16).as_strided((2, 65), (1, 2**25))
    tables = tables_of(codec, 65, 1, device=device)
    payloads = check(codec, [columns.copy_(sample("normal", (2, 65), 0))], tables)
    _check_far_sum(name, payloads, tables, columns, "a far column")


def _check_far_sum(name: str, payloads: Tensor, tables: Tables, out: Tensor, case: str) -> None:
    codec = get_codec(name)
    codec.decode_sum(payloads, tables, out=out)
    same(out, codec.decode_sum(payloads, tables).bfloat16(), f"{codec}: {case}")


def check_far_carry(far: Tensor) -> None:
    """The same of a carry, written where it was read."""
    codec, values = get_codec("rotated-hybrid"), far.view(torch.bfloat16)
    tables = tables_of(codec, 64, 1, device=far.device)
    partial, taken = sample("normal", (2, 2, 64), 0).to(far.device)
    near = torch.zeros(2, 64, dtype=torch.bfloat16, device=far.device)
    payload = codec.encode_with_carry(partial, tables, Carry(taken.bfloat16(), near))
    for strides in ((2**31, 1), (1, 2**25)):
        carry = values.as_strided((2, 64), strides)
        carry.copy_(taken)
        again = codec.encode_with_carry(partial, tables, Carry(carry, carry))
        same(again, payload, f"{codec}: payload with a far carry")
        same(carry, near, f"{codec}: a far carry")


def check_graph(name: str, device: torch.device | str) -> None:
    """A CUDA graph of encode and sum replays with other inputs, and with its own carry."""
    codec, carries = get_codec(name), name in ROTATED
    tables = tables_of(codec, _GRAPH_SHAPE[1], 32, device=device)
    partial = sample("normal", _GRAPH_SHAPE, 0).bfloat16().to(device)
    out, carry = torch.empty_like(partial), torch.zeros_like(partial)

    def work() -> None:
        if carries:
            payload = codec.encode_with_carry(partial, tables, Carry(carry, carry))
        else:
            payload = codec.encode(partial, tables)
        codec.decode_sum(payload.expand(2, -1, -1), tables, out=out)

    work()  # what is compiled at the first call cannot be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for seed in range(3):
        before = carry.clone()
        partial.copy_(sample("heavy-tailed", _GRAPH_SHAPE, seed))
        graph.replay()
        replayed = out.clone(), carry.clone()
        carry.copy_(before)
        work()
        for mine, right in zip(replayed, (out, carry), strict=True):
            same(mine, right, f"{codec}: replay {seed} of a CUDA graph")
