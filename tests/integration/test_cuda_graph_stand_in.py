"""That cuda_graph_stand_in.py is like a CUDA graph where the tests of engines need it to be."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from cuda_graph_stand_in import CUDAGraph, opaque, wait


@contextlib.contextmanager
def capturing():
    """`torch.cuda.graph` of a new graph, which it gives."""
    graph = CUDAGraph()
    graph.capture_begin()
    try:
        yield graph
    finally:
        graph.capture_end()


def test_a_replay_writes_new_values_into_the_old_memory():
    x = torch.arange(6.0).view(2, 3)
    with capturing() as graph:
        row = x[1]  # a view of an input
        out = torch.stack([row * 2, row.softmax(0)])
        part = out[0]  # and of a result
        part += 1
    place = out.data_ptr()
    for seed in range(2):
        x.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(out, torch.stack([x[1] * 2 + 1, x[1].softmax(0)]))
    assert out.data_ptr() == place
    assert graph.replays == 2


def test_a_capture_computes_nothing():
    x = torch.ones(3)
    with capturing() as graph:
        x += 1
        count = (x * 2).long()
    assert x.tolist() == [1, 1, 1]
    assert count.tolist() == [-1, -1, -1]
    for replays in (1, 2):
        graph.replay()
        assert x.tolist() == [1 + replays] * 3, "in place: once a replay"
    assert count.tolist() == [6, 6, 6]


def test_a_replay_runs_no_python_but_opaque_functions():
    calls = []

    def attend(x, *, scale):
        calls.append("opaque")
        return torch.full_like(x, x.max().item() * scale)

    attend, x = opaque(attend), torch.ones(2)
    with capturing() as graph:
        calls.append("model")
        out = attend(x, scale=3) + 1
    x += 1
    graph.replay()
    assert out.tolist() == [7, 7]
    assert calls == ["model", "opaque", "opaque"]


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0]),
        lambda x: torch.ops.aten.masked_select(x, x > 0),
    ],
)
def test_what_waits_for_the_host_is_refused(step):
    x = torch.ones(2)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), capturing():
        step(x)
    step(x)  # and only in a capture


def test_filling_by_a_mask_is_allowed():
    x = torch.tensor([1.0, -1.0])
    with capturing() as graph:
        x[x < 0] = 5
    graph.replay()
    assert x.tolist() == [1, 5]


def test_messages_are_sent_and_awaited_again(monkeypatch):
    monkeypatch.setattr(dist.Work, "wait", wait)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x = torch.ones(2)
        with capturing() as graph:
            work = dist.all_reduce(x, async_op=True)
            y = x + 1
            work.wait()
        assert len(graph.steps) == 3, "the sum, the addition, the wait"
        graph.replay()
        assert y.tolist() == [2, 2]
    finally:
        dist.destroy_process_group()
