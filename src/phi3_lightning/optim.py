"""Optimiser and learning-rate schedule of a run."""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, Final, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from phi3_lightning.adapters.adapter import Role
from phi3_lightning.config import Optimizer as OptimizerConfig
from phi3_lightning.config import Schedule
from phi3_lightning.config.checks import require
from phi3_lightning.errors import ConfigError
from phi3_lightning.optimizer_class import accepts, optimizer_class

GROUPS = {"A": "lora_A", "B": "lora_B", "vector": "vectors"}
"""Names of the groups of parameters, which learning-rate monitors show."""

WSD_DECAY = 0.2
"""The fraction of a run in which ``wsd`` falls by default, at which Hägele et al. found it as good as cosine."""

FALLS: Final[dict[str, Callable[[float, int], float]]] = {
    "linear": lambda done, steps: (steps - done) / steps,
    "cosine": lambda done, steps: 0.5 * (1 + math.cos(math.pi * (done / steps))),
    "wsd": lambda done, steps: 1 - math.sqrt(done / steps),
}
"""How each schedule falls from 1 to 0, by the steps that are done of those of its decay."""

TRIAL_SIZE = 64
"""Rows and columns of the matrices on which another optimiser is tried."""


def may_fuse(trainer: pl.Trainer) -> bool:
    """Return whether AdamW may update in one kernel: Lightning clips no gradients that a fused one might unscale."""
    plugin = trainer.precision_plugin
    return not isinstance(plugin, MixedPrecision) or (plugin.scaler is None and not trainer.gradient_clip_val)


def make_optimizer(
    parameters: Iterable[tuple[Role | None, nn.Parameter]], config: OptimizerConfig, fused: bool
) -> Optimizer:
    """Return an optimiser of the trained parameters, each with its role in the adapter; only matrices have decay.

    Args:
        fused: Whether AdamW updates in one kernel; for another class ``init_args`` decide.

    Raises:
        ConfigError: If the optimiser does not work with these parameters or arguments, or its package is missing.
    """
    kind = None if config.class_path is None else optimizer_class(config)
    members: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for role, parameter in parameters:
        members["vector" if parameter.ndim < 2 else "B" if role == "lora_B" else "A"].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": params, "role": key, "name": GROUPS[key], "kind": _name(config), **_settings(config, kind, key)}
        for key, params in members.items()
        if params
    ]
    if kind is not None:
        return _construct(kind, groups, config)
    return AdamW(groups, fused=fused) if config.name == "adamw" else _paged(groups)


def _name(config: OptimizerConfig) -> str:
    return config.class_path or config.name


def _settings(config: OptimizerConfig, kind: type[Optimizer] | None, role: str) -> dict[str, Any]:
    """The settings of one group of parameters; ``kind`` is the class of ``class_path``."""
    settings: dict[str, Any] = {"lr": config.lr * (config.loraplus_lr_ratio if role == "B" else 1.0)}
    if kind is None or accepts(kind, "weight_decay"):
        settings["weight_decay"] = 0.0 if role == "vector" else config.weight_decay
    return settings if kind is not None else settings | {"betas": config.betas, "eps": config.eps}


def _construct(kind: type[Optimizer], groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    settings = {name: value for name, value in _settings(config, kind, "A").items() if name not in config.init_args}
    try:
        return kind(groups, **settings, **config.init_args)
    except Exception as error:
        raise ConfigError(
            f"model.optimizer.class_path: {config.class_path} cannot be used with these options: "
            f"{' '.join(str(error).split())}; correct model.optimizer.init_args, or use another class"
        ) from error


def check_optimizer(config: OptimizerConfig) -> None:
    """Refuse, before anything is loaded, an optimiser that cannot train: it steps once on two small matrices.

    Raises:
        ConfigError: If the class, its arguments or a step with it is impossible.
    """
    if config.class_path is not None:
        _step_once(config)


def state_bytes(config: OptimizerConfig) -> float:
    """Return the bytes of optimiser state for each trained value of a matrix."""
    if config.class_path is None:
        return 2 if config.name == "paged_adamw_8bit" else 8  # two moments, in 8 bits or float32
    states = _step_once(config).state.values()
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor) and value.ndim]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / (2 * TRIAL_SIZE**2)


def _step_once(config: OptimizerConfig) -> Optimizer:
    """An optimiser of two small matrices after a step, which only those of torch are certain to take on a CPU."""
    parameters = [nn.Parameter(torch.ones(TRIAL_SIZE, TRIAL_SIZE)) for _ in range(2)]
    optimizer = make_optimizer(zip(("lora_A", "lora_B"), parameters, strict=True), config, fused=False)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except Exception as error:
        if type(optimizer).__module__.startswith("torch."):
            raise ConfigError(
                f"model.optimizer.class_path: {config.class_path} cannot train an adapter: {error}; use another class"
            ) from error
    return optimizer


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


def decay_steps(schedule: Schedule, total_steps: float) -> int:
    """Return the number of optimiser steps at the end of a run in which the learning rate falls."""
    if schedule.name == "constant":
        return 0
    after_warmup = int(total_steps) - warmup_steps(schedule, total_steps)
    if schedule.name != "wsd":
        return after_warmup
    decay = WSD_DECAY if schedule.decay is None else schedule.decay
    if not isinstance(decay, int):
        return min(math.ceil(decay * total_steps), after_warmup)
    if decay > after_warmup:
        raise ConfigError(
            f"model.schedule.decay: {decay} steps of decay in a run of {total_steps} optimiser steps, "
            f"{int(total_steps) - after_warmup} of them warm-up; write a smaller number, or train for longer"
        )
    return decay


def make_schedule(optimizer: Optimizer, schedule: Schedule, total_steps: float) -> LambdaLR:
    """Return the learning-rate schedule, which moves once an optimiser step.

    Raises:
        ConfigError: If the schedule needs the end of a run that has none, or warm-up and decay outlast the run.
    """
    if schedule.name != "constant" and math.isinf(total_steps):
        raise ConfigError(
            f"model.schedule.name: {schedule.name} falls until the end of the run, and this run has none; "
            "use constant, or set trainer.max_epochs or trainer.max_steps"
        )
    warmup, decay = warmup_steps(schedule, total_steps), decay_steps(schedule, total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        done = decay - max(total_steps - step, 0)
        if done <= 0:
            return 1.0
        return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * FALLS[schedule.name](done, decay)

    return LambdaLR(optimizer, factor)


def prepare_states(optimizer_states: list[dict[str, Any]], config: OptimizerConfig, trainer: pl.Trainer | None) -> None:
    """Rename the groups of an older checkpoint, which all had the name of the optimiser, in place.

    Raises:
        ConfigError: If the Trainer resumes a run of another optimiser, whose state does not fit.
    """
    key, now = "name" if config.class_path is None else "class_path", _name(config)
    for group in (group for state in optimizer_states for group in state["param_groups"]):
        if group.get("role") in GROUPS and "kind" not in group:
            group |= {"kind": group["name"], "name": GROUPS[group["role"]]}
        if trainer is not None and trainer.state.fn == "fit":
            former = group.get("kind", now)  # a subclass that brings its own has none
            remedy = f"the run was started with {former}; keep it, or start another run"
            require(former == now, f"model.optimizer.{key}", now, remedy)


def apply_config_to_restored_optimizer(optimizer: Optimizer, scheduler: Any, config: OptimizerConfig) -> None:
    """Set learning rate, weight decay, betas and eps of a restored optimiser to the present configuration.

    Moments and the position in the schedule stay. A scheduler of Lightning's learning-rate finder is left alone.

    Raises:
        ConfigError: If an argument of the optimiser's class has changed.
    """
    if not isinstance(scheduler, LambdaLR):
        return
    kind = None if config.class_path is None else type(optimizer)
    if kind is not None:
        _check_restored_arguments(optimizer)
    scheduler.base_lrs = []
    for group, share in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group |= _settings(config, kind, group["role"])
        scheduler.base_lrs.append(group["lr"])
        group |= {"initial_lr": group["lr"], "lr": group["lr"] * share(scheduler.last_epoch)}


def _check_restored_arguments(optimizer: Optimizer) -> None:
    """Refuse changed arguments: a restored state may lack what another value needs."""
    for name in sorted(inspect.signature(type(optimizer)).parameters.keys() - {"params", "lr", "weight_decay"}):
        now: Any = optimizer.defaults.get(name)
        former: Any = optimizer.param_groups[0].get(name, now)
        same = list(now) == list(former) if isinstance(now, list | tuple) else now == former
        remedy = f"the run was started with {former}; keep it, or start another run"
        require(same, f"model.optimizer.init_args.{name}", now, remedy)
