"""Learning a few rows by heart with the real Trainer: what a sound set-up does in a few steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader
from typing_extensions import override

from phi3_lightning.batch import Batch
from phi3_lightning.checks.rows import Row
from phi3_lightning.config import Generation
from phi3_lightning.data.collate import Document, collate_prompts
from phi3_lightning.errors import DivergenceError
from phi3_lightning.generation.decode import generate
from phi3_lightning.module import Phi3LoRAModule

STEPS = 20
"""Optimiser steps, each over all of the rows."""
BY_HEART = math.log(2)
"""Mean loss of a token, in nats, below which rows count as learnt: greedy decoding is certain of a token that gets more
than half of the probability. Beside it the answers themselves have to come."""
RATES = (1e-2, 3e-3, 1e-3)
"""Learning rates of the settings that are known to be good."""
RIGHT = 0.75
"""Share of the answers that have to be the rows' own, to the token that ends them. One that has taken a wrong token may
run on, which says nothing about the end."""
FALLS = 0.05
"""Share of its first value by which the loss of the same few rows has to fall for a set-up to learn at all."""


@dataclass(frozen=True)
class OverfitCase:
    """Rows to learn, as the batches of one optimiser step.

    Args:
        rows: The rows.
        batches: Micro-batches that hold each row once.
        stop_ids: The tokens that end an answer.
        pad_token_id: Fills up short rows.
    """

    rows: list[Row]
    batches: list[Batch]
    stop_ids: list[int]
    pad_token_id: int


@dataclass(eq=False)
class OverfitResult(Callback):
    """What came of a lesson, measured while the Trainer holds the model on its device.

    Args:
        lesson: The rows.
        on_step: Told after each optimiser step.
    """

    lesson: OverfitCase
    on_step: Callable[[], None]
    first: float = math.nan
    last: float = math.nan
    answers: list[list[int]] = field(default_factory=list)
    diverged: str | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Phi3LoRAModule) -> None:  # type: ignore[override]
        self.first = mean_loss(trainer, pl_module, self.lesson.batches)

    @override
    def on_before_zero_grad(self, *_: Any) -> None:
        self.on_step()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: Phi3LoRAModule) -> None:  # type: ignore[override]
        self.last = mean_loss(trainer, pl_module, self.lesson.batches)
        self.answers = self._answer(trainer, pl_module)

    def _answer(self, trainer: pl.Trainer, module: Phi3LoRAModule) -> list[list[int]]:
        assert module.model is not None  # it has just been trained
        none = torch.tensor([]).numpy()
        rows = self.lesson.rows
        prompts = [Document(index, torch.tensor(row.question).numpy(), none) for index, row in enumerate(rows)]
        batch = collate_prompts(prompts, self.lesson.pad_token_id, self.lesson.stop_ids)
        longest = max(len(row.answer) for row in rows)
        with trainer.precision_plugin.forward_context(), module.autocast():
            return generate(
                module.model, trainer.strategy.batch_to_device(batch), Generation(max_new_tokens=longest + 1)
            )

    @property
    def right(self) -> int:
        """How many answers are the row's, to the token that ends them."""
        return sum(answer == row.answer for answer, row in zip(self.answers, self.lesson.rows, strict=True))

    @property
    def stopped(self) -> int:
        """How many answers ended by themselves."""
        return sum(answer[-1] in self.lesson.stop_ids for answer in self.answers)

    @property
    def by_heart(self) -> bool:
        """Whether the rows are learnt, and their answers given."""
        count = len(self.lesson.rows)
        return self.last < BY_HEART and self.right >= RIGHT * count

    @property
    def falls(self) -> bool:
        """Whether the loss has fallen, or had nowhere to fall to."""
        return self.last < max((1 - FALLS) * self.first, BY_HEART)

    def __str__(self) -> str:
        if self.diverged is not None:
            return self.diverged
        count = len(self.answers)
        return f"loss {self.first:.3g} to {self.last:.3g}; {self.right} of {count} answers right, {self.stopped} stop"


@torch.no_grad()
def mean_loss(trainer: pl.Trainer, module: Phi3LoRAModule, batches: list[Batch]) -> float:
    """Return the mean loss of a supervised token in evaluation mode, in nats.

    Args:
        trainer: Holds the module, and says what it computes in.
        module: The module.
        batches: The batches.
    """
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
    """Return the learning rates that are tried until one learns, the likeliest first.

    AdamW moves each value by about the rate, and an output sums over as many of them as the model is wide.

    Args:
        hidden_size: Width of the model.
    """
    return sorted(RATES, key=lambda rate: abs(math.log(rate * hidden_size / 2)))


def overfit(
    module: Phi3LoRAModule,
    lesson: OverfitCase,
    make_trainer: Callable[..., pl.Trainer],
    clip: float | None,
    on_step: Callable[[], None],
) -> tuple[OverfitResult, pl.Trainer]:
    """Train a module on a few rows, over and over.

    Args:
        module: The module.
        lesson: The rows.
        make_trainer: Makes a Trainer on the user's device and precision, with further options.
        clip: Largest norm of the gradient.
        on_step: Told after each optimiser step.

    Returns:
        What came of it, and the Trainer.
    """
    learnt = OverfitResult(lesson, on_step)
    trainer = make_trainer(
        max_epochs=-1,
        max_steps=STEPS,
        accumulate_grad_batches=len(lesson.batches),
        gradient_clip_val=clip,
        callbacks=[learnt],
    )
    loader: DataLoader[Batch] = DataLoader(lesson.batches, batch_size=None)  # type: ignore[arg-type]
    try:
        trainer.fit(module, loader)
    except DivergenceError as error:
        learnt.diverged = str(error).partition(". ")[0]
    return learnt, trainer
