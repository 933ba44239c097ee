"""One-shot and two-shot all-reduce in one kernel each, over memory that all ranks can write.

For GPUs of one node and messages whose time is latency: a rank writes its payload's rows into its
peers' memory (`peer_memory`), meets them (`triton_barrier`), and sums what they have written. The
rows are those of `triton_rows`, so the bits are those of the codec and of the collectives over
torch.distributed. A token belongs to one program on all ranks, so programs meet only those of their
own number, and each reads only what such programs wrote.

The result may be put where the partial is: a program reads a token's partial before it writes the
token's sum. Calls of a group must come in the same order on all ranks, on one stream, as with NCCL.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels import triton_barrier as barrier
from megatron_lowbit.kernels import triton_rows as rows
from megatron_lowbit.kernels.cells import cells
from megatron_lowbit.kernels.layout import row_bytes
from megatron_lowbit.kernels.peer_memory import PeerMemory, row_stride
from megatron_lowbit.kernels.triton_launch import (
    Tile,
    as_bits,
    check_partial,
    is_compiled,
    launch,
    power_of_two,
)


@triton.jit
def _as_bytes(address):
    """The bytes at an address of a row or an area."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def _send_row(peers, rank, ranks, place, ROW: tl.constexpr, WORDS: tl.constexpr):
    """Copy the row at `place` of this rank's memory to the same place of all others'."""
    word = tl.arange(0, WORDS)
    mask = word < ROW // 4
    tl.debug_barrier()  # all threads have written their bytes of the row
    own = _as_bytes(tl.load(peers + rank) + place).to(tl.pointer_type(tl.int32))
    values = tl.load(own + word, mask=mask)
    for step in range(1, ranks):
        peer = (rank + step) % ranks
        theirs = _as_bytes(tl.load(peers + peer) + place).to(tl.pointer_type(tl.int32))
        tl.store(theirs + word, values, mask=mask)


@triton.jit
def _one_shot(
    partial,  # fp32, fp16 or the bits of BF16 [tokens, hidden or more]
    partial_row_stride,
    partial_column_stride,
    tokens,
    center,  # fp32 [hidden], or None: this rank's
    encode_scale,  # fp32 [hidden], 0 for a BF16 feature
    encode_index,  # int64 [kept]: BF16 features of the partial
    kept,
    cells,  # int64 [CELLS]
    center_sum,  # fp32 [hidden], or None
    decode_scale,  # fp32 [hidden]
    index,  # int64 [kept]: BF16 features of the sum
    levels,  # fp32 [2**BITS]
    out,  # fp32, fp16 or the bits of BF16 [tokens, hidden]
    out_row_stride,
    out_column_stride,
    peers,  # int64 [ranks]
    calls,  # int32 [PROGRAMS]
    late,  # int32 [1]
    rank,
    ranks,
    half_bytes,
    limit,  # nanoseconds
    FLAG_BYTES: tl.constexpr,
    ROW: tl.constexpr,  # bytes from a row to the next
    WORDS: tl.constexpr,  # a power of two, at least ROW // 4
    PEERS: tl.constexpr,  # a power of two, at least `ranks`
    PROGRAMS: tl.constexpr,
    TRAP: tl.constexpr,  # whether a rank that does not come ends the kernel with an error
    HIDDEN: tl.constexpr,
    LOG_BLOCK: tl.constexpr,  # of encode: 0 for a partial that comes rotated
    LOG_SUM_BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    BODY_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    CELLS: tl.constexpr,
    NATIVE: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    program = tl.program_id(0)
    call = tl.load(calls + program)
    half = FLAG_BYTES + tl.cast(call & 1, tl.int64) * half_bytes
    own = tl.load(peers + rank) + half
    for token in range(program, tokens, PROGRAMS):
        place = tl.cast(rank * tokens + token, tl.int64) * ROW
        rows.encode_row(
            partial + tl.cast(token, tl.int64) * partial_row_stride,
            partial_column_stride,
            center,
            encode_scale,
            encode_index,
            kept,
            cells,
            _as_bytes(own + place),
            HIDDEN,
            LOG_BLOCK,
            KEPT,
            BODY_BYTES,
            BITS,
            STEPS,
            CELLS,
            LOG_TILE,
        )
        _send_row(peers, rank, ranks, half + place, ROW, WORDS)
    missing = barrier.meet(peers, rank, ranks, 2 * call + 2, limit, PEERS, NATIVE)
    tl.atomic_add(late, missing)
    if TRAP:
        barrier.give_up(missing, NATIVE)
    for token in range(program, tokens, PROGRAMS):
        rows.decode_row(
            _as_bytes(own + tl.cast(token, tl.int64) * ROW),
            tl.cast(tokens, tl.int64) * ROW,
            ranks,
            center_sum,
            decode_scale,
            index,
            kept,
            levels,
            out + tl.cast(token, tl.int64) * out_row_stride,
            out_column_stride,
            HIDDEN,
            LOG_SUM_BLOCK,
            KEPT,
            BODY_BYTES,
            BITS,
            NATIVE,
            LOG_TILE,
        )
    tl.store(calls + program, call + 1)


@triton.jit
def _two_shot(
    partial,  # fp32, fp16 or the bits of BF16 [tokens, hidden or more]
    partial_row_stride,
    partial_column_stride,
    tokens,
    center,  # fp32 [hidden], or None: this rank's
    encode_scale,  # fp32 [hidden], 0 for a BF16 feature
    encode_index,  # int64 [kept]: BF16 features of the partial
    kept,
    cells,  # int64 [CELLS]
    levels,  # fp32 [2**BITS]
    sum_cells,  # int64 [SUM_CELLS]
    center_sum,  # fp32 [hidden], or None
    decode_scale,  # fp32 [hidden]
    index,  # int64 [kept]: BF16 features of the sum
    sum_levels,  # fp32 [2**SUM_BITS]
    out,  # fp32, fp16 or the bits of BF16 [tokens, hidden]
    out_row_stride,
    out_column_stride,
    peers,  # int64 [ranks]
    calls,  # int32 [PROGRAMS]
    late,  # int32 [1]
    rank,
    ranks,
    half_bytes,
    limit,  # nanoseconds
    FLAG_BYTES: tl.constexpr,
    ROW: tl.constexpr,
    SUM_ROW: tl.constexpr,
    WORDS: tl.constexpr,  # a power of two, at least SUM_ROW // 4
    PEERS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TRAP: tl.constexpr,
    HIDDEN: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    LOG_SUM_BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    BODY_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    CELLS: tl.constexpr,
    SUM_BODY_BYTES: tl.constexpr,
    SUM_BITS: tl.constexpr,
    SUM_STEPS: tl.constexpr,
    SUM_CELLS: tl.constexpr,
    NATIVE: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    program = tl.program_id(0)
    call = tl.load(calls + program)
    half = FLAG_BYTES + tl.cast(call & 1, tl.int64) * half_bytes
    own = tl.load(peers + rank) + half
    share = tl.cdiv(tokens, ranks)
    for place in range(program, share, PROGRAMS):  # every owner's token at this place
        for step in range(ranks):
            owner = (rank + step) % ranks
            token = owner * share + place
            if token < tokens:
                theirs = tl.load(peers + owner) + half
                rows.encode_row(
                    partial + tl.cast(token, tl.int64) * partial_row_stride,
                    partial_column_stride,
                    center,
                    encode_scale,
                    encode_index,
                    kept,
                    cells,
                    _as_bytes(theirs + tl.cast(rank * share + place, tl.int64) * ROW),
                    HIDDEN,
                    LOG_BLOCK,
                    KEPT,
                    BODY_BYTES,
                    BITS,
                    STEPS,
                    CELLS,
                    LOG_TILE,
                )
    missing = barrier.meet(peers, rank, ranks, 2 * call + 1, limit, PEERS, NATIVE)
    tl.atomic_add(late, missing)
    if TRAP:
        barrier.give_up(missing, NATIVE)
    sums = tl.cast(ranks * share, tl.int64) * ROW  # where they begin in a half
    for place in range(program, share, PROGRAMS):
        token = rank * share + place
        if token < tokens:
            row = sums + tl.cast(token, tl.int64) * SUM_ROW
            rows.reduce_row(
                _as_bytes(own + tl.cast(place, tl.int64) * ROW),
                tl.cast(share, tl.int64) * ROW,
                ranks,
                kept,
                levels,
                sum_cells,
                _as_bytes(own + row),
                HIDDEN,
                KEPT,
                BODY_BYTES,
                BITS,
                SUM_BODY_BYTES,
                SUM_BITS,
                SUM_STEPS,
                SUM_CELLS,
                LOG_TILE,
            )
            _send_row(peers, rank, ranks, half + row, SUM_ROW, WORDS)
    missing = barrier.meet(peers, rank, ranks, 2 * call + 2, limit, PEERS, NATIVE)
    tl.atomic_add(late, missing)
    if TRAP:
        barrier.give_up(missing, NATIVE)
    for place in range(program, share, PROGRAMS):
        for owner in range(ranks):
            token = owner * share + place
            if token < tokens:
                rows.decode_row(
                    _as_bytes(own + sums + tl.cast(token, tl.int64) * SUM_ROW),
                    0,
                    1,
                    center_sum,
                    decode_scale,
                    index,
                    kept,
                    sum_levels,
                    out + tl.cast(token, tl.int64) * out_row_stride,
                    out_column_stride,
                    HIDDEN,
                    LOG_SUM_BLOCK,
                    KEPT,
                    SUM_BODY_BYTES,
                    SUM_BITS,
                    NATIVE,
                    LOG_TILE,
                )
    tl.store(calls + program, call + 1)


def one_shot(
    memory: PeerMemory,
    partial: Tensor,
    out: Tensor,
    *,
    encode: dict,
    decode: dict,
    trap: bool = True,
) -> None:
    """Sum the partials of all ranks: every rank gets all payloads and decodes them.

    Args:
        memory: That holds this message.
        partial: BF16, fp16 or fp32 ``[tokens, width]``, any strides, as many tokens on every rank.
        out: BF16, fp16 or fp32 ``[tokens, hidden]``, any strides; may be `partial`.
        encode: What `triton_rotated.encode` takes besides, for this rank.
        decode: What `triton_rotated.decode_sum` takes besides.
        trap: A rank that does not come within `memory.seconds` ends the kernel with an error. Else
            it is counted in `memory.late`, and `out` is anything.

    Raises:
        LowbitError: As those two.
    """
    search = cells(encode["thresholds"])
    assert memory.holds("one-shot", len(partial), _stride(encode), 0)
    _run(
        _one_shot,
        memory,
        partial,
        out,
        width=encode["width"],
        tables=(
            *(encode["center"], encode["scale"], encode["bf16_index"]),
            *(encode["bf16_index"].numel(), search.table),
            *(decode["center"], decode["scale"], decode["bf16_index"], decode["levels"]),
        ),
        WORDS=power_of_two(_stride(encode) // 4),
        TRAP=trap,
        STEPS=search.steps,
        CELLS=len(search.table),
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
    trap: bool = True,
) -> None:
    """Sum the partials of all ranks: each sums a share of the tokens and sends the sum.

    Args:
        memory: As for `one_shot`.
        partial: As for `one_shot`.
        out: As for `one_shot`.
        encode: As for `one_shot`.
        reduce: What `triton_rotated.reduce_encode` takes besides.
        decode: What `triton_rotated.decode_sum` takes besides, for rows of sums.
        trap: As for `one_shot`.

    Raises:
        LowbitError: As those three.
    """
    search, sum_search = cells(encode["thresholds"]), cells(reduce["thresholds"])
    sum_row = _stride(decode)
    assert memory.holds("two-shot", len(partial), _stride(encode), sum_row)
    _run(
        _two_shot,
        memory,
        partial,
        out,
        width=encode["width"],
        tables=(
            *(encode["center"], encode["scale"], encode["bf16_index"]),
            *(encode["bf16_index"].numel(), search.table),
            *(reduce["levels"], sum_search.table),
            *(decode["center"], decode["scale"], decode["bf16_index"], decode["levels"]),
        ),
        SUM_ROW=sum_row,
        WORDS=power_of_two(sum_row // 4),
        TRAP=trap,
        STEPS=search.steps,
        CELLS=len(search.table),
        SUM_BODY_BYTES=decode["body_bytes"],
        SUM_BITS=decode["bits"],
        SUM_STEPS=sum_search.steps,
        SUM_CELLS=len(sum_search.table),
        **_shared(encode, decode),
    )


def _shared(encode: dict, decode: dict) -> dict:
    """Constants of both kernels."""
    return {
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
    tables: tuple,
    **constants,
) -> None:
    """Launch as many programs as always: each must come to every call."""
    values, target = check_partial(partial, width), as_bits(out)
    if out.shape != (len(partial), constants["HIDDEN"]):
        wanted = f"[{len(partial)}, {constants['HIDDEN']}]"
        raise LowbitError(f"a sum is {wanted}, got {list(out.shape)}")
    programs = memory.calls.numel()
    launch(
        kernel,
        programs if len(partial) else 0,
        Tile.of(constants["HIDDEN"]),
        partial,
        *(values, *values.stride(), len(partial)),
        *tables,
        *(target, *target.stride()),
        *(memory.peers, memory.calls, memory.late, memory.rank, memory.ranks),
        *(memory.half_bytes, int(memory.seconds * 1e9)),
        FLAG_BYTES=memory.flag_bytes,
        PEERS=power_of_two(memory.ranks),
        PROGRAMS=programs,
        NATIVE=is_compiled(kernel),
        **constants,
    )
