"""A process for each runner, which orders go to."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from contenders import ENVIRONMENT, environments
from contenders.catalogue import Contender
from contenders.task import Task

HERE = Path(__file__).parents[1]


class Servers:
    """A process for each runner, which has imported its library and forks for each run.

    Args:
        peers: Where the peers' environments are kept.
        cuda: Whether they need what a GPU does.
        logs: Folder for what contenders print.
    """

    def __init__(self, peers: Path, cuda: bool, logs: Path) -> None:
        self.pythons: dict[str | None, Path] = {None: Path(sys.executable)}
        self._peers, self._cuda, self._logs = peers, cuda, logs
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._failed: dict[str, str] = {}

    def order(self, contender: Contender, task: Task) -> dict[str, Any]:
        """Run a contender; return what its process wrote, or the error that stopped it."""
        if contender.runner in self._failed:
            return {"error": self._failed[contender.runner]}
        try:
            server = self._server(contender)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            self._failed[contender.runner] = str(error)
            return {"error": str(error)}
        result, log = Path(task.out) / "result.json", self._logs / f"{contender.name}.log"
        order = {"task": dataclasses.asdict(task), "options": contender.options, "result": str(result), "log": str(log)}
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        reply = server.stdout.readline()
        if not reply:  # it ended itself, and a new one starts with the next order
            del self._running[contender.runner]
            server.communicate()
            return {"error": f"its process ended with status {server.returncode}"}
        status = int(reply)
        if not result.is_file():
            ended = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            return {"error": ended}
        return json.loads(result.read_text())

    def _server(self, contender: Contender) -> "subprocess.Popen[str]":
        runner, environment = contender.runner, contender.environment
        if environment not in self.pythons:
            self.pythons[environment] = environments.make(environment, self._peers, self._cuda)
        if runner not in self._running:
            log = self._logs / f"{runner}.imports.log"
            quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path()}
            quiet["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # looking for a GPU must not keep forks from using it
            with log.open("w") as errors:
                server = subprocess.Popen(
                    [self.pythons[environment], "-m", "contenders.worker", runner], env=ENVIRONMENT | quiet, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                )  # fmt: skip
            if server.stdout.readline() != "ready\n":
                server.communicate()
                raise RuntimeError(f"import: {log.read_text().strip().splitlines()[-1]}")
            self._running[runner] = server
        return self._running[runner]

    def close(self) -> None:
        """Let all processes end."""
        for server in self._running.values():
            server.communicate()  # closes its input, which ends it


def python_path() -> str:
    return os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
