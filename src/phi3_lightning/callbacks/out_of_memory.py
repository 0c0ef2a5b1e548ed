"""The batch for which memory ran out, and changes that would make the run fit."""

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

from phi3_lightning.batch import Batch, PromptBatch
from phi3_lightning.contracts import PlannedData, data_module
from phi3_lightning.model.activation_checkpointing import mode_of
from phi3_lightning.module import Phi3LoRAModule
from phi3_lightning.planning.memory import MemoryPredictor
from phi3_lightning.planning.step import BatchShape
from phi3_lightning.planning.suggestions import suggestions

MAX_SUGGESTIONS = 3
"""Number of changes that an error suggests."""


class OutOfMemory(pl.Callback):
    """Adds to an out-of-memory error the batch, and the memory that `plan` predicts for it with other settings.

    The error comes before the first step and not hours later: the training batch with the most tokens is tried first,
    and its gradient discarded. The validation data begin with their largest batch. Batches of a stream are not known in
    advance.

    A GPU without free memory raises an error. On a CPU the system often kills the process instead, without a message.
    """

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._place = ""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = data_module(trainer)
        largest = data.largest_train_batch() if isinstance(data, PlannedData) else None
        if isinstance(pl_module, Phi3LoRAModule) and largest is not None:
            self._batch, self._place = largest, "a trial of the largest training batch"
            self._try(trainer, pl_module, trainer.strategy.batch_to_device(largest))

    def _try(self, trainer: pl.Trainer, module: Phi3LoRAModule, batch: Batch) -> None:
        devices = [module.device] if module.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            with trainer.precision_plugin.train_step_context(), module.autocast():
                loss_sum, _ = module.compute_loss(module(batch), module.head, batch)
            loss_sum.backward()  # not through DDP, whose reducer is not involved
        for parameter in module.trained_parameters():
            parameter.grad = None

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self._batch, self._place = batch, f"training batch {batch_idx}, epoch {trainer.current_epoch}"

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._batch, self._place = batch, f"validation batch {batch_idx}"

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._batch, self._place = batch, f"test batch {batch_idx}"

    @override
    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        prompts, length = batch["input_ids"].shape
        self._batch, self._place = None, f"batch {batch_idx} of {prompts} prompts of {length} tokens at most"

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if not is_out_of_memory(exception) or not self._place:
            return
        if self._batch is None:
            exception.add_note(
                f"memory ran out in {self._place}: lower data.predict_batch_size or model.generation.max_new_tokens"
            )
            return
        lengths = self._batch["document_lengths"]
        documents = "; ".join(" + ".join(map(str, row)) for row in lengths)
        exception.add_note(f"memory ran out in {self._place}: {len(lengths)} rows with documents of {documents} tokens")
        if isinstance(pl_module, Phi3LoRAModule):
            for line in _advice(pl_module, self._batch):
                exception.add_note(line)


def is_out_of_memory(exception: BaseException) -> bool:
    """Return whether an exception says that no memory is left, on a GPU or in the host."""
    if isinstance(exception, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(exception, RuntimeError) and "can't allocate memory" in str(exception)


def _advice(module: Phi3LoRAModule, batch: Batch) -> list[str]:
    predictor = MemoryPredictor(replace(module.spec(), gradient_checkpointing=mode_of(module.loaded_model)))
    shape = BatchShape.of(batch)
    memory = predictor.memory(shape)
    helpful = suggestions(predictor, shape, memory)[:MAX_SUGGESTIONS]
    return [
        f"training on such a batch takes {memory.total / 1e9:.1f} GB by calculation (phi3-lightning plan says more)",
        *(f"  with {suggestion.change}: {suggestion.memory.total / 1e9:.1f} GB" for suggestion in helpful),
    ]
