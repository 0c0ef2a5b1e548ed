"""The class that ``model.optimizer.class_path`` names, and whether it takes the section's options."""

import difflib
import importlib
import inspect
from typing import Any, cast

from torch.optim import Optimizer

from phi3_lightning.config import Optimizer as OptimizerConfig
from phi3_lightning.config.checks import require
from phi3_lightning.errors import ConfigError


def optimizer_class(config: OptimizerConfig) -> type[Optimizer]:
    """Return the class of ``model.optimizer.class_path``.

    Raises:
        ConfigError: If there is no such class, it cannot train here, or it lacks an option that is set.
    """
    path = cast("str", config.class_path)
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"model.optimizer.class_path: {path!r} cannot be imported: {error}; install its package, or correct it"
        ) from None
    for valid, reason in (
        (isinstance(kind, type) and issubclass(kind, Optimizer), "it is no subclass of torch.optim.Optimizer"),
        (not _needs_closure(kind), "it computes the loss several times in a step; use one that computes it once"),
        (
            not (hasattr(kind, "train") and hasattr(kind, "eval")),
            "it must be switched between training and evaluation, which Lightning does not do; use another, with "
            "model.schedule.name: wsd",
        ),
    ):
        require(valid, "model.optimizer.class_path", path, reason)
    _check_arguments(kind, config)
    return cast("type[Optimizer]", kind)


def _needs_closure(kind: Any) -> bool:
    closure = inspect.signature(kind.step).parameters.get("closure") if hasattr(kind, "step") else None
    return closure is not None and closure.default is inspect.Parameter.empty


def accepts(kind: type[Optimizer], name: str) -> bool:
    """Return whether the constructor of a class takes an argument."""
    parameters = inspect.signature(kind).parameters
    return name in parameters or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())


def _check_arguments(kind: type[Optimizer], config: OptimizerConfig) -> None:
    require(accepts(kind, "lr"), "model.optimizer.class_path", config.class_path, "its class has no argument lr")
    valid = config.weight_decay == 0 or accepts(kind, "weight_decay")
    remedy = f"{config.class_path} has no weight decay; set it to 0"
    require(valid, "model.optimizer.weight_decay", config.weight_decay, remedy)
    known = [name for name in inspect.signature(kind).parameters if name not in ("params", "lr", "weight_decay")]
    for name in config.init_args:
        if name == "params" or not accepts(kind, name):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"model.optimizer.init_args.{name}: {config.class_path} has no such argument; {hint}")
