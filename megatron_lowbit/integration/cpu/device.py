"""Megatron on a machine without CUDA (process group backend: Gloo).

Megatron asks for CUDA in many small places: `torch.cuda.current_device()` in rotary embeddings and
buffers, `device="cuda"` literals, `.cuda()`, pinned memory, streams, events and nvtx ranges in the
inference engines. None of them is needed on a CPU, so `enable_cpu` gives each the answer a CPU
would give, and touches nothing where CUDA is present.

What stays as it is: `torch.cuda.is_available()` is False and `device_count()` is 0, so code that
looks first still takes its own CPU path.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_CURRENT = f"cuda:{_CPU}"  # what f"cuda:{torch.cuda.current_device()}" is here
_state: dict[str, Any] = {"mode": None}


class CpuStream:
    """Stand-in for `torch.cuda.Stream`: on a CPU everything is already in order."""

    device = _CPU
    cuda_stream = 0
    priority = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes and ignores what `torch.cuda.Stream` takes."""

    def __enter__(self) -> CpuStream:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        return None

    def synchronize(self, *awaited: Any, **kwargs: Any) -> None:
        """Nothing is outstanding."""

    wait_stream = wait_event = synchronize

    def query(self) -> bool:
        """All work is done."""
        return True

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        """Records `event`, or a new one."""
        event = CpuEvent() if event is None else event
        event.record(self)
        return event


class CpuEvent:
    """Stand-in for `torch.cuda.Event`: host time, always completed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Any = None) -> None:
        """Remembers the host time."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: CpuEvent) -> float:
        """Milliseconds between this event and `end`."""
        return (end._seconds - self._seconds) * 1e3

    def synchronize(self, *awaited: Any, **kwargs: Any) -> None:
        """Nothing is outstanding."""

    wait = synchronize

    def query(self) -> bool:
        """All work is done."""
        return True


def _is_cuda(device: Any) -> bool:
    """Whether a `device` argument names a CUDA device."""
    if type(device) is str:
        return device.startswith("cuda")
    if type(device) is torch.device:
        return device.type == "cuda"
    # A bare integer means "this CUDA device" to torch; a bool is never a device.
    return type(device) is int


class CudaAsCpu(TorchFunctionMode):
    """Sends what asks for a CUDA device to the CPU, and leaves every other call alone.

    Costs about a microsecond a torch call. Like every mode of torch it holds for the thread that
    entered it, so `_enter_in_threads` lets new threads enter it.
    """

    _MOVES = frozenset({torch.Tensor.to, torch.Tensor.type})
    _IDENTITY = frozenset({torch.Tensor.cuda, torch.Tensor.pin_memory})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Calls `func` with CUDA devices and pinned memory taken out of its arguments."""
        if func in self._IDENTITY:
            return args[0]
        if func is torch.device and args == (_CURRENT,):
            return _CPU
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func in self._MOVES and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **(kwargs or {}))


def _returns(value: Any) -> Callable[..., Any]:
    """A function of its own for every name: torch.compile refuses one object under two names."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return value

    return stand_in


def _host_memory(device: Any = None) -> tuple[int, int]:
    """Free and total memory of the host, in bytes."""
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def _properties(device: Any = None) -> SimpleNamespace:
    """What Megatron reads of a device: an architecture older than all it has a special case for."""
    return SimpleNamespace(
        name="cpu",
        major=0,
        minor=0,
        total_memory=_host_memory()[1],
        multi_processor_count=os.cpu_count() or 1,
    )


def _stand_ins() -> dict[str, Any]:
    """What replaces each name of `torch.cuda`."""
    nothing = "empty_cache reset_peak_memory_stats set_device set_stream synchronize".split()
    zero = "max_memory_allocated max_memory_reserved memory_allocated memory_reserved".split()
    return {
        **{name: _returns(None) for name in nothing},
        **{name: _returns(0) for name in zero},
        "Event": CpuEvent,
        "LongTensor": torch.LongTensor,
        "Stream": CpuStream,
        "current_device": _returns(_CPU),
        "current_stream": _returns(CpuStream()),
        "default_stream": _returns(CpuStream()),
        "get_device_capability": _returns((0, 0)),
        "get_device_properties": _properties,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "mem_get_info": _host_memory,
        "memory_stats": _returns(defaultdict(int)),  # every counter is 0
        "set_rng_state": lambda new_state, device=None: torch.set_rng_state(new_state),
        "stream": _returns(contextlib.nullcontext()),
    }


def _switch_compiler_off() -> None:
    from torch._dynamo import config

    config.disable = True


def _enter_in_threads() -> None:
    """Lets every thread that is started from now on run like this one: servers call models there.

    torch's modes and settings are a thread's own.
    """
    start = threading.Thread.start

    def start_in_mode(thread: threading.Thread) -> None:
        run = thread.run

        def run_in_mode() -> None:
            _switch_compiler_off()
            with CudaAsCpu():
                run()

        thread.run = run_in_mode
        start(thread)

    threading.Thread.start = start_in_mode  # type: ignore[assignment]  # its self is `thread`


def enable_cpu() -> bool:
    """Makes Megatron run on a machine without CUDA; does nothing where CUDA is present.

    Call it before megatron is imported. It holds for the thread that calls it and for all that are
    started later. A second call does nothing more. `torch.compile` is switched off as well:
    Megatron compiles small functions on their first call, which costs a C++ compiler and minutes,
    and gains nothing on a CPU.

    Returns:
        True if this machine has no CUDA and the stand-ins are in place, False if CUDA is present.
    """
    if torch.cuda.is_available():
        return False
    if _state["mode"] is not None:
        return True
    _switch_compiler_off()
    for name, stand_in in _stand_ins().items():
        setattr(torch.cuda, name, stand_in)
    # megatron.core calls the random functions through their own module.
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    # The C bindings and not the functions: Megatron imports `range_push` by value.
    bindings = "markA rangeEnd rangePop rangePushA rangeStartA".split()
    torch.cuda.nvtx._nvtx = SimpleNamespace(**{name: _returns(0) for name in bindings})
    mode = CudaAsCpu()
    mode.__enter__()  # for the life of the process
    _enter_in_threads()
    _state["mode"] = mode
    return True
