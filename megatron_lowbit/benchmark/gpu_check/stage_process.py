"""A process of a stage: it does the stage's work and writes each row as soon as it has it.

    python -m megatron_lowbit.benchmark.gpu_check.stage_process MODULE FUNCTION ROWS TASK

ROWS is the file for the rows, a line of JSON each, TASK the JSON of a `Task`. The last line says
how it ended: ``ended``, ``skipped`` or ``error``; a process that a signal ends writes none.
"""

import json
import os
import sys
import threading
import time
import traceback
from importlib import import_module

from megatron_lowbit.benchmark.gpu_check.stage_tasks import Row, Skip, Task, words

_LOOK = 0.5  # seconds between looks for the parent


def end_with_parent() -> None:
    """End this process soon after the one that started it: nobody else would end a stage."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(module: str, function: str, path: str, task: str) -> None:
    """Do the work and leave without exit handlers: those of a broken GPU could hang."""
    with open(path, "a", encoding="utf-8") as file:

        def put(row: Row) -> None:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()

        try:
            for row in getattr(import_module(module), function)(Task(**json.loads(task))):
                put(row)
            put({"ended": True})
        except Skip as skip:
            put({"skipped": str(skip)})
        except BaseException as error:  # whatever torch, Triton or the driver raise
            traceback.print_exc()
            put({"error": words(error)})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    end_with_parent()
    main(*sys.argv[1:])
