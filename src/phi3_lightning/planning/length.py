"""The length of a run, as the Trainer counts."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Length:
    """The length of a run; both are infinite where nothing ends it."""

    steps: float
    """Optimiser steps."""
    tokens: float
    """Tokens of documents, of all devices together."""


def run_length(
    batches: int,
    tokens: int,
    ranks: int,
    *,
    accumulate: int,
    max_epochs: int | None,
    max_steps: int,
    limit: float | None = None,
) -> Length:
    """Return the length of a run; the options are the Trainer's, ``limit`` its ``limit_train_batches``.

    Args:
        batches: Micro-batches of an epoch, of all devices together.
        tokens: Tokens of an epoch.
        accumulate: Micro-batches of a device to an optimiser step.
    """
    share = available = math.ceil(batches / ranks)  # of each device in an epoch
    if limit is not None:
        share = min(limit, available) if isinstance(limit, int) else int(limit * available)
    steps_per_epoch = math.ceil(share / accumulate)
    if max_epochs is None:
        max_epochs = 1000 if max_steps == -1 else -1
    steps = math.inf if max_epochs == -1 else steps_per_epoch * max(max_epochs, 1)
    if max_steps != -1:
        steps = min(steps, max_steps)
    return Length(steps, steps * tokens * share / available / steps_per_epoch if steps_per_epoch else 0)
