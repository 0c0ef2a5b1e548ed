"""Tokens a second and peak memory."""

import resource
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

from phi3_lightning.batch import IGNORE_INDEX, Batch


class Throughput(pl.Callback):
    """Logs what each optimiser step processed in a second of training, loading included, validation and saving not.

    ``speed/tokens_per_second`` counts the tokens of documents and no padding, ``speed/supervised_tokens_per_second``
    those with a label, both over all ranks; ``memory/peak_gb`` is the most that this process has held, on the GPU
    where there is one.
    """

    def __init__(self) -> None:
        self._mark = 0.0
        self._tokens = 0
        self._supervised: list[torch.Tensor] = []

    def _restart(self) -> None:
        self._mark = time.perf_counter()
        self._tokens = 0
        self._supervised = []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart()  # a run that goes on within an epoch does not start it

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._tokens += sum(length for row in batch["lengths"] for length in row)
        self._supervised.append((batch["labels"] != IGNORE_INDEX).sum())

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        seconds = time.perf_counter() - self._mark
        supervised = torch.stack(self._supervised).sum()
        over_ranks: dict[str, Any] = {"sync_dist": True, "reduce_fx": "sum"}
        pl_module.log("speed/tokens_per_second", self._tokens / seconds, prog_bar=True, **over_ranks)
        pl_module.log("speed/supervised_tokens_per_second", supervised / seconds, **over_ranks)
        pl_module.log("memory/peak_gb", peak_memory(pl_module.device) / 1e9)
        self._restart()


def peak_memory(device: torch.device) -> int:
    """Return the most memory that this process has held so far, in bytes: on the GPU for a CUDA device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
