"""A process that has imported one library, and forks for each run, so that starting up is paid once.

Reads orders as JSON lines from its standard input: ``{"task", "options", "result", "log"}``. The child writes what it
measured to the file ``result`` and all it prints to ``log``; a line goes back when it is over.
"""

import importlib
import json
import os
import sys
import traceback
from dataclasses import asdict
from typing import Any

from contenders.clock import Clock
from contenders.task import Task


def work(run: Any, order: dict[str, Any]) -> None:
    """Do one run in this process, and write down what it measured or why it failed."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    task = Task(**order["task"])
    clock = Clock(task)
    try:
        run(task, order["options"], clock)
        if len(clock.steps) < task.steps:
            raise RuntimeError(f"it took {len(clock.steps)} optimiser steps of {task.steps}")
        found = {"steps": [asdict(step) for step in clock.timed()], "peak_bytes": clock.peak_bytes}
    except BaseException as error:  # whatever a peer raises is its result
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    with open(order["result"], "w") as file:  # noqa: PTH123
        json.dump(found, file)


def serve(runner: str) -> None:
    """Import a runner, say so, and take orders until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    run = importlib.import_module(f"contenders.{runner}").run
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            work(run, json.loads(line))
            sys.stdout.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=replies, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
