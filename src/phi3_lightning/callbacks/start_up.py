"""What passes between the command and the first batch."""

import os
import time
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override


class StartUp(pl.Callback):
    """Says in a line how many seconds it took until the first batch was trained, and with what.

    They count from the start of the process where the system tells that (Linux), else from this callback's making.
    """

    def __init__(self) -> None:
        self._marks = [("", time.perf_counter() - process_age()), ("imports and configuration", time.perf_counter())]
        self._told = False

    def _mark(self, what: str) -> None:
        self._marks.append((what, time.perf_counter()))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._mark("tokenising")

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark("data and model")

    @override
    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark("validation")

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if not self._told:
            self._mark("a trial of the largest batch")

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if self._told:
            return
        self._told = True
        self._mark("the first batch")
        times = [moment for _, moment in self._marks]
        parts = [
            f"{end - start:.1f} s {what}"
            for start, (what, end) in zip(times, self._marks[1:], strict=False)
            if end - start >= 0.05  # which is rounded to nothing below
        ]
        rank_zero_info(f"trained the first batch {times[-1] - times[0]:.1f} s after the start: {', '.join(parts)}")


def process_age() -> float:
    """Return the seconds since this process began; 0 where the system does not tell."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return 0.0
    ticks = float(stat.read_text().rpartition(")")[2].split()[19])  # from the system's start to that of the process
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
