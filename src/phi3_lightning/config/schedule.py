"""``model.schedule``: how the learning rate moves."""

from dataclasses import dataclass
from typing import Literal

from phi3_lightning.config.checks import require, require_types


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves over the optimiser steps of the run."""

    name: Literal["linear", "cosine", "constant", "wsd"] = "cosine"
    """What follows the warm-up: a straight line down, half a cosine down, no change, or no change and at the end of the
    run a fall like 1 - sqrt: warm-up, stable, decay (Hägele et al. 2024, https://arxiv.org/abs/2405.18392)."""
    warmup: int | float = 0.03
    """Optimiser steps of linear warm-up from 0: a number (10), or a fraction of the run (0.03), rounded up."""
    min_lr_ratio: float = 0.0
    """The fraction of the highest learning rate at which the run ends. 0.1 is usual where it is not 0."""
    decay: int | float | None = None
    """Optimiser steps of the fall of wsd at the end of the run: a number, or a fraction of the run, rounded up. null:
    0.2 of the run."""

    def __post_init__(self) -> None:
        """Check the ranges, and refuse what a schedule of this name has no use for."""
        require_types("model.schedule", self)
        valid = self.warmup >= 0 if isinstance(self.warmup, int) else 0 <= self.warmup < 1
        require(valid, "model.schedule.warmup", self.warmup, "a whole number of steps, or a fraction in [0, 1)")
        require(0 <= self.min_lr_ratio < 1, "model.schedule.min_lr_ratio", self.min_lr_ratio, "a fraction in [0, 1)")
        require(
            self.name != "constant" or self.min_lr_ratio == 0,
            "model.schedule.min_lr_ratio",
            self.min_lr_ratio,
            "constant does not fall; use cosine, linear or wsd, or 0",
        )
        if self.decay is not None:
            require(
                self.name == "wsd",
                "model.schedule.decay",
                self.decay,
                f"{self.name} has no separate decay; use wsd, or null",
            )
            valid = self.decay >= 1 if isinstance(self.decay, int) else 0 < self.decay <= 1
            require(valid, "model.schedule.decay", self.decay, "a whole number of steps, or a fraction in (0, 1]")
            both = [part for part in (self.warmup, self.decay) if not isinstance(part, int)]
            require(sum(both) <= 1, "model.schedule.decay", self.decay, "warmup and decay are more than the whole run")
