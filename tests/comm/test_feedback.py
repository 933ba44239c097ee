"""Error feedback over real collectives: each rank's chain against the specification."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from cases import sample, tables_for
from ranks import on_each_rank

import megatron_lowbit
from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.codecs import get_codec
from megatron_lowbit.codecs.carry import Carry
from megatron_lowbit.comm import all_reduce, reduce_scatter, transport
from megatron_lowbit.comm.feedback import Chain
from megatron_lowbit.comm.policy.making import make_policy
from megatron_lowbit.comm.policy.policy import Policy, Settings
from megatron_lowbit.comm.policy.timings import Kind
from megatron_lowbit.comm.simulated import simulated_all_reduce
from megatron_lowbit.comm.traffic import Traffic
from megatron_lowbit.errors import LowbitError

HIDDEN, LENGTH = 64, 5
CODECS = [
    ("shaped-hybrid", (4, 4)),
    ("shaped-hybrid", (3, 6)),
    ("rotated-hybrid", (1, 1)),
    ("static-hybrid", (4, 4)),
    ("int4-g32", (4, 4)),
    ("bf16", (16, 16)),
]
# (tokens and leading axes, values in a chunk): fewer than ranks, not divisible, several chunks.
SHAPES = [((7,), 1 << 19), ((4, 3), 64), ((1,), 1 << 19), ((0,), 1 << 19), ((9, 2), 256)]


def partials_at(step, shape, ranks, dtype=torch.bfloat16):
    seeds = range(100 * step, 100 * step + ranks)
    return [sample("heavy-tailed", (*shape, HIDDEN), seed).to(dtype) for seed in seeds]


def chain_of(name, bits, shape, ranks, dtype=torch.bfloat16):
    """Codec, and (partials of all ranks, tables) of each sync point."""
    codec, steps = get_codec(name, bits=bits), []
    for step in range(LENGTH):
        partials = partials_at(step, shape, ranks, dtype)
        steps.append((partials, tables_for(codec, partials, 2 if codec.takes_index else 0)))
    return codec, steps


def expected(codec, steps, collective):
    """What every rank must get at each sync point: the specification, in one process."""
    ranks, (tokens, hidden) = len(steps[0][0]), steps[0][0][0].flatten(0, -2).shape
    shape = (tokens, hidden)
    carries = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(ranks)]
    owed, sums = torch.zeros(shape, dtype=torch.bfloat16), []
    for number, (partials, tables) in enumerate(steps):
        taken = number > 0
        payloads = torch.stack(
            [
                codec.encode_with_carry(
                    p.flatten(0, -2), tables, Carry(c if taken else None, c), rank=r
                )
                for r, (p, c) in enumerate(zip(partials, carries, strict=True))
            ]
        )
        total = codec.decode_sum(payloads, tables)
        if collective == "two-shot":
            wanted = total + owed.float() if taken else total
            sum_codec, sum_tables = codec.for_sum(), codec.sum_tables(tables)
            row = sum_codec.encode(wanted, sum_tables)
            total = sum_codec.decode_sum(row[None], sum_tables)
            Carry(given=owed).keep(wanted, total)
        sums.append(total.to(partials[0].dtype))
    return sums


@on_each_rank(2, pytest.param(3, marks=pytest.mark.slow))
def test_all_reduces_carry_as_specified_on_every_rank_and_in_simulation(rank):
    ranks = dist.get_world_size()
    ways = ("one-shot", "two-shot")
    cases = [
        *product(CODECS, SHAPES, [torch.bfloat16], ways),
        *product(CODECS, SHAPES[:1], [torch.float32], ways),
    ]
    for case in cases:
        (name, bits), (shape, transport.CHUNK_VALUES), dtype, collective = case
        codec, steps = chain_of(name, bits, shape, ranks, dtype)
        wanted = expected(codec, steps, collective)
        feedback = megatron_lowbit.ErrorFeedback()
        chains = [Chain() for _ in range(ranks)]
        for again in range(2):  # the second pass takes nothing of the first
            feedback.start()
            for number, (partials, tables) in enumerate(steps):
                call = {"codec": codec, "tables": tables, "collective": collective}
                out = all_reduce(partials[rank], feedback=feedback, **call)
                assert torch.equal(out.flatten(0, -2), wanted[number]), (case, number)
                here = [
                    chain.step(number, x, HIDDEN, gives=True, needs=False)
                    for chain, x in zip(chains, partials, strict=True)
                ]
                simulated = simulated_all_reduce(
                    torch.stack(partials), traffic=Traffic(), steps=here, **call
                )
                assert torch.equal(simulated, out), (case, number, again)
        assert feedback.dropped == 0, case


@on_each_rank(3)
def test_every_way_to_sum_carries(rank):
    """Strided partials, in-place sums, reduce-scatter, native, skips, changes of the way."""
    ranks = dist.get_world_size()
    codec, steps = chain_of("shaped-hybrid", (4, 4), (6, 2), ranks)
    wanted = expected(codec, steps, "one-shot")
    strided, in_place, scattered, split = (megatron_lowbit.ErrorFeedback() for _ in range(4))
    transport.CHUNK_VALUES = 1 << 19
    for number, (partials, tables) in enumerate(steps):
        call = {"codec": codec, "tables": tables}
        wide = torch.zeros(6, 2, 2 * HIDDEN, dtype=torch.bfloat16)
        wide[..., ::2] = partials[rank]
        out = all_reduce(wide[..., ::2], feedback=strided, **call)
        assert torch.equal(out.flatten(0, -2), wanted[number])
        mine = partials[rank].clone()
        out = all_reduce(mine, feedback=in_place, in_place=True, **call)
        assert out.data_ptr() == mine.data_ptr()
        assert torch.equal(out.flatten(0, -2), wanted[number])
        for chunk, feedback in ((1 << 19, scattered), (64, split)):
            transport.CHUNK_VALUES = chunk
            block = reduce_scatter(partials[rank], feedback=feedback, **call)
            share = wanted[number].view(6, 2, HIDDEN).chunk(ranks)[rank]
            assert torch.equal(block, share), (number, chunk)
        transport.CHUNK_VALUES = 1 << 19
    _native_between(rank, codec, steps)
    _sums_that_another_collective_takes_over(rank, codec, steps)
    _skips(rank, steps)
    _what_is_refused(rank, steps)


def _native_between(rank, codec, steps):
    """A native sum takes the carry into its partial and gives nothing."""
    feedback, carry = megatron_lowbit.ErrorFeedback(), torch.empty(12, HIDDEN).bfloat16()
    (first, tables), (second, _), (third, last) = steps[:3]
    all_reduce(first[rank], codec=codec, tables=tables, feedback=feedback)
    codec.encode_with_carry(first[rank].flatten(0, -2), tables, Carry(None, carry), rank=rank)
    native = all_reduce(
        second[rank], codec=codec, tables=tables, collective="native", feedback=feedback
    )
    mine = (second[rank].flatten(0, -2).float() + carry.float()).bfloat16().view(6, 2, HIDDEN)
    dist.all_reduce(mine)
    assert torch.equal(native, mine)
    plain = all_reduce(third[rank], codec=codec, tables=last)
    assert torch.equal(all_reduce(third[rank], codec=codec, tables=last, feedback=feedback), plain)
    assert feedback.dropped == 0


def _sums_that_another_collective_takes_over(rank, codec, steps):
    """Two-shot, then one-shot: what the owners owe goes into their partials, and is not lost."""
    ranks, errors = dist.get_world_size(), {}
    for name, ways in (("carried", ("two-shot", "one-shot")), ("lost", ("one-shot", "one-shot"))):
        feedback, stream = megatron_lowbit.ErrorFeedback(), 0.0
        for number, (partials, tables) in enumerate(steps[:2]):
            collective = ways[number] if name == "carried" else "one-shot"
            out = all_reduce(
                partials[rank], codec=codec, tables=tables, collective=collective, feedback=feedback
            )
            stream = stream + out.float() - torch.stack(partials).float().sum(0)
        errors[name] = stream.square().mean().item()
    # With the sum's error lost, the two-shot step would have brought it in whole.
    assert errors["carried"] < 1.5 * errors["lost"], (errors, ranks)


def _skips(rank, steps):
    """0 bits: no message, the mean as the sum, and the partial in the next sum."""
    skip, after = get_codec("shaped-hybrid", bits=0), get_codec("shaped-hybrid", bits=6)
    (first, tables), (second, last) = steps[:2]
    for collective in ("one-shot", "two-shot"):
        feedback, traffic = megatron_lowbit.ErrorFeedback(), Traffic()
        call = {"collective": collective, "feedback": feedback, "traffic": traffic}
        total = all_reduce(first[rank], codec=skip, tables=tables, **call)
        assert torch.equal(total, tables.center_sum.bfloat16().expand_as(total))
        assert [decision.collective for decision in traffic.by_decision] == ["skip"]
        assert traffic.total().sent_bytes == traffic.total().payload_bytes == 0
        total = total.float() + all_reduce(second[rank], codec=after, tables=last, **call).float()
        exact = torch.stack([*first, *second]).float().sum(0)
        noise = (total - exact).square().mean() / exact.square().mean()
        assert noise < 0.01, (collective, noise.item())
        share = reduce_scatter(
            first[rank], codec=skip, tables=tables, feedback=megatron_lowbit.ErrorFeedback()
        )
        assert share.shape == (6 // dist.get_world_size(), 2, HIDDEN)
        assert torch.equal(share, tables.center_sum.bfloat16().expand_as(share))


def _what_is_refused(rank, steps):
    partial, tables = steps[0][0][rank], steps[0][1]
    skip = get_codec("shaped-hybrid", bits=0)
    for call in (all_reduce, reduce_scatter):
        with pytest.raises(LowbitError, match="needs error feedback"):
            call(partial, codec=skip, tables=tables)
        with pytest.raises(LowbitError, match="inference only"):
            call(partial.clone().requires_grad_(), feedback=megatron_lowbit.ErrorFeedback())
    chain = Chain()
    chain.step(0, partial, HIDDEN, gives=True, needs=False)
    with pytest.raises(LowbitError, match="0 bits has sent nothing"):
        chain.step(1, partial[:1], HIDDEN, gives=True, needs=True)


@on_each_rank(4, 6)
def test_hierarchical_carries_every_quantization_once(rank):
    ranks = dist.get_world_size()
    for size in (2, ranks // 2):
        for low_bit_inside in (False, True):
            codec, steps = chain_of("shaped-hybrid", (4, 4), (9,), ranks)
            settings = Settings("hierarchical", node_size=size, low_bit_inside=low_bit_inside)
            policy = make_policy(
                settings,
                group=dist.group.WORLD,
                codec=codec,
                tables=steps[0][1],
                device=torch.device("cpu"),
            )
            assert policy.times is None, "a fixed mode times nothing"
            errors = {}
            for name, feedback in (("plain", None), ("carried", megatron_lowbit.ErrorFeedback())):
                stream = 0.0
                for partials, tables in steps:
                    call = {"codec": codec, "tables": tables, "collective": policy}
                    out = all_reduce(partials[rank].float(), feedback=feedback, **call)
                    together = [torch.empty_like(out) for _ in range(ranks)]
                    dist.all_gather(together, out)
                    assert all(torch.equal(out, other) for other in together)
                    stream = stream + out - torch.stack(partials).float().sum(0)
                errors[name] = stream.square().mean().item()
            # Of five equal errors one is left, and of each row's carry what BF16 keeps.
            assert errors["carried"] < errors["plain"] / 3, (size, low_bit_inside, errors)
            assert feedback.dropped == 0
            all_reduce(
                partials[rank].float(), feedback=feedback, **{**call, "collective": "one-shot"}
            )
            sums = 3 if ranks // size > 2 else 2
            assert feedback.dropped == sums, "one-shot makes none of hierarchical's sums"
            all_reduce(
                partials[rank].float(), feedback=feedback, **{**call, "collective": "two-shot"}
            )
            all_reduce(partials[rank].float(), feedback=feedback, **call)
            assert feedback.dropped == sums + 1, "nor does hierarchical two-shot's"


@on_each_rank(4)
def test_two_levels_are_timed_where_nodes_are_known(rank):
    codec = get_codec()
    policy = make_policy(
        Settings("auto", node_size=2),
        group=dist.group.WORLD,
        kinds=[Kind(codec, codec.tables(HIDDEN), carries=True)],
        device=torch.device("cpu"),
        largest=4 << 10,
        scatters=False,
    )
    assert policy.times.candidates == ["one-shot", "two-shot", "hierarchical"]
    timed = {case.collective for case in policy.times.timings.times}
    assert timed == {"native", *policy.times.candidates}


def test_a_changed_shape_drops_the_carry_and_counts_it():
    chain = Chain()
    for place, tokens in enumerate((4, 4, 3, 3)):
        x = torch.zeros(tokens, HIDDEN)
        step = chain.step(place, x, HIDDEN, gives=place < 3, needs=False)
        assert (step.carry.taken is None) == (place in (0, 2))
        assert (step.carry.given is None) == (place == 3)
    assert chain.dropped == 1
    transposed = chain.step(1, torch.zeros(2, 2, HIDDEN), HIDDEN, gives=True, needs=False)
    assert transposed.carry.taken is None  # as many rows, in another order


def test_native_passes_by_a_chain_that_owes_it_nothing():
    chain, x = Chain(), torch.zeros(4, HIDDEN)
    call = {"gives": True, "needs": False}
    for _ in range(2):  # passes that are native throughout
        assert [chain.by_native(place) for place in range(3)] == [True] * 3
    assert chain.bytes() == 0
    first = chain.step(0, x, HIDDEN, **call)
    first.carry.given.fill_(1.0)
    assert not chain.by_native(1)  # it is owed the first one's carry
    assert chain.step(1, x, HIDDEN, **call).carry.taken is not None
    assert chain.by_native(0)  # another pass
    assert chain.by_native(1)  # what the pass before gave is not owed
    assert chain.step(2, x, HIDDEN, **call).carry.taken is None
    assert chain.dropped == 0


@on_each_rank(2)
def test_native_with_feedback(rank):
    """A native policy gives the same bits with feedback and without, and gives nothing on."""
    policy, feedback = Policy("native"), megatron_lowbit.ErrorFeedback()
    traffic, owed = Traffic(), torch.randn(5, HIDDEN).bfloat16()
    for _ in range(3):
        x = torch.randn(5, HIDDEN).bfloat16()
        plain = all_reduce(x.clone(), collective=policy, in_place=True)
        out = all_reduce(x, collective=policy, in_place=True, feedback=feedback, traffic=traffic)
        assert out is x and torch.equal(out, plain)
    assert traffic.total().calls == 3 and feedback._chain.bytes() == 0
    all_reduce(owed, feedback=feedback)
    x = torch.zeros(5, HIDDEN).bfloat16()
    out = all_reduce(x, collective=policy, in_place=True, feedback=feedback)
    assert out.any(), "the carry of the call before goes along"


@on_each_rank(3)
def test_native_after_two_shot(rank):
    """fp32 natively repairs all that two-shot missed, of the partials and of the sum."""
    ranks, feedback = dist.get_world_size(), megatron_lowbit.ErrorFeedback()
    first, second = (partials_at(step, (7,), ranks, torch.float32) for step in range(2))
    feedback.start()
    total = all_reduce(first[rank], collective="two-shot", feedback=feedback)
    after = all_reduce(second[rank], collective="native", feedback=feedback)
    exact = torch.stack(first).sum(dim=0) + torch.stack(second).sum(dim=0)
    missed = sqnr(torch.stack(first).sum(dim=0), total)
    # What is left is the rounding of carries to BF16: 20 dB of 4 bits and 54 dB of 9 bits.
    assert sqnr(exact, total + after) > missed + 40


def test_a_pass_that_stopped_leaves_nothing_behind():
    chain, x = Chain(), torch.zeros(4, HIDDEN)
    for place in range(3):
        chain.step(place, x, HIDDEN, gives=True, needs=False)
    assert chain.step(0, x, HIDDEN, gives=True, needs=False).carry.taken is None
    assert chain.step(2, x, HIDDEN, gives=True, needs=False).carry.taken is None
    assert chain.step(1, x, HIDDEN, gives=True, needs=False).carry.taken is not None


def test_a_layer_that_runs_again_takes_what_it_took():
    """As graph managers run a layer of two sync points before they capture it."""
    chain, x = Chain(), torch.zeros(4, HIDDEN)
    for place in range(4):
        step = chain.step(place, x, HIDDEN, gives=True, needs=False)
        step.carry.given.fill_(place)
    for _ in range(3):
        third = chain.step(2, x, HIDDEN, gives=True, needs=False)
        assert (third.carry.taken == 1).all()
        third.carry.given.fill_(2)
        fourth = chain.step(3, x, HIDDEN, gives=True, needs=False)
        assert (fourth.carry.taken == 2).all()
        fourth.carry.given.fill_(3)


def test_memory_does_not_grow_with_passes_of_random_lengths():
    chain, generator = Chain(), torch.Generator().manual_seed(1)
    most = 64
    lengths = torch.randint(1, most + 1, (10_000,), generator=generator).tolist()
    for tokens in lengths:
        x = torch.empty(tokens, HIDDEN)
        for place in range(4):
            step = chain.step(place, x, HIDDEN, gives=place < 3, needs=False)
            step.sums({"two-shot": transport.share(tokens, 3)})
    partial = 2 * most * HIDDEN
    assert chain.bytes() <= 3 * partial + 3 * 2 * transport.share(most, 3) * HIDDEN
    assert chain.bytes() <= 4.2 * partial  # four, but for the last rank's rounding up
    assert chain.dropped == 0
