"""One-shot and two-shot all-reduce in one kernel each, over memory that all ranks can write.

For GPUs of one node and messages whose time is latency: a rank writes its payload's rows into its
peers' memory (`peer_memory`), meets them (`parts.barrier`), and sums what they have written. The
rows are those of `rotated_kernels`, so the bits are those of the codec and of the collectives over
torch.distributed.

The result may be put where the partial is. Calls of a group must come in the same order on all
ranks, on one stream or on streams that events order: unlike NCCL, nothing here orders them.
"""

from typing import Any

from torch import Tensor

from megatron_lowbit.kernels.cells import cells
from megatron_lowbit.kernels.layout import row_bytes
from megatron_lowbit.kernels.peer_memory import POLL_SECONDS, PeerMemory, row_stride
from megatron_lowbit.kernels.triton import symmetric_kernels as kernels
from megatron_lowbit.kernels.triton.launching import (
    Tile,
    carry_arguments,
    check_partial,
    check_sum,
    dot_type,
    is_compiled,
    launch,
    power_of_two,
)


def one_shot(
    memory: PeerMemory,
    partial: Tensor,
    out: Tensor,
    *,
    encode: dict,
    decode: dict,
    carry: dict,
    trap: bool = True,
) -> None:
    """Sum the partials of all ranks: every rank gets all payloads and decodes them.

    Args:
        memory: That holds this message.
        partial: BF16, fp16 or fp32 ``[tokens, width]``, any strides, as many tokens on every rank.
        out: BF16, fp16 or fp32 ``[tokens, hidden]``, any strides; may be `partial`.
        encode: What `rotated.encode` takes besides, for this rank.
        decode: What `rotated.decode_sum` takes besides.
        carry: What `carrying.encode_with_carry` takes of the carry of the partial: `taken`,
            `given`, `bounded` and `largest`.
        trap: A rank that does not come within `memory.seconds` ends the kernel with an error. Else
            it is counted in `memory.late`, and `out` is anything.

    Raises:
        LowbitError: As those two.
    """
    row = _stride(encode)
    assert memory.holds("one-shot", len(partial), row, 0)
    _run(
        kernels.one_shot,
        memory,
        partial,
        out,
        width=encode["width"],
        carries=carry_arguments(**carry, tokens=len(partial), hidden=encode["scale"].numel()),
        tables=(
            *_tables(encode),
            *(decode["center"], decode["scale"], decode["bf16_index"], decode["levels"]),
        ),
        WORDS=power_of_two(row // 4),
        TRAP=trap,
        **_shared(encode, decode),
    )


def two_shot(
    memory: PeerMemory,
    partial: Tensor,
    out: Tensor,
    *,
    encode: dict,
    reduce: dict,
    decode: dict,
    carry: dict,
    of_sum: dict,
    chunk: int,
    trap: bool = True,
) -> None:
    """Sum the partials of all ranks: each sums a share of the tokens and sends the sum.

    Args:
        memory: As for `one_shot`.
        partial: As for `one_shot`.
        out: As for `one_shot`.
        encode: As for `one_shot`.
        reduce: What `rotated.reduce_encode` takes besides.
        decode: What `rotated.decode_sum` takes besides, for rows of sums.
        carry: As for `one_shot`.
        of_sum: The same of the sums that this rank owns: ``[share, hidden]``, chunk by chunk.
        chunk: Tokens that are shared out at once (`comm.transport.chunks`): in shorter ones the
            same rank must own the same tokens as over torch.distributed, where the next call goes.
        trap: As for `one_shot`.

    Raises:
        LowbitError: As those three.
    """
    sum_search, sum_row = cells(reduce["thresholds"]), _stride(decode)
    assert memory.holds("two-shot", len(partial), _stride(encode), sum_row)
    tokens, hidden = len(partial), encode["scale"].numel()
    share = -(-tokens // memory.ranks)
    _run(
        kernels.two_shot,
        memory,
        partial,
        out,
        width=encode["width"],
        carries=(
            *carry_arguments(**carry, tokens=tokens, hidden=hidden),
            *(*carry_arguments(**of_sum, tokens=share, hidden=hidden), chunk),
        ),
        tables=(
            *_tables(encode),
            *(reduce["levels"], sum_search.table),
            *(decode["center"], decode["scale"], decode["bf16_index"], decode["levels"]),
        ),
        SUM_ROW=sum_row,
        WORDS=power_of_two(sum_row // 4),
        TRAP=trap,
        SUM_BODY_BYTES=decode["body_bytes"],
        SUM_BITS=decode["bits"],
        SUM_STEPS=sum_search.steps,
        SUM_CELLS=len(sum_search.table),
        **_shared(encode, decode),
    )


def _tables(encode: dict) -> tuple:
    """What both kernels encode by."""
    kept = encode["bf16_index"]
    search = cells(encode["thresholds"])
    return encode["center"], encode["scale"], kept, kept.numel(), search.table


def _shared(encode: dict, decode: dict) -> dict:
    """Constants of both kernels."""
    search = cells(encode["thresholds"])
    return {
        "STEPS": search.steps,
        "CELLS": len(search.table),
        "ROW": _stride(encode),
        "HIDDEN": encode["scale"].numel(),
        "LOG_BLOCK": encode["block"].bit_length() - 1,
        "LOG_SUM_BLOCK": decode["block"].bit_length() - 1,
        "KEPT": power_of_two(encode["bf16_index"].numel()),
        "BODY_BYTES": encode["body_bytes"],
        "BITS": encode["bits"],
    }


def _stride(rows_of: dict) -> int:
    return row_stride(row_bytes(rows_of["body_bytes"], rows_of["bf16_index"].numel() + 1))


def _run(
    kernel: Any,
    memory: PeerMemory,
    partial: Tensor,
    out: Tensor,
    *,
    width: int,
    carries: tuple,
    tables: tuple,
    **constants,
) -> None:
    """Launch as many programs as always: each must come to every call."""
    values = check_partial(partial, width)
    target = check_sum(out, len(partial), constants["HIDDEN"])
    programs = memory.calls.numel()
    launch(
        kernel,
        programs if len(partial) else 0,
        Tile.of(constants["HIDDEN"]),
        partial,
        *(values, *values.stride(), len(partial), *carries),
        *tables,
        *(target, *target.stride()),
        *(memory.peers, memory.calls, memory.late, memory.rank, memory.ranks),
        *(memory.half_bytes, int(memory.seconds / POLL_SECONDS)),
        FLAG_BYTES=memory.flag_bytes,
        PEERS=power_of_two(memory.ranks),
        PROGRAMS=programs,
        NATIVE=is_compiled(kernel),
        DOT=dot_type(kernel),
        **constants,
    )
