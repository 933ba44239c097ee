"""What a CUDA graph captures of a collective: nothing that the host has to wait for.

There is no GPU here, so tensors are of the device "meta": every operation runs through torch's
rules of shapes and devices, but no values exist, and what needs a value on the host (`item`,
`nonzero`, a boolean mask as an index) is an error. Copies between devices are recorded: from
memory of the host that is not pinned they cannot be captured.
"""

import pytest
import torch
import torch.distributed as dist
from cases import CODECS, sample, tables_for
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_lowbit.codecs import get_codec
from megatron_lowbit.comm import all_gather, all_reduce, reduce_scatter
from megatron_lowbit.comm.traffic import Clock, Counters, Decision, Traffic

RANKS, TOKENS, HIDDEN = 4, 24, 128
COLLECTIVES = ["one-shot", "two-shot", "reduce-scatter", "all-gather", "native"]


class Copies(TorchDispatchMode):
    """Names the operations whose tensors are not all on one device."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        # What has no dimension may be the host's: it becomes an argument of the kernel.
        if len({x.device.type for x in tensors if x.ndim}) > 1:
            self.found.append(str(func))
        return out


class Literals(TorchFunctionMode):
    """Names the calls that make a tensor of Python's numbers."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Event:
    """A `torch.cuda.Event` on a GPU that is late: it has never passed before someone waits."""

    is_capturing = False

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        """Nothing is outstanding that anyone looks at."""

    def query(self) -> bool:
        assert not self.is_capturing, "operation not permitted when stream is capturing"
        return False

    def synchronize(self) -> None:
        assert not self.is_capturing, "operation not permitted when stream is capturing"

    def elapsed_time(self, end: "Event") -> float:
        return 1000.0


@pytest.fixture(scope="module")
def group():
    """A group of ranks that sends nothing, of a backend that gathers (as NCCL does)."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=RANKS)
    yield dist.group.WORLD
    dist.destroy_process_group()


def _send(collective: str, x: torch.Tensor, **call) -> torch.Tensor:
    if collective == "reduce-scatter":
        return reduce_scatter(x, **call)
    if collective == "all-gather":
        return all_gather(x, **call)
    return all_reduce(x, collective=collective, in_place=True, **call)


def _recorded(step) -> list[str]:
    with Literals() as literals, Copies() as copies, torch.inference_mode():
        step()
    return literals.found + copies.found


# The first call copies a codec's constants to the device: Megatron warms up before it captures, and
# apply() refuses a model that does not.
@pytest.mark.parametrize(("name", "bits"), CODECS)
def test_nothing_waits_for_the_host_after_the_first_call(group, monkeypatch, name, bits):
    monkeypatch.setattr("megatron_lowbit.comm.call._check_input", lambda x: None)  # refuses meta
    codec = get_codec(name, bits=bits)
    partials = [sample("normal", (TOKENS, HIDDEN), rank) for rank in range(RANKS)]
    tables, traffic = tables_for(codec, partials, 2).to("meta"), Traffic()
    x = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, device="meta")
    call = {"group": group, "codec": codec, "tables": tables, "traffic": traffic}
    for collective in COLLECTIVES:
        _send(collective, x, **call)
        assert _recorded(lambda collective=collective: _send(collective, x, **call)) == []
    assert traffic.total().calls == 2 * len(COLLECTIVES)


def test_what_would_wait_is_found():
    """That the test above can fail."""
    x = torch.empty(3, device="meta")
    assert "tensor" in _recorded(lambda: torch.tensor([1.0, 2.0], device="meta"))
    assert _recorded(lambda: torch.ones(3).to("meta"))
    for wait in (lambda: x.sum().item(), lambda: x[x > 0], x.nonzero, lambda: x.tolist()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            _recorded(wait)


def test_calls_in_a_graph_are_counted_apart(monkeypatch):
    """No one sees a graph replay, so what is counted is the capture, and says so."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    traffic = Traffic()
    for device in ("cuda", "cpu"):
        traffic.add(
            Decision("one-shot", "fixed"), Counters(calls=1), Clock(torch.device(device)).stop()
        )
    reasons = [decision.why for decision in traffic.by_decision]
    assert reasons == ["fixed, in a CUDA graph: replays are not counted", "fixed"]
    assert traffic.by_decision[Decision("one-shot", reasons[0])].seconds == 0


def test_no_event_is_asked_in_a_capture(monkeypatch):
    """Those of the warm-up are open when a graph is captured; CUDA ends a capture that asks."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Event.is_capturing)
    traffic, counters = Traffic(), Counters(calls=1)
    for Event.is_capturing in (False, False, True, False):
        clock = Clock(torch.device("cuda"))
        traffic.add(Decision("one-shot", "fixed"), counters, clock.stop())
    eager, captured = traffic.by_decision.values()
    assert (eager.calls, eager.seconds) == (3, 3.0)
    assert (captured.calls, captured.seconds) == (1, 0)
