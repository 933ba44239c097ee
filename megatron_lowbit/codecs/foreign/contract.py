"""The contract of every codec, as checks: what collectives, error feedback and engines rely on.

    megatron_lowbit.codecs.check_codec(Int6Token(6))      # in a test of your package

A codec of another package passes the quick ones when it is loaded, on one small partial, so that a
fault is found by its name and not in the middle of a run. All run on the CPU: plain torch is the
specification, and kernels are to give the same bits.
"""

from collections.abc import Callable, Iterator
from itertools import product

import torch

from megatron_lowbit.codecs.base import Codec
from megatron_lowbit.codecs.carry import LARGEST, Carry
from megatron_lowbit.codecs.foreign.trial import TOKENS, Case, far_off, same
from megatron_lowbit.codecs.tables import Tables
from megatron_lowbit.errors import LowbitError

_BAD = 2  # the token that gets a bad value
_HIDDEN = 48  # of the quick checks
_ROUNDING = 1e-3  # of fp32 sums and of rotations, as a share of the size
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


Check = Callable[[Case], str]  # what is wrong; empty if nothing is


def check_codec(codec: Codec, *, quick: bool = False) -> None:
    """Check that a codec keeps the contract of `codecs.base`, with its bits.

    Args:
        codec: What is checked.
        quick: On one small partial only, as when a codec is loaded.

    Raises:
        LowbitError: It does not; the message names the codec, the check and the remedy.
    """
    if codec.bits == 0:
        return  # nothing is encoded and nothing sent
    with torch.inference_mode():
        for case in _cases(codec, quick):
            for name, (check, remedy) in CHECKS.items():
                try:
                    wrong = check(case)
                except Exception as error:
                    wrong = " ".join(f"it raises {type(error).__name__}: {error}".split())
                if wrong:
                    raise LowbitError(
                        f"codec {codec!r} breaks the contract, check {name!r} ({case}): {wrong}; "
                        f"{remedy}"
                    )


def _cases(codec: Codec, quick: bool) -> Iterator[Case]:
    if quick:
        yield Case(codec, _HIDDEN, torch.bfloat16, 2)
        return
    for hidden, dtype, ranks in product((1, 33, 64, 576), _DTYPES, (1, 3)):
        yield Case(codec, hidden, dtype, ranks)


def _attributes(case: Case) -> str:
    codec = case.codec
    if not (isinstance(codec.supported_bits, tuple) and codec.supported_bits):
        return f"supported_bits is {codec.supported_bits!r}, no tuple of numbers"
    if codec.takes_index:
        count = codec.default_bf16_features(case.hidden)
        if not (isinstance(count, int) and 0 <= count <= case.hidden):
            return f"default_bf16_features gives {count!r}"
    return ""


def _tables(case: Case) -> str:
    tables = case.tables
    if type(tables) is not Tables or type(tables.to("cpu")) is not Tables:
        return f"tables gives a {type(tables).__name__}"
    if (tables.codec, tables.hidden) != (case.codec.name, case.hidden):
        return f"its tables are of codec {tables.codec!r} and hidden {tables.hidden}"
    return ""


def _row_bytes(case: Case) -> str:
    size = case.codec.row_bytes(case.tables)
    if type(size) is not int or size < 0:
        return f"row_bytes gives {size!r}"
    return ""


def _payload(case: Case) -> str:
    for tokens in (TOKENS, 1, 0):
        payload = case.codec.encode(case.partials[0, :tokens], case.tables, rank=0)
        wanted = (tokens, case.codec.row_bytes(case.tables))
        if payload.dtype != torch.uint8 or tuple(payload.shape) != wanted:
            return f"encode gives {payload.dtype} {list(payload.shape)}, not uint8 {list(wanted)}"
        if not payload.is_contiguous():
            return "encode gives what is not contiguous"
    return ""


def _sum(case: Case) -> str:
    for tokens in (TOKENS, 0):
        payloads = case.payloads[:, :tokens]
        total = case.codec.decode_sum(payloads, case.tables)
        if total.dtype != torch.float32 or tuple(total.shape) != (tokens, case.hidden):
            return f"decode_sum gives {total.dtype} {list(total.shape)}"
        out = torch.empty(case.hidden, 2 * tokens, dtype=case.dtype, device="cpu").T[::2]
        given = case.codec.decode_sum(payloads, case.tables, out=out)
        if given is not out or not same(out, total.to(case.dtype)):
            return "decode_sum with out= does not give out with the sum rounded into it"
    return ""


def _accuracy(case: Case) -> str:
    summed = torch.zeros_like(case.total)
    for rank, partial in enumerate(case.partials):
        tables = case.tables.of_ranks(rank, rank + 1)
        alone = case.codec.decode_sum(case.payloads[rank : rank + 1], tables)
        if wrong := far_off(case, partial.float(), alone):
            return f"one rank's payload, by tables.of_ranks, {wrong}"
        summed += alone
    off = (case.total - summed).norm() / summed.norm()
    if not off <= _ROUNDING:
        return f"the sum of {case.ranks} ranks is off by {off:.2g} of its size from theirs alone"
    return ""


def _input(case: Case) -> str:
    partials, payloads = case.partials.clone(), case.payloads.clone()
    case.codec.encode(partials[0], case.tables, rank=0)
    case.codec.decode_sum(payloads, case.tables)
    if not (same(partials, case.partials) and same(payloads, case.payloads)):
        return "encode or decode_sum writes into what it is given"
    return ""


def _strides(case: Case) -> str:
    partials = case.partials.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    if not same(case.encode(partials), case.payloads):
        return "a partial with other strides is encoded otherwise"
    payloads = torch.stack([case.payloads, case.payloads], dim=-1)[..., 0]
    if not same(case.codec.decode_sum(payloads, case.tables), case.total):
        return "payloads with other strides have another sum"
    return ""


def _tokens(case: Case) -> str:
    for token in range(TOKENS):
        rows = slice(token, token + 1)
        if not same(case.encode(case.partials[:, rows]), case.payloads[:, rows]):
            return f"token {token} alone is encoded otherwise than among {TOKENS}"
        alone = case.codec.decode_sum(case.payloads[:, rows], case.tables)
        if not same(alone, case.total[rows]):
            return f"the sum of token {token} alone is another than among {TOKENS}"
    return ""


def _determinism(case: Case) -> str:
    if not same(case.encode(case.partials), case.payloads):
        return "a second encode gives other bytes"
    if not same(case.codec.decode_sum(case.payloads, case.tables), case.total):
        return "a second decode_sum gives another sum"
    return ""


def _non_finite(case: Case) -> str:
    others = [token for token in range(TOKENS) if token != _BAD]
    for bad, feature in product((torch.nan, torch.inf, -torch.inf), (0, case.hidden - 1)):
        partials = case.partials.clone()
        partials[-1, _BAD, feature] = bad
        got = case.codec.decode_sum(case.encode(partials), case.tables)
        if not got[_BAD, feature].isnan():
            return f"{bad} in feature {feature} gives {got[_BAD, feature].item()}, not nan"
        if not same(got[others], case.total[others]):
            return f"{bad} in token {_BAD} changes other tokens"
    return ""


def _feedback(case: Case) -> str:
    rank, codec = case.ranks - 1, case.codec
    partial, taken = case.partials[rank], (case.partials[rank] / 8).bfloat16()
    kept, wanted = taken.clone(), Carry(taken).added_to(partial)
    payload = codec.encode_with_carry(partial, case.tables, Carry(taken, kept), rank=rank)
    if not same(payload, codec.encode(wanted, case.tables, rank=rank)):
        return "encode_with_carry does not send the partial with its carry"
    if not kept.float().norm() <= (LARGEST + 0.01) * wanted.norm():
        return f"the carry has {kept.float().norm() / wanted.norm():.2f} of what was to be sent"
    return ""


def _again(case: Case) -> str:
    codec, tables = case.codec, case.codec.sum_tables(case.tables)
    again = codec.for_sum()
    payload = codec.reduce_encode(case.payloads, case.tables)
    wanted = (TOKENS, again.row_bytes(tables))
    if payload.dtype != torch.uint8 or tuple(payload.shape) != wanted:
        return f"reduce_encode gives {payload.dtype} {list(payload.shape)}, not {list(wanted)}"
    got = again.decode_sum(payload[None], tables)
    plain = again.decode_sum(again.encode(case.total, tables)[None], tables)
    off, expected = (got - case.total).norm(), (plain - case.total).norm()
    if not off <= 1.25 * expected + _ROUNDING * case.total.norm():
        return f"reduce_encode is off by {off:.3g} and an encode of the sum by {expected:.3g}"
    return ""


# Each check, with what to do if it fails, in an order in which the first to fail says most.
CHECKS: dict[str, tuple[Check, str]] = {
    "attributes": (_attributes, "set them on the class, as codecs.Codec describes"),
    "tables": (_tables, "return codecs.Tables with the codec's name and the hidden size"),
    "row bytes": (_row_bytes, "return the bytes of one token's row, which the tables alone decide"),
    "payload": (_payload, "write one contiguous row of row_bytes for each token, also for none"),
    "sum": (_sum, "return fp32 [tokens, hidden], or `out` by codecs.base.rounded_into"),
    "accuracy": (_accuracy, "decode_sum must add what each rank encoded, by its row of the tables"),
    "input stays": (_input, "work on copies: collectives send and use them again"),
    "determinism": (_determinism, "round the same way each time"),
    "strides": (_strides, "do not view() partials and payloads as if they were contiguous"),
    "independent tokens": (_tokens, "let each row stand for itself: no scale of several tokens"),
    "non-finite values": (_non_finite, "let the token's scale, or a code, become NaN"),
    "error feedback": (_feedback, "leave encode_with_carry as Codec has it"),
    "sum quantized again": (
        _again,
        "leave reduce_encode as Codec has it: the sum has the bits of for_sum()",
    ),
}
