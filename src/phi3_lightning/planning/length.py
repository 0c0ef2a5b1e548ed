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
    validations: float = 0
    """Validations, where there are validation data."""


def run_length(
    batches: int,
    tokens: int,
    ranks: int,
    *,
    accumulate: int,
    max_epochs: int | None,
    max_steps: int,
    limit: float | None = None,
    check_val_every_n_epoch: int | None = 1,
    val_check_interval: float | None = None,
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
    if not steps_per_epoch:
        return Length(steps, 0)
    trained = steps * tokens * share / available / steps_per_epoch
    if math.isinf(steps):
        return Length(steps, trained, math.inf)
    interval = 1.0 if val_check_interval is None else val_check_interval
    batches_between = interval if isinstance(interval, int) else max(int(share * interval), 1)
    epochs, rest = divmod(int(steps), steps_per_epoch)
    if check_val_every_n_epoch is None:
        validations = (epochs * share + rest * accumulate) // batches_between
    else:
        validations = epochs // check_val_every_n_epoch * (share // batches_between)
        validations += rest * accumulate // batches_between if (epochs + 1) % check_val_every_n_epoch == 0 else 0
    return Length(steps, trained, validations)
