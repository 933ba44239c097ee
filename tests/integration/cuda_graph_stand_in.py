"""A stand-in for CUDA graphs on a CPU, faithful enough for Megatron's own graph managers.

Between `capture_begin` and `capture_end` it records each operation that reaches torch's dispatcher
(aten's and c10d's), each wait for a message, and each call of a function that is `opaque`. `replay`
runs them again on the same tensors and writes to the same memory; no Python of the model runs. As
on a GPU,

- what makes the host wait for the device, or makes a tensor of Python's numbers, raises;
- a capture computes nothing: in the end memory that was there before has its values back, and what
  was made meanwhile is filled with ones (NaN, -1), so that only a replay gives values;
- a replay sees new values in the old tensors, and nothing else that has changed.

What it cannot show: streams and their order, the memory pool that graphs share (here nothing is
ever used again), whether a tensor is the host's, random numbers, Triton and NCCL, and C code behind
ctypes, which no dispatcher sees: switch the codecs' own off (`kernels.switches.disabled`).
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from megatron_lowbit.integration.cpu.device import CpuEvent, CpuStream

# What waits for the device, by the dispatcher's names.
_WAITING = frozenset(
    "_local_scalar_dense _unique2 allclose equal is_nonzero item masked_select nonzero".split()
)
# And what on a CPU never reaches it, by Python's: readers, and what would copy from the host.
_UNSEEN = frozenset({"as_tensor", "cpu", "from_numpy", "numpy", "tensor", "tolist"})
_wait = dist.Work.wait
_under_way: list["CUDAGraph"] = []


class CUDAGraph:
    """Stand-in for `torch.cuda.CUDAGraph`.

    Attributes:
        steps: What a replay does, in order.
        replays: How often it was replayed.
        sent_bytes: What its replays sent by ``c10d::send``.
    """

    captured: list["CUDAGraph"] = []  # all of this process

    def __init__(self) -> None:
        self.steps: list[Callable[[], Any]] = []
        self.replays = self.sent_bytes = 0
        self._works: dict[dist.Work, list[dist.Work]] = {}  # what a replay has under way, by ours
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._made: dict[int, torch.UntypedStorage] = {}
        self._modes = contextlib.ExitStack()

    def register_generator_state(self, generator: Any) -> None:
        """Random numbers are not recorded."""

    def capture_begin(self, *pool: Any, **options: Any) -> None:
        """Record what this thread does from now on."""
        _under_way.append(self)
        self._modes.enter_context(_Refuse())
        self._modes.enter_context(_Record())

    def capture_end(self) -> None:
        """Stop recording, and take back what was computed meanwhile."""
        self._modes.close()
        _under_way.remove(self)
        for storage, values in self._before.values():
            storage.copy_(values)
        for storage in self._made.values():
            storage.fill_(0xFF)
        self.captured.append(self)

    @torch.inference_mode()
    def replay(self) -> None:
        """Run the steps."""
        self.replays += 1
        for step in self.steps:
            step()

    def operation(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run and record what the dispatcher was asked for."""
        name = func._schema.name
        if name.removeprefix("aten::") in _WAITING or _counts_a_mask(name, args):
            raise _not_permitted(name)
        is_message = name.startswith("c10d::")
        written = _tensors(args) if is_message else _written(func, args, kwargs)
        for tensor in written:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in {*self._made, *self._before}:
                self._before[storage.data_ptr()] = storage, storage.clone()
        out = func(*args, **kwargs)
        if is_message:
            self._record_message(func, args, out)
        else:
            self.record(
                functools.partial(func, *args, **kwargs), (args, kwargs), out, bool(written)
            )
        return out

    def record(self, call: Callable, inputs: Any, out: Any, writes: bool) -> None:
        """Record a call that gave `out`: what of it is not an input's memory is new."""
        known = {x.untyped_storage().data_ptr() for x in _tensors(inputs)}
        tensors = _tensors(out)
        new = [n for n, x in enumerate(tensors) if x.untyped_storage().data_ptr() not in known]
        for n in new:
            storage = tensors[n].untyped_storage()
            self._made[storage.data_ptr()] = storage

        def step() -> None:
            again = _tensors(call())
            for n in new:
                tensors[n].copy_(again[n])

        if new or writes:  # else a view
            self.steps.append(step)

    def wait(self, work: dist.Work) -> None:
        """Record a wait for a message of this capture."""
        if work in self._works:
            self.steps.append(lambda: _wait(self._works[work].pop()))

    def _record_message(self, func: Any, args: tuple, out: Any) -> None:
        running: list[dist.Work] = []
        self._works[_work_of(out)] = running
        size = sum(x.nbytes for x in _tensors(args)) if func._schema.name == "c10d::send" else 0

        def step() -> None:
            running.append(_work_of(func(*args)))
            self.sent_bytes += size

        self.steps.append(step)


class _Record(TorchDispatchMode):
    """Hands the graph every operation."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _under_way[0].operation(func, args, kwargs or {})


class _Refuse(TorchFunctionMode):
    """Refuses what is `_UNSEEN`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in _UNSEEN:
            raise _not_permitted(func.__name__)
        return func(*args, **(kwargs or {}))


def opaque(function: Callable) -> Callable:
    """`function` as one step of a graph, whatever it does inside.

    Args:
        function: Writes into none of its arguments, and returns new tensors or None.
    """

    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        if not _under_way:
            return function(*args, **kwargs)
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            out = function(*args, **kwargs)
        call = functools.partial(function, *args, **kwargs)
        _under_way[0].record(call, (args, kwargs), out, writes=False)
        return out

    return recorded


def wait(work: dist.Work, *timeout: Any) -> bool:
    """Stand-in for `dist.Work.wait`, which the dispatcher does not see either."""
    if _under_way:
        _under_way[0].wait(work)
    return _wait(work, *timeout)


def install(patch: pytest.MonkeyPatch) -> None:
    """Put all of it in place, after `enable_cpu`."""
    patch.setattr(dist.Work, "wait", wait)
    patch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(_under_way))
    patch.setattr(torch.cuda, "memory_snapshot", list)
    # torch.cuda.graph calls it.
    patch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    for owner in (torch.cuda, CpuEvent, CpuStream):
        for name in {"query", "synchronize"} & set(vars(owner)):
            patch.setattr(owner, name, not_in_a_capture(getattr(owner, name)))


def not_in_a_capture(function: Callable) -> Callable:
    """`function`, which raises while a graph is captured."""

    @functools.wraps(function)
    def checked(*args: Any) -> Any:
        if _under_way:
            raise _not_permitted(function.__qualname__)
        return function(*args)

    return checked


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that an operation writes to, as its schema says."""
    names = {a.name: a.is_write for a in func._schema.arguments}
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return _tensors([value for name, value in given.items() if names[name]])


def _counts_a_mask(name: str, args: tuple) -> bool:
    """Whether it indexes by a mask, unless to fill with one value."""
    is_put = name in ("aten::index_put", "aten::index_put_")
    if name != "aten::index" and not (is_put and args[2].numel() > 1):
        return False
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])


def _work_of(out: Any) -> dist.Work:
    (work,) = (x for x in tree_leaves(out) if isinstance(x, torch.ScriptObject))
    return dist.Work.unbox(work)


def _not_permitted(what: str) -> RuntimeError:
    return RuntimeError(f"operation not permitted when stream is capturing: {what}")
