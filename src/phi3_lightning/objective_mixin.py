"""What an objective adds to a module: its loss, a reference in its checkpoints, and metrics of preferences."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from math import isinf
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from phi3_lightning import preferences
from phi3_lightning.adapters.adapter import Adapter
from phi3_lightning.batch import Batch
from phi3_lightning.batch.mismatched import mismatched
from phi3_lightning.checkpoint.identity import NEW_RUN, read_identity
from phi3_lightning.checkpoint.mixin import TrainableStateMixin
from phi3_lightning.config import LoRA, Objective
from phi3_lightning.contracts import DataOfOneKind, data_module
from phi3_lightning.errors import CheckpointError
from phi3_lightning.metrics import PreferenceMetrics, TokenMetrics
from phi3_lightning.model import loss
from phi3_lightning.objectives import Answers, AnswerScores, PreferenceLoss, kto, preference
from phi3_lightning.reference import Reference, evaluating, trained_weights

Built = TypeVar("Built")
REFERENCE = "reference"
"""Key of the reference's tensors in a checkpoint, and of their hash in its identity block."""


class ObjectiveMixin(TrainableStateMixin):
    """A LightningModule that learns from chats or from preferences, as its objective says.

    The reference is the model as the run began. Where it is a copy of the adapter, checkpoints hold it beside what is
    trained and its hash in their identity, so that a restart has the same one whatever becomes of the file it was read
    from.
    """

    objective: Objective
    """What a batch teaches."""

    def __init__(self) -> None:
        super().__init__()
        self.reference = Reference()
        self._scores: tuple[AnswerScores, AnswerScores] | None = None
        self.start_error: str | None = None
        """Why ``lora.init_from`` could not be read, until a checkpoint is restored."""

    def set_objective(self, objective: Objective) -> None:
        """Set what a batch teaches, before anything is loaded."""
        self.objective = objective
        supervised, paired = objective.name == "supervised", objective.name != "kto"
        self.train_metrics = PreferenceMetrics(paired)
        self.val_metrics, self.test_metrics = (
            TokenMetrics() if supervised else PreferenceMetrics(paired) for _ in range(2)
        )

    def setup(self, stage: str) -> None:
        """Refuse data of another kind than the objective learns from, before anything is loaded."""
        super().setup(stage)
        data = data_module(self.trainer)
        if stage != "predict" and isinstance(data, DataOfOneKind):
            preferences.check_data(self.objective, data)

    def keep_reference(self, lora: LoRA) -> None:
        """Copy what is trained, where an adapter starts with an effect, so that the base is not the reference."""
        copied = self.objective.has_reference and lora.starts_with_effect
        self.reference.set(trained_weights(self) if copied else {})

    def start_from(self, lora: LoRA, build: Callable[[LoRA], Built]) -> Built:
        """Return what is built with an adapter, under a Trainer also where ``lora.init_from`` cannot be read.

        The Trainer may be about to restore a checkpoint, which has all that it held. Where none is restored, the error
        is raised when the model is first used.
        """
        try:
            return build(lora)
        except CheckpointError as error:
            if self._trainer is None:
                raise
            self.start_error = str(error)  # the error itself would keep the first model alive
        return build(replace(lora, init_from=None))

    def objective_loss(self, adapter: Adapter, hidden: Tensor, head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of a batch and their weight, as ``compute_loss`` does.

        Raises:
            ConfigError: If the batch is of another kind than the objective learns from.
        """
        preferences.check_batch(self.objective, batch)
        if self.objective.name == "supervised":
            return loss.cross_entropy(hidden, head, batch)
        result = self._preference_loss(adapter, hidden, head, batch)
        self._scores = result.chosen, result.rejected
        return result.loss_sum, result.weight

    def _preference_loss(self, adapter: Adapter, hidden: Tensor, head: nn.Module, batch: Batch) -> PreferenceLoss:
        answers = self._answers(adapter, hidden, head, batch)
        preferred = list(chain.from_iterable(batch.get("preferred", [])))  # a filler of chats has none
        chosen, rejected = answers.where(preferred), answers.where([not flag for flag in preferred])
        if self.objective.name != "kto":
            return preference(chosen, rejected, self.objective)
        others = mismatched(batch)
        with torch.no_grad(), evaluating(self):
            baseline = self._answers(adapter, self(others), head, others)
        return kto(chosen, rejected, baseline, self.objective)

    def _answers(self, adapter: Adapter, hidden: Tensor, head: nn.Module, batch: Batch) -> Answers:
        losses, tokens = loss.document_losses(hidden, head, batch)
        if not self.objective.has_reference:
            return Answers(-losses, tokens)
        return Answers(-losses, tokens, -self._reference_losses(adapter, head, batch))

    def _reference_losses(self, adapter: Adapter, head: nn.Module, batch: Batch) -> Tensor:
        def compute() -> Tensor:
            with self.reference.active(self, adapter):
                return loss.document_losses(self(batch), head, batch)[0]

        # a stream does not come to its rows again, and ranks with shards of one model pass through it together
        sharded = any(isinstance(parameter, DTensor) for parameter in adapter.parameters())
        fitting = self._trainer is not None and self.trainer.state.fn == "fit"
        if sharded or not fitting or isinf(self.trainer.num_training_batches):
            return compute()
        return self.reference.losses(batch, compute)

    def measure_training(self, loss_sum: Tensor, count: Tensor | float) -> None:
        """Add a training batch to the metrics of preferences under ``train/``, which the next optimiser step logs."""
        if self.objective.name != "supervised":
            self.train_metrics.update(loss_sum.detach(), torch.as_tensor(count), self._take_scores())

    def measure_evaluation(
        self,
        metrics: TokenMetrics | PreferenceMetrics,
        loss_sum: Tensor,
        count: Tensor | float,
        hidden: Tensor,
        head: nn.Module,
        batch: Batch,
    ) -> None:
        """Add a held-out batch to the metrics."""
        if isinstance(metrics, PreferenceMetrics):
            metrics.update(loss_sum, torch.as_tensor(count), self._take_scores())
        else:
            metrics.update(loss_sum, torch.as_tensor(count), *loss.correct_tokens(hidden, head, batch))

    def _take_scores(self) -> tuple[AnswerScores, AnswerScores] | None:
        """The scores of the last :meth:`objective_loss`, once; None for a loss of a subclass."""
        scores, self._scores = self._scores, None
        return scores

    def on_fit_start(self) -> None:
        """Compute the reference's losses anew: data and precision may be others than in the fit before."""
        super().on_fit_start()
        self.reference.forget_losses()

    def on_train_epoch_start(self) -> None:
        """Give each rank the reference's losses of the batches that the others have had."""
        super().on_train_epoch_start()
        self.reference.share_losses(self.trainer)

    def on_train_start(self) -> None:
        """Forget the batches of an accumulation window that an earlier run has left."""
        super().on_train_start()
        for metric in self.train_metrics.by_name().values():
            metric.reset()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the metrics of the accumulation window, over all ranks; its loss is logged by its weight already."""
        super().on_before_optimizer_step(optimizer)
        for name, metric in self.train_metrics.by_name().items():
            if name != "loss":
                self.log(f"train/{name}", metric.compute())
            metric.reset()

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"objective": self.objective.name, REFERENCE: self.reference.fingerprint}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the reference, apart from what is trained."""
        super().on_save_checkpoint(checkpoint)
        if state := self.reference.state_dict():
            checkpoint[REFERENCE] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the reference of a checkpoint.

        Raises:
            CheckpointError: If it does not fit the adapter, or a run of another objective would be resumed.
        """
        start_error, self.start_error = self.start_error, None
        super().on_load_checkpoint(checkpoint)
        former = read_identity(checkpoint)
        before, now = former.get("objective", "supervised"), self.objective.name
        fitting = self._trainer is not None and self.trainer.state.fn == "fit"
        if fitting and before != now:
            raise CheckpointError(f"model.objective.name is {now} and was {before} in the checkpoint's run; {NEW_RUN}")
        if self.objective.has_reference and Objective(before).has_reference:
            self.reference.load(checkpoint.get(REFERENCE, {}), self, former[REFERENCE])
        elif self.objective.has_reference and start_error is not None:
            raise CheckpointError(start_error)
