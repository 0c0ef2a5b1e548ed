"""Runs a function on several ranks: processes forked from this one, with its imports, connected by gloo."""

import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass
class Rank:
    """One process."""

    pid: int
    output: Path
    status: int | None = None

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def kill(self, with_signal: int = signal.SIGKILL) -> None:
        if self.poll() is None:
            os.kill(self.pid, with_signal)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folder: Path, world: int, function: Callable[..., Any], *args: Any) -> list[Rank]:
    """Start ``function(*args)`` on each rank; its results are stored in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
    environment["WORLD_SIZE"] = str(world)
    sys.stdout.flush()
    sys.stderr.flush()
    ranks = []
    for rank in range(world):
        output = folder / f"rank-{rank}.txt"
        pid = os.fork()
        if pid == 0:
            # as Lightning's own launcher sets it
            os.environ |= environment | {"LOCAL_RANK": str(rank)}
            _run(folder / f"rank-{rank}.pickle", output, function, args)
        ranks.append(Rank(pid, output))
    return ranks


def _run(result: Path, output: Path, function: Callable[..., Any], args: tuple) -> None:
    code = 1
    try:
        sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        torch.set_num_threads(1)
        result.write_bytes(pickle.dumps(function(*args)))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        print(type(end).__name__)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(ranks: list[Rank], seconds: float = 60) -> None:
    """Wait until all ranks have ended; none is left behind."""
    end = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
        time.sleep(0.01)
    late = [number for number, rank in enumerate(ranks) if rank.poll() is None]
    for rank in ranks:
        rank.kill()
    texts = "\n".join(f"--- rank {number}\n{rank.text}" for number, rank in enumerate(ranks))
    assert not late, f"ranks {late} have not ended after {seconds} s\n{texts}"


def run(folder: Path, world: int, function: Callable[..., Any], *args: Any, seconds: float = 60) -> list[Any]:
    """Return what ``function(*args)`` returns on each rank."""
    ranks = start(folder, world, function, *args)
    wait(ranks, seconds)
    texts = "\n".join(f"--- rank {number}\n{rank.text}" for number, rank in enumerate(ranks))
    assert [rank.status for rank in ranks] == [0] * world, texts
    return [pickle.loads((folder / f"rank-{number}.pickle").read_bytes()) for number in range(world)]
