"""Tokens per second, padding, MFU and peak memory."""

import time
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from phi3_lightning.batch import IGNORE_INDEX, Batch
from phi3_lightning.hardware import peak_flops, peak_memory
from phi3_lightning.model.flops import StepFlops, step_flops
from phi3_lightning.model.packed_attention import shared_lengths
from phi3_lightning.module import Phi3LoRAModule


class Throughput(pl.Callback):
    """Logs the speed of each optimiser step, including data loading, without validation and saving.

    ``speed/tokens_per_second`` counts the tokens of documents without padding, ``speed/supervised_tokens_per_second``
    those with a label, both over all ranks; tokens that a kernel computes once for a pair count for both its documents.
    ``speed/padding_fraction`` is the fraction of padding in the batches, and ``speed/packing_efficiency`` the fraction
    of ``row_length`` that the average row uses. ``speed/mfu`` is the model FLOPs utilisation (Chowdhery et al. 2022,
    https://arxiv.org/abs/2204.02311): the FLOPs that the step needed, by
    :func:`~phi3_lightning.model.flops.step_flops`, over those that the devices could do in its time.
    ``memory/peak_gb`` is the most memory that this process has held, on the GPU where there is one.

    Args:
        row_length: The most tokens of a packed row; one of pairs holds twice as many. None: rows are not packed.
    """

    def __init__(self, row_length: int | None = None) -> None:
        self.row_length = row_length
        self._flops: StepFlops | None = None
        self._peak: float | None = None
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._tokens = 0
        self._shared = 0
        self._positions = 0
        self._rows = 0
        self._supervised: list[Tensor] = []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, Phi3LoRAModule):
            with trainer.precision_plugin.train_step_context(), pl_module.autocast():
                device = pl_module.device.type
                mixed = torch.is_autocast_enabled(device)
                dtype = torch.get_autocast_dtype(device) if mixed else pl_module.loaded_model.dtype
            self._flops = step_flops(pl_module.loaded_model, pl_module.objective.extra_forward_passes)
            self._peak = peak_flops(pl_module.device, dtype)
            if self._peak is not None:
                rank_zero_info(f"{device}: {self._peak / 1e12:.3g} TFLOP/s in {str(dtype).removeprefix('torch.')}")
        self._restart()  # a run that is resumed within an epoch has no on_train_epoch_start

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
        self._tokens += sum(length for row in batch["document_lengths"] for length in row)
        if isinstance(pl_module, Phi3LoRAModule):
            self._shared += sum(map(sum, shared_lengths(pl_module.loaded_model, batch) or []))
        self._positions += batch["input_ids"].numel()
        self._rows += len(batch["document_lengths"]) * (2 if "shared_lengths" in batch else 1)
        self._supervised.append((batch["labels"] != IGNORE_INDEX).sum())

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        seconds = time.perf_counter() - self._start
        for name, value in self._metrics(trainer, seconds).items():
            pl_module.log(name, value, prog_bar=name == "speed/tokens_per_second")
        pl_module.log("memory/peak_gb", peak_memory(pl_module.device) / 1e9)
        self._restart()

    def _metrics(self, trainer: pl.Trainer, seconds: float) -> dict[str, Tensor]:
        supervised = torch.stack(self._supervised).sum().float()
        counts = supervised.new_tensor([self._tokens, self._shared, self._positions, self._rows])
        own = torch.cat([counts, counts[:2] / seconds, (supervised / seconds)[None]])
        reduced = cast("Tensor", trainer.strategy.reduce(own, reduce_op="sum"))
        tokens, _, positions, rows, speed, shared_speed, supervised_speed = reduced
        metrics = {
            "speed/tokens_per_second": speed,
            "speed/supervised_tokens_per_second": supervised_speed,
            "speed/padding_fraction": 1 - tokens / positions,
        }
        if self.row_length is not None:
            metrics["speed/packing_efficiency"] = tokens / (rows * self.row_length)
        if self._flops is not None and self._peak is not None:
            needed = self._flops.per_token * (speed - shared_speed)
            needed += self._flops.per_supervised_token * supervised_speed
            metrics["speed/mfu"] = needed / (self._peak * trainer.world_size)
        return metrics
