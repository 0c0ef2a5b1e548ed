"""Three real optimiser steps, for comparison with the prediction."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from phi3_lightning.batch import Batch
from phi3_lightning.hardware import peak_memory
from phi3_lightning.module import Phi3LoRAModule

MEASURED_STEPS = 3
"""Optimiser steps; the first warms up and is not timed."""


@dataclass(frozen=True)
class Measurement:
    """Time and memory of the steps."""

    seconds: float
    """Median of an optimiser step over one micro-batch."""
    peak: int
    """Bytes at the peak, of the process, or of torch on a GPU."""


def measure(module: Phi3LoRAModule, batch: Batch, make_trainer: Callable[..., pl.Trainer]) -> Measurement:
    """Train a module, which is not loaded yet, on one micro-batch repeatedly; nothing is written.

    The schedule must have no warm-up, which may be longer than the steps.
    """
    clock = _Clock()
    trainer = make_trainer(max_steps=MEASURED_STEPS, max_epochs=-1, callbacks=[clock])
    trainer.fit(module, DataLoader([batch] * MEASURED_STEPS, batch_size=None))  # type: ignore[arg-type]  # a list is a data set
    return Measurement(median(clock.seconds[1:]), peak_memory(trainer.strategy.root_device))


class _Clock(pl.Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._start = _now(trainer)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seconds.append(_now(trainer) - self._start)


def _now(trainer: pl.Trainer) -> float:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
