"""Optimiser and learning-rate schedule of a run."""

import math
from collections.abc import Iterable
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from phi3_lightning.adapters.adapter import Role
from phi3_lightning.config import Optimizer as OptimizerConfig
from phi3_lightning.config import Schedule
from phi3_lightning.config.checks import require
from phi3_lightning.errors import ConfigError

GROUPS = {"A": "lora_A", "B": "lora_B", "vector": "vectors"}
"""Names of the groups of parameters, which learning-rate monitors show."""


def may_fuse(trainer: pl.Trainer) -> bool:
    """Return whether AdamW may update in one kernel: Lightning clips no gradients that a fused one might unscale."""
    plugin = trainer.precision_plugin
    return not isinstance(plugin, MixedPrecision) or (plugin.scaler is None and not trainer.gradient_clip_val)


def make_optimizer(
    parameters: Iterable[tuple[Role | None, nn.Parameter]], config: OptimizerConfig, fused: bool
) -> Optimizer:
    """Return AdamW over the trained parameters, each with its role in the adapter; weight decay is on matrices only.

    Raises:
        ConfigError: If the optimiser does not work on the parameters' device, or its package is missing.
    """
    members: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for role, parameter in parameters:
        members["vector" if parameter.ndim < 2 else "B" if role == "lora_B" else "A"].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": params, "role": key, "name": GROUPS[key], "kind": config.name, **_settings(config, key)}
        for key, params in members.items()
        if params
    ]
    if config.name == "adamw":
        return AdamW(groups, fused=fused)
    return _paged(groups)


def _settings(config: OptimizerConfig, role: str) -> dict[str, Any]:
    """The settings of one group of parameters."""
    return {
        "lr": config.lr * (config.loraplus_lr_ratio if role == "B" else 1.0),
        "weight_decay": 0.0 if role == "vector" else config.weight_decay,
        "betas": config.betas,
        "eps": config.eps,
    }


def _paged(groups: list[dict[str, Any]]) -> Optimizer:
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    require(devices == {"cuda"}, "model.optimizer.name", "paged_adamw_8bit", "it needs a GPU; use adamw")
    try:
        from bitsandbytes.optim import PagedAdamW8bit
    except ImportError:
        raise ConfigError(
            "model.optimizer.name: paged_adamw_8bit needs bitsandbytes: pip install 'phi3-lightning[qlora]'"
        ) from None
    return cast("Optimizer", PagedAdamW8bit(groups))


def warmup_steps(schedule: Schedule, total_steps: float) -> int:
    """Return the number of optimiser steps of warm-up in a run of ``total_steps``, which may be infinite."""
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


def make_schedule(optimizer: Optimizer, schedule: Schedule, total_steps: float) -> LambdaLR:
    """Return the learning-rate schedule, which moves once an optimiser step.

    Raises:
        ConfigError: If the schedule needs the end of a run that has none, or warm-up outlasts the run.
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


def name_groups(optimizer_states: list[dict[str, Any]]) -> None:
    """Rename the groups of an older checkpoint, which all had the name of the optimiser, in place."""
    for group in (group for state in optimizer_states for group in state["param_groups"]):
        if group.get("role") in GROUPS and "kind" not in group:
            group |= {"kind": group["name"], "name": GROUPS[group["role"]]}


def apply_config_to_restored_optimizer(optimizer: Optimizer, scheduler: Any, config: OptimizerConfig) -> None:
    """Set learning rate, weight decay, betas and eps of a restored optimiser to the present configuration.

    Moments and the position in the schedule stay. A scheduler of Lightning's learning-rate finder is left alone.
    """
    if not isinstance(scheduler, LambdaLR):
        return
    former = optimizer.param_groups[0]["kind"]
    require(former == config.name, "model.optimizer.name", config.name, f"the run was started with {former}; keep it")
    scheduler.base_lrs = []
    for group, share in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group |= _settings(config, group["role"])
        scheduler.base_lrs.append(group["lr"])
        group |= {"initial_lr": group["lr"], "lr": group["lr"] * share(scheduler.last_epoch)}
