"""Three real optimiser steps, to set beside what was predicted."""

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

STEPS = 3
"""Optimiser steps; the first warms up and is not timed."""


@dataclass(frozen=True)
class Measured:
    """What the steps took."""

    seconds: float
    """Of an optimiser step over one micro-batch, in the median."""
    peak: int
    """Bytes: the most that the process, or torch on a GPU, has held."""


def measure(module: Phi3LoRAModule, batch: Batch, make_trainer: Callable[..., pl.Trainer]) -> Measured:
    """Train on one micro-batch again and again, with the real weights; nothing is written.

    Args:
        module: Not yet loaded; its schedule has no warm-up, which may be longer than the steps.
        batch: The micro-batch.
        make_trainer: Makes a Trainer on the user's device and precision, with further options.

    Raises:
        ModelError: If the base cannot be loaded.
    """
    clock = _Clock()
    trainer = make_trainer(max_steps=STEPS, max_epochs=-1, callbacks=[clock])
    trainer.fit(module, DataLoader([batch] * STEPS, batch_size=None))  # type: ignore[arg-type]  # a list is a data set
    return Measured(median(clock.seconds[1:]), peak_memory(trainer.strategy.root_device))


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
