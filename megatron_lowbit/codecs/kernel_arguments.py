"""What kernels take, from what the codecs know (`codecs.tables`); kernels know nothing of codecs.

Of `apart` the names are those of `kernels.triton.static` and `kernels.triton.scaled`, of all others
those of `kernels.cpu.rotated` and `kernels.triton.rotated`, which have the same functions.
"""

from megatron_lowbit.codecs import codebook, rotation, wire
from megatron_lowbit.codecs.carry import LARGEST, Carry
from megatron_lowbit.codecs.tables import Tables


def apart(tables: Tables, bits: int) -> dict:
    """Of rows that are not rotated: which features are in the body, and which are sent apart."""
    return {
        "body_index": tables.body_index,
        "bf16_index": tables.bf16_index,
        "bits": bits,
        "body_bytes": wire.packed_bytes(tables.body_index.numel(), bits),
    }


def encoding(tables: Tables, rank: int, bits: int) -> dict:
    """To encode a rank's partial, besides it."""
    folded = tables.folded_index is not None
    return {
        "width": tables.width,
        "center": None if tables.center is None else tables.center[rank],
        "scale": tables.encode_scale,
        "bf16_index": tables.folded_index if folded else tables.bf16_index,
        "block": 1 if folded else rotation.block_size(tables.hidden),
        "thresholds": codebook.thresholds(bits, tables.encode_scale.device),
        "bits": bits,
        "body_bytes": wire.packed_bytes(tables.hidden, bits),
    }


def decoding(tables: Tables, bits: int) -> dict:
    """To decode and sum payloads, besides them."""
    return {
        "center": tables.center_sum,
        "scale": tables.decode_scale,
        "bf16_index": tables.bf16_index,
        "block": rotation.block_size(tables.hidden),
        "levels": codebook.levels(bits, tables.decode_scale.device),
        "bits": bits,
        "body_bytes": wire.packed_bytes(tables.hidden, bits),
    }


def reduction(tables: Tables, bits: int, sum_bits: int) -> dict:
    """To sum payloads and encode the sum, besides them."""
    return {
        "hidden": tables.hidden,
        "kept": tables.bf16_index.numel(),
        **_both_rows(tables, bits, sum_bits),
    }


def carried_reduction(tables: Tables, bits: int, sum_bits: int) -> dict:
    """The same where the sum's error is carried, besides `carried`: the sum is turned back."""
    return {
        "center": tables.center_sum,
        "scale": tables.encode_scale,
        "decode_scale": tables.decode_scale,
        "bf16_index": tables.bf16_index,
        "block": rotation.block_size(tables.hidden),
        "sum_levels": codebook.levels(sum_bits, tables.encode_scale.device),
        **_both_rows(tables, bits, sum_bits),
    }


def carried(carry: Carry) -> dict:
    """Of a carry."""
    return {**carry._asdict(), "largest": LARGEST}


def _both_rows(tables: Tables, bits: int, sum_bits: int) -> dict:
    device = tables.encode_scale.device
    return {
        "levels": codebook.levels(bits, device),
        "bits": bits,
        "body_bytes": wire.packed_bytes(tables.hidden, bits),
        "thresholds": codebook.thresholds(sum_bits, device),
        "sum_bits": sum_bits,
        "sum_body_bytes": wire.packed_bytes(tables.hidden, sum_bits),
    }
