"""The cost model's formulas: bytes on the wire, limits, order."""

from dataclasses import replace

import pytest

from megatron_lowbit.benchmark.prediction import cost_model
from megatron_lowbit.benchmark.prediction.cost_model import FORMULAS, Costs, Message
from megatron_lowbit.comm.transport import CHUNK_VALUES

BYTES = 4.1875 / 8
WIRE = Costs(
    latency=0.0,
    bandwidth=1e9,
    native_latency=0.0,
    native_bandwidth=1e9,
    encode=0.0,
    decode=0.0,
    turn=0.0,
)
SLOW = replace(
    WIRE,
    latency=1e-5,
    native_latency=1e-5,
    encode=1e-10,
    decode=1e-10,
    turn=1e-10,
    per_chunk=1e-6,
    per_transfer=1e-6,
)


def message(values: int, ranks: int) -> Message:
    return Message(values, ranks, BYTES, BYTES)


def speedup(collective: str, m: Message, costs: Costs) -> float:
    return cost_model.native(m, costs) / FORMULAS[collective](m, costs)


@pytest.mark.parametrize(("ranks", "all_gather"), [(2, 3.82), (4, 1.91), (8, 0.96), (16, 0.48)])
def test_without_latency_and_work_the_bytes_decide(ranks, all_gather):
    m = message(1 << 24, ranks)
    assert speedup("one-shot", m, WIRE) == pytest.approx(all_gather, abs=0.006)
    assert speedup("two-shot", m, WIRE) == pytest.approx(3.82, abs=0.006)


def test_bits_of_the_sum_count_in_two_shot_only():
    four, six = Message(1 << 20, 4, 0.5, 0.5), Message(1 << 20, 4, 0.5, 0.75)
    assert cost_model.one_shot(six, WIRE) == cost_model.one_shot(four, WIRE)
    ratio = cost_model.two_shot(six, WIRE) / cost_model.two_shot(four, WIRE)
    assert ratio == pytest.approx(1.25)


@pytest.mark.parametrize("collective", sorted(FORMULAS))
@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_more_values_take_longer(collective, ranks):
    sizes = [3 << n for n in range(8, 28)]
    times = [FORMULAS[collective](message(values, ranks), SLOW) for values in sizes]
    for values, less, more in zip(sizes, times, times[1:], strict=False):
        assert more > less, f"{collective}, {ranks} ranks: falls after {values} values"


def test_a_tiny_message_costs_its_latencies():
    m = message(1, 8)
    for collective, steps in (("native", 1), ("one-shot", 1), ("two-shot", 2)):
        assert FORMULAS[collective](m, SLOW) == pytest.approx(steps * 1e-5, rel=0.01)


def test_chunks_overlap_the_wire_with_the_work():
    ranks, chunks = 4, 8
    m = message(chunks * ranks * CHUNK_VALUES, ranks)
    send = cost_model.two_shot(m, WIRE)
    even = replace(WIRE, encode=send / m.values / (1 + 1 / ranks))
    assert cost_model.two_shot(m, even) == pytest.approx(send * (1 + 1 / chunks))


def test_each_further_transfer_costs():
    m = message(8 * 4 * CHUNK_VALUES, 4)
    slower = replace(WIRE, per_transfer=1e-3)
    # All of a chunk goes to every rank, or each gets its share of one that is four times as long.
    for collective, further in (("one-shot", 31), ("two-shot", 7 * 2)):
        more = FORMULAS[collective](m, slower) - FORMULAS[collective](m, WIRE)
        assert more == pytest.approx(further * 1e-3)


def test_two_levels_win_where_the_inside_is_fast():
    m, inside = message(1 << 24, 16), replace(WIRE, bandwidth=1e12)
    two_levels = cost_model.hierarchical(m, WIRE, node_size=8, inside=inside)
    assert two_levels < cost_model.two_shot(m, WIRE) / 6
    low = cost_model.hierarchical(m, WIRE, node_size=8, inside=inside, low_bit_inside=True)
    assert low < two_levels
    assert cost_model.hierarchical(m, WIRE, node_size=8, inside=WIRE) > cost_model.two_shot(m, WIRE)


def test_two_levels_send_what_the_table_says():
    m = message(1 << 24, 16)
    inside = replace(WIRE, bandwidth=1e30)
    got = cost_model.hierarchical(m, WIRE, node_size=8, inside=inside)
    assert got == pytest.approx(BYTES * m.values / 8 / WIRE.bandwidth)  # one-shot between two nodes
