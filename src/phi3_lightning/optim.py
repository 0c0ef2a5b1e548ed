"""Optimiser and learning-rate schedule of a run."""

import math
from collections.abc import Iterable
from typing import Any, cast

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from phi3_lightning.config import Optimizer as OptimizerConfig
from phi3_lightning.config import Schedule
from phi3_lightning.errors import ConfigError


def make_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, fused: bool) -> AdamW:
    """Return AdamW over the trained parameters, with weight decay on matrices only.

    Args:
        parameters: Names and parameters.
        config: The optimiser section.
        fused: Whether to update in one kernel, which a gradient scaler does not allow together with clipping.
    """
    trained = list(parameters)
    groups = [
        {"params": [p for _, p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for _, p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
    )


def warmup_steps(schedule: Schedule, total_steps: float) -> int:
    """Return the number of optimiser steps of warm-up.

    Args:
        schedule: The schedule section.
        total_steps: Optimiser steps of the run, possibly infinite.

    Raises:
        ConfigError: If the warm-up does not end before the run does.
    """
    if isinstance(schedule.warmup, int):
        steps = schedule.warmup
    elif math.isinf(total_steps):
        raise ConfigError(
            f"model.schedule.warmup: {schedule.warmup} is a fraction of a run without end; give a number of steps, "
            "or set trainer.max_epochs or trainer.max_steps"
        )
    else:
        steps = min(math.ceil(schedule.warmup * total_steps), max(int(total_steps) - 1, 0))
    if 0 < total_steps <= steps:
        raise ConfigError(
            f"model.schedule.warmup: {steps} steps of warm-up in a run of {total_steps} optimiser steps; "
            "write a smaller number, or train for longer"
        )
    return steps


def make_schedule(optimizer: AdamW, schedule: Schedule, total_steps: float) -> LambdaLR:
    """Return the learning-rate schedule, which moves once an optimiser step.

    Args:
        optimizer: The optimiser.
        schedule: The schedule section.
        total_steps: Optimiser steps of the run, possibly infinite.

    Raises:
        ConfigError: If a schedule that ends is asked for a run that does not, or warm-up outlasts the run.
    """
    if schedule.name != "constant" and math.isinf(total_steps):
        raise ConfigError(
            f"model.schedule.name: {schedule.name} falls to 0 at the end of the run, and this run has none; "
            "use constant, or set trainer.max_epochs or trainer.max_steps"
        )
    warmup = warmup_steps(schedule, total_steps)
    if schedule.name == "constant":
        return cast("LambdaLR", get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=warmup))
    scheduler = get_scheduler(schedule.name, optimizer, num_warmup_steps=warmup, num_training_steps=int(total_steps))
    return cast("LambdaLR", scheduler)


def restate(optimizer: Optimizer, scheduler: Any, config: OptimizerConfig) -> None:
    """Set what a checkpoint brought back from its own configuration to the present one.

    Moments and the position in the schedule stay; learning rate, weight decay, betas and eps are as written now.

    Args:
        optimizer: The restored optimiser.
        scheduler: The restored schedule, a ``LambdaLR``.
        config: The optimiser section.
    """
    scheduler.base_lrs = [config.lr] * len(optimizer.param_groups)
    for group, share in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        decay = config.weight_decay if group["params"][0].ndim >= 2 else 0.0
        group |= {"initial_lr": config.lr, "lr": config.lr * share(scheduler.last_epoch), "weight_decay": decay}
        group |= {"betas": config.betas, "eps": config.eps}
