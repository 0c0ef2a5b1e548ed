"""Programs that tests start as users do, and the run that those which were cut short have to end like."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from cli.conftest import QUICK, REPOSITORY
from phi3_lightning.checkpoint.io import read_checkpoint

TWO = (*QUICK, "--trainer.accelerator=cpu", "--trainer.devices=2", "--data.cache_dir=cache", "--run=bot")
LAST = Path("runs/bot/checkpoints/last.ckpt")
STEPS = 20
LENGTH = (f"--trainer.max_steps={STEPS}", "--trainer.limit_val_batches=0")


@contextmanager
def running(folder: Path, *command: str, **environment: str) -> Iterator[tuple[subprocess.Popen, Callable[[], str]]]:
    """A program in a process group of its own, of which nothing is left afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"output-{time.monotonic_ns()}.txt"
    settings = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(REPOSITORY / "src")}
    with output.open("w") as sink:
        program = subprocess.Popen(
            command, cwd=folder, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | settings | environment,
        )  # fmt: skip
    family = psutil.Process(program.pid)
    members: list[psutil.Process] = []
    try:
        yield program, lambda: output.read_text(errors="replace")
    finally:
        if program.poll() is None:
            members = family.children(recursive=True)
        for process in [*members, *([family] if program.poll() is None else [])]:
            process.kill()
        program.wait()


def finished(folder: Path, *command: str, code: int = 0, seconds: float = 200, **environment: str) -> str:
    with running(folder, *command, **environment) as (program, text):
        try:
            found = program.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done after {seconds} s:\n{text()}") from None
        assert found == code, text()
        return text()


def wait_for(condition: Callable[[], bool], text: Callable[[], str], seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, text()
        time.sleep(0.02)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / LAST)["state_dict"]


def same(left: Path, right: Path) -> bool:
    mine, theirs = weights(left), weights(right)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
