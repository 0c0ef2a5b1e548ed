"""The settings that are ``auto``, decided by the memory of the device."""

from typing import cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from phi3_lightning.contracts import PlannedData, data_module
from phi3_lightning.errors import ConfigError
from phi3_lightning.hardware import device_memory
from phi3_lightning.model.activation_checkpointing import CheckpointingMode, checkpoint_activations
from phi3_lightning.module import Phi3LoRAModule
from phi3_lightning.planning.auto import (
    PLANNED_SHARE_OF_MEMORY,
    fastest_mode,
    rows_that_fit,
    share_step,
    tokens_that_validate,
)
from phi3_lightning.planning.memory import MemoryPredictor
from phi3_lightning.planning.step import BatchShape


class AutoCheckpointing(pl.Callback):
    """Decides ``model.gradient_checkpointing: auto``: the fastest mode with which the largest training batch fits.

    The limit is 85% of the memory that is free when a fit begins, on the rank with the least. Without this callback,
    and where the batches are not known before training, ``auto`` is ``full``.
    """

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, Phi3LoRAModule) or pl_module.gradient_checkpointing != "auto":
            return
        data = data_module(trainer)
        largest = data.largest_train_batch() if isinstance(data, PlannedData) else None
        mode: CheckpointingMode | int = "full"
        why = "the largest batch is not known before training"
        if largest is not None:
            limit = PLANNED_SHARE_OF_MEMORY * _memory(trainer)[0]
            mode, why = fastest_mode(MemoryPredictor(pl_module.spec()), BatchShape.of(largest), limit)
            why += "; plan lists what helps" if why.endswith("may not fit") else ""
        checkpoint_activations(pl_module.loaded_model, mode)
        rank_zero_info(f"model.gradient_checkpointing: auto is {mode}: {why}")


class AutoBatchSize(pl.Callback):
    """Decides ``data.max_tokens_per_batch: auto``: as many of the largest rows as fit into memory.

    The Trainer's ``accumulate_grad_batches`` changes, so that an optimiser step keeps its ``batch_size`` x
    ``accumulate_grad_batches`` rows. The limit is 85% of the device's total memory, on the rank with the least, and not
    of the free memory: a run that is resumed gets the same batches.

    On a GPU the micro-batches of validation are larger, as nothing is kept for a backward pass. They are those of
    training where ``limit_val_batches`` counts them, and with KTO, whose baseline depends on them.
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._configured_accumulation = 1

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        data = data_module(trainer)
        if stage != "fit" or not isinstance(data, PlannedData) or not data.awaits_batch_size:
            return
        if not isinstance(pl_module, Phi3LoRAModule):
            raise ConfigError(
                "data.max_tokens_per_batch: auto calculates what a Phi3LoRAModule takes, and "
                f"{type(pl_module).__name__} is another module; give a number."
            )
        if self._trainer is not trainer:  # a second fit starts with the value that the first one set
            self._trainer, self._configured_accumulation = trainer, trainer.accumulate_grad_batches
        step = data.hparams["batch_size"] * self._configured_accumulation
        _, total = _memory(trainer)
        row = BatchShape.of(data.largest_train_row())
        spec, room = pl_module.spec(), PLANNED_SHARE_OF_MEMORY * total
        fitting, mode = rows_that_fit(spec, row, room)
        trainer.accumulate_grad_batches, rows = share_step(step, fitting)
        rank_zero_info(
            f"{fitting} rows fit into {PLANNED_SHARE_OF_MEMORY:.0%} of {total / 1e9:.1f} GB "
            f"with gradient_checkpointing {mode}"
        )
        rank_zero_info(
            f"data.max_tokens_per_batch: auto is {rows} rows to a micro-batch, and {trainer.accumulate_grad_batches} "
            f"such micro-batches to an optimiser step of {step} rows"
        )
        if pl_module.objective.name == "kto":
            rank_zero_info("model.objective.name: kto has a baseline of each micro-batch, whose size this decides")
        enlarges = spec.on_gpu and trainer.limit_val_batches == 1.0 and pl_module.objective.name != "kto"
        data.set_rows_per_batch(rows, tokens_that_validate(spec, row, room) if enlarges else None)


def _memory(trainer: pl.Trainer) -> tuple[float, float]:
    """Free and total bytes of the rank with the least; ranks on a CPU share its memory."""
    device = trainer.strategy.root_device
    ranks = trainer.num_devices if device.type == "cpu" else 1
    own = -torch.tensor(device_memory(device), dtype=torch.float64, device=device) / ranks
    free, total = (-cast("torch.Tensor", trainer.strategy.reduce(own, reduce_op="max"))).tolist()
    return free, total
