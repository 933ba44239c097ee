"""What the launches of the Triton kernels share: the size of a program, checks, the launch."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels.switches import BUTTERFLIES, SWITCH, rotation

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A row is in the registers of one program: 64 fp32 values a thread of 16 warps.
LARGEST_HIDDEN = 1 << 15
# `taken`, `given`, `bounded` and `largest` of a call without error feedback.
NO_CARRY = (None, None, None, 0.0)


@dataclass(frozen=True)
class Tile:
    """How a row lies in a program.

    Attributes:
        log_tile: The row is padded to this power of two: at least 8, a group of codes of any bits.
        warps: Of the program: up to 32 values a thread, 64 in the longest rows.
    """

    log_tile: int
    warps: int

    @classmethod
    def of(cls, hidden: int) -> "Tile":
        """The tile of a row of `hidden` features.

        Raises:
            LowbitError: The row is too long.
        """
        if not 0 < hidden <= LARGEST_HIDDEN:
            raise LowbitError(
                f"hidden size {hidden}: the GPU kernels take 1 to {LARGEST_HIDDEN}; set {SWITCH}=0 "
                "to do without them"
            )
        log_tile = max(hidden - 1, 7).bit_length()
        return cls(log_tile, min(max((1 << log_tile) >> 10, 1), 16))


def launch(kernel: Any, programs: int, tile: Tile, on: Tensor, *arguments, **constants) -> None:
    """Run so many programs, most often one a token, on the device of `on`, with nothing fused.

    Without `enable_fp_fusion=False` the compiler would make one rounding of a multiplication and an
    addition, and the bits would not be those of plain torch.
    """
    if not programs:
        return
    with torch.cuda.device_of(on):
        kernel[(programs,)](
            *arguments,
            **constants,
            LOG_TILE=tile.log_tile,
            num_warps=tile.warps,
            enable_fp_fusion=False,
        )


def is_compiled(kernel: Any) -> bool:
    """Whether `kernel` runs on GPUs, and not in Triton's interpreter."""
    return isinstance(kernel, triton.runtime.JITFunction)


def dot_type(kernel: Any) -> str:
    """How `kernel` is to rotate: the `DOT` of `parts.rotate.rotate`."""
    if rotation() == BUTTERFLIES:
        return ""
    return "bf16" if is_compiled(kernel) else "fp32"


def power_of_two(count: int) -> int:
    """The smallest one that is not less than `count`; 0 for 0."""
    return 1 << (count - 1).bit_length() if count else 0


def check_partial(partial: Tensor, hidden: int) -> Tensor:
    """A partial as kernels take it: BF16 as its bits.

    Raises:
        LowbitError: Another shape, or a type that no kernel reads.
    """
    if partial.ndim != 2 or partial.shape[1] != hidden:
        raise LowbitError(f"a partial is [tokens, {hidden}], got {list(partial.shape)}")
    return as_bits(partial)


def carry_arguments(
    tokens: int,
    hidden: int,
    taken: Tensor | None,
    given: Tensor | None,
    bounded: Tensor | None,
    largest: float,
) -> tuple:
    """A carry as kernels take it: with strides, BF16 as its bits.

    Raises:
        LowbitError: Another shape than ``[tokens, hidden]``, a type that no kernel reads, or an
            error that is not to be kept in BF16.
    """
    for name, carry in (("taken", taken), ("given", given)):
        if carry is not None and carry.shape != (tokens, hidden):
            raise LowbitError(f"a carry is [{tokens}, {hidden}], {name} is {list(carry.shape)}")
    if given is not None and given.dtype != torch.bfloat16:
        raise LowbitError(f"a carry is kept in BF16, given is {given.dtype}")
    views = (None if carry is None else as_bits(carry) for carry in (taken, given))
    placed = ((None, 0, 0) if view is None else (view, *view.stride()) for view in views)
    return (*next(placed), *next(placed), bounded, largest)


def check_payloads(payloads: Tensor, row_bytes: int) -> Tensor:
    """Payloads with the bytes of a row side by side; rows and ranks may lie anywhere.

    Raises:
        LowbitError: Another shape or type.
    """
    shape = payloads.shape
    if payloads.dtype != torch.uint8 or len(shape) != 3 or shape[2] != row_bytes or not shape[0]:
        wanted = f"uint8 [ranks, tokens, {row_bytes}]"
        raise LowbitError(f"payloads are {wanted}, got {payloads.dtype} {list(shape)}")
    return payloads if payloads.stride(2) == 1 else payloads.contiguous()


def check_sum(out: Tensor, tokens: int, hidden: int) -> Tensor:
    """Where a sum goes, as kernels take it: BF16 as its bits.

    Raises:
        LowbitError: Another shape than ``[tokens, hidden]``, or a type that no kernel writes.
    """
    if out.shape != (tokens, hidden):
        raise LowbitError(f"a sum is [{tokens}, {hidden}], got {list(out.shape)}")
    return as_bits(out)


def new_payload(like: Tensor, tokens: int, row_bytes: int) -> Tensor:
    """uint8 ``[tokens, row_bytes]`` where `like` is; also of a fake tensor."""
    return like.new_empty((tokens, row_bytes), dtype=torch.uint8)


def sum_into(out: Tensor | None, payloads: Tensor, hidden: int) -> Tensor:
    """Where the sum of `payloads` goes: `out`, or a new fp32 ``[tokens, hidden]`` if left out."""
    if out is not None:
        return out
    return payloads.new_empty((payloads.shape[1], hidden), dtype=torch.float32)


def as_bits(values: Tensor) -> Tensor:
    """`values`; of BF16 the bits as int16, see `parts.values`.

    Raises:
        LowbitError: A type that no kernel reads or writes.
    """
    if values.dtype not in DTYPES:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise LowbitError(f"{values.dtype}: the GPU kernels take {supported}")
    return values.view(torch.int16) if values.dtype == torch.bfloat16 else values
