"""``model.schedule``: how the learning rate moves."""

from dataclasses import dataclass
from typing import Literal

from phi3_lightning.config.checks import require, require_types


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves over the optimiser steps of the run."""

    name: Literal["linear", "cosine", "constant"] = "cosine"
    """What follows the warm-up: a straight line to 0, half a cosine to 0, or no change."""
    warmup: int | float = 0.03
    """Optimiser steps of linear warm-up: a number (10), or a fraction of the run (0.03), rounded up."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_types("model.schedule", self)
        valid = self.warmup >= 0 if isinstance(self.warmup, int) else 0 <= self.warmup < 1
        require(valid, "model.schedule.warmup", self.warmup, "a whole number of steps, or a fraction in [0, 1)")
