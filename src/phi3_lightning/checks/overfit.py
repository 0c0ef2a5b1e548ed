"""Overfitting a few rows with the real Trainer, which a sound set-up does in a few steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from phi3_lightning.batch import Batch
from phi3_lightning.checks.rows import Row
from phi3_lightning.config import Generation
from phi3_lightning.data.collate import Document, collate_prompts
from phi3_lightning.errors import DivergenceError
from phi3_lightning.generation.decode import generate
from phi3_lightning.module import Phi3LoRAModule

OVERFIT_STEPS = 20
"""Optimiser steps, each over all of the rows."""
MAX_OVERFIT_LOSS = math.log(2)
"""Mean loss of a token, in nats, below which rows count as overfitted: greedy decoding is certain of a token that has
more than half of the probability. Besides, the answers themselves have to come."""
MIN_CORRECT_FRACTION = 0.75
"""Fraction of the answers that have to be the rows' own, to the token that ends them. One with a wrong token may run
on, which says nothing about the end."""
MIN_LOSS_FALL_FRACTION = 0.05
"""Fraction of its first value by which the loss of the same few rows has to fall for a set-up to learn at all."""
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
    """Losses and answers of a case, measured while the Trainer holds the model on its device."""

    case: OverfitCase
    on_step: Callable[[], None]
    first_loss: float = math.nan
    last_loss: float = math.nan
    answers: list[list[int]] = field(default_factory=list)
    divergence: str | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Phi3LoRAModule) -> None:  # type: ignore[override]
        self.first_loss = _mean_loss(trainer, pl_module, self.case.batches)

    @override
    def on_before_zero_grad(self, *_: Any) -> None:
        self.on_step()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: Phi3LoRAModule) -> None:  # type: ignore[override]
        self.last_loss = _mean_loss(trainer, pl_module, self.case.batches)
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
    def overfits(self) -> bool:
        """Whether the loss is that of overfitted rows, and most answers are the rows' own."""
        return self.last_loss < MAX_OVERFIT_LOSS and self.correct >= MIN_CORRECT_FRACTION * len(self.case.rows)

    @property
    def falls(self) -> bool:
        """Whether the loss has fallen, or had nowhere to fall to."""
        return self.last_loss < max((1 - MIN_LOSS_FALL_FRACTION) * self.first_loss, MAX_OVERFIT_LOSS)

    def __str__(self) -> str:
        if self.divergence is not None:
            return self.divergence
        stopped = sum(answer[-1] in self.case.stop_ids for answer in self.answers)
        answers = f"{self.correct} of {len(self.answers)} answers right, {stopped} stop"
        return f"loss {self.first_loss:.3g} to {self.last_loss:.3g}; {answers}"


@torch.no_grad()
def _mean_loss(trainer: pl.Trainer, module: Phi3LoRAModule, batches: list[Batch]) -> float:
    """The mean loss of a supervised token in evaluation mode, in nats."""
    training = module.training
    module.eval()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for batch in map(trainer.strategy.batch_to_device, batches):
        with trainer.precision_plugin.forward_context(), module.autocast():
            loss_sum, count = module.compute_loss(module(batch), module.head, batch)
        total, tokens = total + loss_sum.double().cpu(), tokens + int(count)
    module.train(training)
    return float(total / tokens)


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
