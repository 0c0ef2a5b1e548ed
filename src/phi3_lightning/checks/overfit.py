"""Overfitting a few rows with the real Trainer, which a sound set-up does in a few steps.

Chats are overfitted when greedy decoding writes the answers. Preferences are when each answer is rewarded as it should
be, and the loss is half of what it was: the model told the answers apart by nothing but its reference's own
probabilities, or, without a reference, by those that it had. A margin that is only rounding also rewards half of the
answers right; it does not halve the loss.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader
from torchmetrics import Metric
from typing_extensions import override

from phi3_lightning.batch import Batch
from phi3_lightning.checks.rows import Row
from phi3_lightning.config import Generation, Objective
from phi3_lightning.data.collate import Document, collate_prompts
from phi3_lightning.errors import DivergenceError
from phi3_lightning.generation.decode import generate
from phi3_lightning.metrics import PreferenceMetrics
from phi3_lightning.module import Phi3LoRAModule

OVERFIT_STEPS = 20
"""Optimiser steps, each over all of the rows."""
MAX_OVERFIT_LOSS = math.log(2)
"""Mean loss of a token, in nats, below which rows count as overfitted: greedy decoding is certain of a token that has
more than half of the probability. Besides, the answers themselves have to come."""
MIN_CORRECT_FRACTION = 0.75
"""Fraction of the answers that have to be the rows' own, to the token that ends them (one with a wrong token may run
on, which says nothing about the end); of KTO's answers, of those that have to be rewarded right."""
MIN_LOSS_FALL_FRACTION = 0.05
"""Fraction of its first value by which the loss of the same few rows has to fall for a set-up to learn at all."""
MAX_PREFERENCE_LOSS_FRACTION = 0.5
"""Fraction of its first value below which the loss of preferences counts as that of overfitted ones. dpo: from a
margin of 0 to one of 0.88, at which the chosen answer is the better one with a probability of 0.71."""
PREFERENCE_RATE_FACTOR = 50
"""How many times lower the learning rates of preferences are than those of chats, at the most: too low for 20 steps, in
which rounding to bfloat16 moves their loss by some percent too."""
GOOD_LEARNING_RATES = (1e-2, 3e-3, 1e-3)
"""Learning rates of the settings that are known to be good."""


@dataclass(frozen=True)
class OverfitCase:
    """Rows to overfit, as the micro-batches of one optimiser step."""

    rows: list[Row]
    batches: list[Batch]
    stop_ids: list[int]
    pad_token_id: int

    @property
    def answer_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(row.answer) for row in self.rows)


@dataclass(eq=False)
class OverfitResult(pl.Callback):
    """Losses of a case, and answers or rewards, measured while the Trainer holds the model on its device."""

    case: OverfitCase
    on_step: Callable[[], None]
    first_loss: float = math.nan
    last_loss: float = math.nan
    answers: list[list[int]] = field(default_factory=list)
    """Of chats, by greedy decoding."""
    preference_accuracy: float | None = None
    """Of preferences, the fraction that is rewarded as it should be; None of chats."""
    divergence: str | None = None
    objective: Objective = Objective()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Phi3LoRAModule) -> None:  # type: ignore[override]
        self.objective = pl_module.objective
        self.first_loss, _ = _measure(trainer, pl_module, self.case.batches)

    @override
    def on_before_zero_grad(self, *_: Any) -> None:
        self.on_step()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: Phi3LoRAModule) -> None:  # type: ignore[override]
        self.last_loss, self.preference_accuracy = _measure(trainer, pl_module, self.case.batches)
        if self.preference_accuracy is not None:
            return
        spans, rows = np.array([], dtype=np.int32), self.case.rows
        prompts = [Document(n, np.array(row.question, dtype=np.int32), spans) for n, row in enumerate(rows)]
        batch = trainer.strategy.batch_to_device(collate_prompts([prompts], self.case.pad_token_id, self.case.stop_ids))
        generation = Generation(max_new_tokens=max(len(row.answer) for row in rows) + 1)
        with trainer.precision_plugin.forward_context(), pl_module.autocast():
            self.answers = generate(pl_module.loaded_model, batch, generation)

    @property
    def correct(self) -> int:
        """How many answers are the row's, to the token that ends them."""
        return sum(answer == row.answer for answer, row in zip(self.answers, self.case.rows, strict=True))

    @property
    def max_loss(self) -> float:
        """The loss below which the rows count as overfitted; orpo has the loss of chats, and its odds ratio besides."""
        if self.preference_accuracy is None:
            return MAX_OVERFIT_LOSS
        if self.objective.name == "orpo":
            return (1 + self.objective.beta) * MAX_OVERFIT_LOSS
        return MAX_PREFERENCE_LOSS_FRACTION * self.first_loss

    @property
    def overfits(self) -> bool:
        """Whether the loss is that of overfitted rows, and most answers are the rows' own, or the rewards right."""
        if not self.last_loss < self.max_loss:  # also where it diverged
            return False
        if self.preference_accuracy is not None:
            # kto's baseline, which is not 0, lets a bad answer have a small reward
            return self.preference_accuracy >= (MIN_CORRECT_FRACTION if self.objective.name == "kto" else 1)
        return self.correct >= MIN_CORRECT_FRACTION * len(self.case.rows)

    @property
    def falls(self) -> bool:
        """Whether the loss has fallen, or had nowhere to fall to."""
        return self.last_loss < max((1 - MIN_LOSS_FALL_FRACTION) * self.first_loss, self.max_loss)

    def __str__(self) -> str:
        if self.divergence is not None:
            return self.divergence
        if self.preference_accuracy is None:
            stopped = sum(answer[-1] in self.case.stop_ids for answer in self.answers)
            outcome = f"{self.correct} of {len(self.answers)} answers right, {stopped} stop"
        else:
            outcome = f"{self.preference_accuracy:.0%} of {len(self.case.rows)} rows rewarded right"
        return f"loss {self.first_loss:.3g} to {self.last_loss:.3g}; {outcome}"


@torch.no_grad()
def _measure(trainer: pl.Trainer, module: Phi3LoRAModule, batches: list[Batch]) -> tuple[float, float | None]:
    """The mean loss in evaluation mode, and of preferences the fraction that is rewarded as it should be."""
    training = module.training
    module.eval()
    metrics = deepcopy(module.val_metrics).to(module.device)
    for metric in metrics.children():
        cast("Metric", metric).reset()
    for batch in map(trainer.strategy.batch_to_device, batches):
        with trainer.precision_plugin.forward_context(), module.autocast():
            hidden = module(batch)
            loss_sum, count = module.compute_loss(hidden, module.head, batch)
            module.measure_evaluation(metrics, loss_sum, count, hidden, module.head, batch)
    module.train(training)
    accuracy = metrics.preference_accuracy.compute().item() if isinstance(metrics, PreferenceMetrics) else None
    return metrics.loss.compute().item(), accuracy


def known_rates(hidden_size: int) -> list[float]:
    """Return the learning rates to try until one overfits, the most probable first.

    AdamW moves each value by about the rate, and an output sums over as many of them as the model is wide.
    """
    return sorted(GOOD_LEARNING_RATES, key=lambda rate: abs(math.log(rate * hidden_size / 2)))


def overfit(
    module: Phi3LoRAModule,
    case: OverfitCase,
    make_trainer: Callable[..., pl.Trainer],
    clip: float | None,
    on_step: Callable[[], None],
) -> tuple[OverfitResult, pl.Trainer]:
    """Train a module on a few rows, over and over, with gradients clipped at a norm."""
    result = OverfitResult(case, on_step)
    trainer = make_trainer(
        max_epochs=-1,
        max_steps=OVERFIT_STEPS,
        accumulate_grad_batches=len(case.batches),
        gradient_clip_val=clip,
        callbacks=[result],
    )
    loader: DataLoader[Batch] = DataLoader(case.batches, batch_size=None)  # type: ignore[arg-type]
    try:
        trainer.fit(module, loader)
    except DivergenceError as error:
        result.divergence = str(error).partition(". ")[0]
    return result, trainer
