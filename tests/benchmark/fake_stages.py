"""Works of stages that end in every way, for `test_gpu_check`: functions that take a task."""

import os
import signal
import sys
import time

from megatron_lowbit.benchmark.gpu_check.stage_tasks import Skip
from megatron_lowbit.errors import LowbitError


def machine(task):
    yield {"device": "a GPU", "driver": "1"}


def no_gpu(task):
    raise LowbitError("torch sees no GPU")
    yield


def fine(task):
    for case in task.mine(["a", "b", "c", "d"]):
        yield {"case": case, "part": task.part}


def wrong(task):
    yield {"case": "a"}
    yield {"case": "b", "error": "other bits"}
    yield {"case": "c", "error": "others again"}


def raises(task):
    yield {"case": "a"}
    raise RuntimeError("CUDA error:\nan illegal memory access")


def hangs(task):
    yield {"case": "a"}
    print("it hangs", flush=True)
    time.sleep(600)


def dies(task):
    yield {"case": "a"}
    if task.part == task.parts - 1:
        print("what it said last", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    yield {"case": "b"}


def killed(task):
    """As by a system that is out of memory."""
    yield {"case": "a"}
    os.kill(os.getpid(), signal.SIGKILL)


def leaves(task):
    yield {"case": "a"}
    os._exit(3)


def exits(task):
    yield {"case": "a"}
    sys.exit(4)


def skips(task):
    yield {"case": "a"}
    raise Skip("no file")


def starts_another(task):
    """A process of its own that would outlive it."""
    child = os.fork()
    if child == 0:
        time.sleep(600)
    yield {"child": child}
    time.sleep(600)
