"""Error feedback of one codec: what is kept, where it rounds, what bounds it; 1 bit and 0 bits."""

import pytest
import torch
from cases import CODECS, payloads_of, reference_sum, sample, tables_for, through

from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.codecs import Statistics, get_codec
from megatron_lowbit.codecs.carry import LARGEST, Carry
from megatron_lowbit.errors import LowbitError

RANKS, TOKENS, HIDDEN = 3, 5, 96
EVERY = [*CODECS, ("rotated-hybrid", 1), ("shaped-hybrid", 1), ("shaped-hybrid", 0)]
each = pytest.mark.parametrize(("name", "bits"), EVERY, ids=[f"{n}-{b}" for n, b in EVERY])


def setting(name, bits, tokens=TOKENS, hidden=HIDDEN):
    """A codec, the partials of all ranks and their tables."""
    codec = get_codec(name, bits=bits)
    partials = [sample("heavy-tailed", (tokens, hidden), seed) for seed in range(RANKS)]
    kept = 2 if codec.takes_index and bits else 0
    return codec, partials, tables_for(codec, partials, kept)


def rms(values):
    return values.double().square().mean(dim=1).sqrt()


@each
def test_the_carry_is_what_was_to_be_sent_and_was_not_in_bf16(name, bits):
    codec, partials, tables = setting(name, bits)
    taken = sample("normal", (TOKENS, HIDDEN), 99).bfloat16()
    for rank, partial in enumerate(partials):
        given = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16)
        payload = codec.encode_with_carry(
            partial.bfloat16(), tables, Carry(taken, given), rank=rank
        )
        wanted = partial.bfloat16().float() + taken.float()
        assert torch.equal(payload, codec.encode(wanted, tables, rank=rank))
        error = wanted - codec.decode_sum(payload[None], tables.of_ranks(rank, rank + 1))
        inside = rms(error) < 0.99 * LARGEST * rms(wanted) if bits else torch.ones(TOKENS).bool()
        assert inside.any() or bits == 1
        assert torch.equal(given[inside], error.bfloat16()[inside])


@each
def test_nothing_taken_and_nothing_given_is_plain_encoding(name, bits):
    codec, partials, tables = setting(name, bits)
    plain = codec.encode(partials[1], tables, rank=1)
    assert torch.equal(codec.encode_with_carry(partials[1], tables, Carry(), rank=1), plain)
    given = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16)
    first = codec.encode_with_carry(partials[1], tables, Carry(given=given), rank=1)
    assert torch.equal(first, plain)


@each
def test_rows_do_not_depend_on_each_other(name, bits):
    codec, partials, tables = setting(name, bits)
    taken = sample("normal", (TOKENS, HIDDEN), 99).bfloat16()
    whole, one = (torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16) for _ in range(2))
    payload = codec.encode_with_carry(partials[0], tables, Carry(taken, whole))
    for row in range(TOKENS):
        carry = Carry(taken, one).rows(row, row + 1)
        alone = codec.encode_with_carry(partials[0][row : row + 1], tables, carry)
        assert torch.equal(alone[0], payload[row])
    assert torch.equal(one, whole)


@each
def test_the_carry_may_lie_where_the_last_one_lay(name, bits):
    codec, partials, tables = setting(name, bits)
    taken = sample("normal", (TOKENS, HIDDEN), 99).bfloat16()
    apart = torch.empty_like(taken)
    codec.encode_with_carry(partials[0], tables, Carry(taken.clone(), apart))
    codec.encode_with_carry(partials[0], tables, Carry(taken, taken))
    assert torch.equal(taken, apart)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@each
def test_what_is_not_finite_stays_in_its_token_and_is_not_lost(name, bits, bad):
    codec, partials, tables = setting(name, bits)
    partials[1][2, 7] = bad
    given = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)
    payloads = [
        codec.encode_with_carry(p, tables, Carry(given=given if r == 1 else None), rank=r)
        for r, p in enumerate(partials)
    ]
    total = codec.decode_sum(torch.stack(payloads), tables)
    others = [0, 1, 3, 4]
    assert given[others].isfinite().all()
    assert total[others].isfinite().all()
    if bits:
        assert total[2].isnan().any()
    assert not given[2].isfinite().all()  # the next sync point sends it at the latest


@each
def test_carried_errors_do_not_pile_up(name, bits):
    """The stream's error after 30 sums is about one sum's, not thirty times as much in power."""
    if bits == 0:
        pytest.skip("never two in a row")
    codec = get_codec(name, bits=bits)
    carries = [torch.zeros(64, HIDDEN, dtype=torch.bfloat16) for _ in range(RANKS)]
    carried = plain = 0
    for step in range(30):
        partials = [sample("normal", (64, HIDDEN), 100 * step + rank) for rank in range(RANKS)]
        tables = tables_for(codec, partials, 2 if codec.takes_index else 0)
        exact = torch.stack(partials).sum(0)
        sent = torch.stack(
            [
                codec.encode_with_carry(p, tables, Carry(c, c), rank=r)
                for r, (p, c) in enumerate(zip(partials, carries, strict=True))
            ]
        )
        carried = carried + codec.decode_sum(sent, tables) - exact
        plain = plain + reference_sum(codec, partials, tables) - exact
    gain = (plain.square().mean() / carried.square().mean()).item()
    assert gain > 8, f"{name}: {gain:.1f} times less error in power"


@pytest.mark.parametrize("two_shot", [False, True])
def test_a_row_that_the_codec_always_misses_does_not_wind_up(two_shot):
    """A lone spike at 2 bits with nothing to rotate it over: the error is the row's own size."""
    codec = get_codec("rotated-hybrid", bits=2)
    tables = codec.tables(95)  # odd: blocks of one value
    spike = torch.zeros(2, 95)
    spike[0, 40] = 1000.0
    spike[1] = sample("normal", (1, 95), 1)
    bounded = torch.zeros(1, dtype=torch.int64)
    carry, of_sum = (torch.zeros(2, 95, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(100):
        payload = codec.encode_with_carry(spike, tables, Carry(carry, carry, bounded))
        if two_shot:
            summed = Carry(of_sum, of_sum, bounded)
            codec.reduce_encode_with_carry(payload[None], tables, summed)
    most = LARGEST / (1 - LARGEST) * rms(spike)[0]
    assert rms(carry)[0] <= 1.01 * most
    # A sum is at most a partial and its carry, as it is encoded.
    assert rms(of_sum)[0] <= 1.01 * most * (1 + LARGEST / (1 - LARGEST))
    assert bounded.item() >= 90
    assert rms(carry)[1] <= LARGEST / (1 - LARGEST) * rms(spike)[1]


def test_one_bit_is_the_sign_in_packed_bytes():
    codec = get_codec("rotated-hybrid", bits=1)
    tables = codec.tables(4096)
    assert codec.row_bytes(tables) == 4096 // 8 + 2
    partials = [sample("normal", (64, 4096), rank) for rank in range(RANKS)]
    payloads = payloads_of(codec, partials, tables)
    total = codec.decode_sum(payloads, tables)
    exact = torch.stack(partials).sum(0)
    # A Gaussian's sign has 4.40 dB.
    assert sqnr(exact, total) == pytest.approx(4.40, abs=0.1)
    again = codec.for_sum().decode_sum(codec.reduce_encode(payloads, tables)[None], tables)
    assert sqnr(exact, again) > 1.5


def test_no_bits_are_the_calibrated_mean_and_no_bytes():
    codec = get_codec("shaped-hybrid", bits=0)
    partials = torch.stack([sample("normal", (64, HIDDEN), rank) + rank for rank in range(RANKS)])
    tables = codec.tables(HIDDEN, statistics=Statistics.of(partials))
    assert codec.row_bytes(tables) == 0
    payloads = payloads_of(codec, partials, tables)
    assert payloads.shape == (RANKS, 64, 0)
    total = codec.decode_sum(payloads, tables)
    assert torch.equal(total, tables.center_sum.expand(64, -1))
    bare = get_codec("rotated-hybrid", bits=0)
    assert not bare.decode_sum(payloads, bare.tables(HIDDEN)).any()


@pytest.mark.parametrize("name", ["static-hybrid", "int4-g32", "bf16", "scaled-hybrid"])
def test_codecs_that_cannot_skip_have_no_0_bits(name):
    with pytest.raises(LowbitError, match="no 0-bit version"):
        get_codec(name, bits=0)


def test_a_sum_with_means_is_centred_by_their_sum():
    """Each rank's mean is subtracted from its partial; from a sum, that of all."""
    codec = get_codec("shaped-hybrid", bits=4)
    partials = torch.stack([sample("normal", (64, HIDDEN), r) + 50 * r for r in range(RANKS)])
    tables = codec.tables(HIDDEN, statistics=Statistics.of(partials))
    total = partials.sum(0)
    assert sqnr(total, through(codec, total, codec.sum_tables(tables))) > 40
