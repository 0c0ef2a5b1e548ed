"""How long a run is, as the Trainer counts."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Length:
    """How long a run is. Both are infinite where nothing ends it."""

    steps: float
    """Optimiser steps."""
    tokens: float
    """Tokens of documents that all devices together train on."""


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
    """Return the length of a run.

    Args:
        batches: Micro-batches of an epoch, of all devices together.
        tokens: Tokens of an epoch.
        ranks: Devices.
        accumulate: Micro-batches of a device to an optimiser step.
        max_epochs: As the Trainer takes it; None: 1000 where ``max_steps`` sets no end.
        max_steps: As the Trainer takes it; -1: no end.
        limit: The Trainer's ``limit_train_batches``: a number of micro-batches of a device, or a share of them.
    """
    mine = whole = math.ceil(batches / ranks)
    if limit is not None:
        mine = min(limit, whole) if isinstance(limit, int) else int(limit * whole)
    an_epoch = math.ceil(mine / accumulate)
    if max_epochs is None:
        max_epochs = 1000 if max_steps == -1 else -1
    steps = math.inf if max_epochs == -1 else an_epoch * max(max_epochs, 1)
    if max_steps != -1:
        steps = min(steps, max_steps)
    return Length(steps, steps * tokens * mine / whole / an_epoch if an_epoch else 0)
