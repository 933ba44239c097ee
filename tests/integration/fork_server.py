"""Command lines in forked copies of one process that has imported Megatron; started by forks.py.

The import takes 7-9 s, and under torchrun each rank pays for it. Here each line on stdin is a
request (JSON): {"argv", "ranks", "env", "interrupt", "timeout", "directory"}. "argv" is a script or
"-m" and a module, and its arguments; "ranks" is null for a process that is no rank of anything;
"interrupt" is a piece of output after which rank 0 gets SIGINT. Each answer on stdout is
{"status", "out", "err"}, lists with one entry a rank.
"""

import atexit
import contextlib
import faulthandler
import gc
import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lowbit import cli
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.cpu.device import enable_cpu

PORT = 5  # characters of a port's number
GRACE = 30  # seconds that the others have after a rank that failed, as under torchrun


def preload() -> None:
    """Import what the scripts import, and nothing that they look at before they import it."""
    enable_cpu()
    torch.set_num_threads(1)
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.pipeline_parallel.schedules  # noqa: F401

    # An older release's core finds the newest one's megatron.training, and does not go with it.
    if not Path(megatron.core.__file__).parents[1].joinpath("training").is_dir():
        return
    from megatron_lowbit.integration.runtime import megatron_args

    # A checkout's may need packages that are not here: that is for the script to say, if it cares.
    with contextlib.suppress(LowbitError, ImportError):
        megatron_args.require_megatron_training()
        import megatron_script

        import megatron_lowbit.integration.loops.calibrate_checkpoint
        import megatron_lowbit.integration.loops.evaluate_checkpoint
        import megatron_lowbit.integration.runtime.launcher  # noqa: F401

        del sys.modules["megatron_script"], megatron_script


def variables(request: dict, rank: int, port: int) -> dict[str, str]:
    """The environment of a rank: what torchrun adds to the request's."""
    ranks = request["ranks"]
    if ranks is None:
        return request["env"]
    return request["env"] | {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks)),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        # The store is this process's, as it is torchrun's: no rank has to listen at a port that
        # was free a moment ago.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "none",
    }


def fork_rank(request: dict, rank: int, pipe: tuple[int, int], out: Path, err: Path) -> int:
    """Fork a rank, which reads the store's port from `pipe`; gives its process number."""
    process = os.fork()
    if process:
        return process
    leave, status = os._exit, 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
        faulthandler.enable()  # for the SIGABRT of one that takes too long
        os.close(pipe[1])  # so that it ends if this process does
        port = int(os.read(pipe[0], PORT)) if request["ranks"] else 0
        os.close(pipe[0])
        os.environ.clear()
        os.environ.update(variables(request, rank, port))
        cli.RANK = int(os.environ.get("RANK", "0"))
        run(request["argv"])
        status = 0
    except SystemExit as end:
        status = end.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
    finally:  # as the interpreter ends
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        leave(status)


def run(argv: list[str]) -> None:
    """A script or a module, as Python runs it."""
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        runpy.run_path(argv[0], run_name="__main__")


def answer(request: dict) -> dict:
    """Run all ranks of a command line."""
    ranks, directory = range(request["ranks"] or 1), Path(request["directory"])
    outs, errs = ([directory / f"{kind}{rank}" for rank in ranks] for kind in ("out", "err"))
    pipe = os.pipe()
    processes = [fork_rank(request, r, pipe, outs[r], errs[r]) for r in ranks]
    if request["ranks"]:
        # Later than the forks: its thread looks up who connects, and a rank forked meanwhile would
        # wait for ever in a lookup of its own, whose lock nobody there lets go.
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        os.write(pipe[1], f"{store.port:{PORT}}".encode() * len(ranks))
    for end in pipe:
        os.close(end)
    deadline, status = time.monotonic() + request["timeout"], [None] * len(processes)
    waiting_for = request["interrupt"]
    while None in status:
        if waiting_for and outs[0].exists() and waiting_for in outs[0].read_text():
            os.kill(processes[0], signal.SIGINT)
            waiting_for = None
        for rank, process in enumerate(processes):
            if status[rank] is not None:
                continue
            if time.monotonic() > deadline:
                os.kill(process, signal.SIGABRT)
            ended, code = os.waitpid(process, os.WNOHANG)
            if ended:
                status[rank] = os.waitstatus_to_exitcode(code)
                if status[rank]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        time.sleep(0.02)
    read = {"out": [p.read_text() for p in outs], "err": [p.read_text() for p in errs]}
    return {"status": status, **read}


def main() -> None:
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what an import says is no answer
        preload()
        gc.collect()
        gc.freeze()  # a rank's collections would take half a second each, and copy all pages
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
