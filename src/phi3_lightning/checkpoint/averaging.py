"""Lightning's ``WeightAveraging`` and ``EMAWeightAveraging`` over trained weights, beside a frozen base.

The callback copies the whole module, averages every parameter and buffer, and exchanges the copy with the module at
each validation. Rounded averages of frozen weights and of rotary angles are other weights and angles. So the copy
shares the frozen parameters, they are never averaged, and it has no buffer that follows from the configuration.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from phi3_lightning.errors import ConfigError

CURRENT = "current_model_state"
"""Key of the weights that are being trained, in a checkpoint whose ``state_dict`` holds the averaged ones."""

PREFIX = "module."


def check_averaging(trainer: pl.Trainer) -> None:
    """Refuse averaging that cannot work, before anything is loaded.

    Raises:
        ConfigError: If a callback copies a module that is not built yet, or of which each rank has a part.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging):
            raise ConfigError(
                "trainer.callbacks: StochasticWeightAveraging copies the module before its model is loaded, averages "
                "nothing, and puts a schedule of its own in place of model.schedule; use WeightAveraging, whose "
                "default is the same mean of the weights"
            )
        if isinstance(callback, WeightAveraging) and isinstance(trainer.strategy, ModelParallelStrategy):
            raise ConfigError(
                f"trainer.callbacks: {type(callback).__name__} copies the whole module, and a rank of FSDP2 has a "
                "part of it; use trainer.strategy: ddp"
            )


def average_trained_alone(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Restrict the averaging callbacks of a Trainer to trained weights; their copies share the frozen ones."""
    for callback in _averaging(trainer):
        _restrict(callback._average_model, module)


def _averaging(trainer: pl.Trainer) -> list[Any]:
    """The averaging callbacks that have copied the module."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [each for each in callbacks if isinstance(each, WeightAveraging) and each._average_model is not None]


def _restrict(average: AveragedModel, module: pl.LightningModule) -> None:
    frozen = {f"{PREFIX}{name}" for name, parameter in module.named_parameters() if not parameter.requires_grad}
    average.multi_avg_fn, average.avg_fn = _skipping_shared(average), None
    state = module.state_dict()
    if not any(name in state for name, _ in module.named_buffers()):
        for part in average.module.modules():
            for name, _ in list(part.named_buffers(recurse=False, remove_duplicate=False)):
                delattr(part, name)
        average.use_buffers = True  # false would compare the buffers one by one

    def not_missing(_: Any, keys: _IncompatibleKeys) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]

    average.register_load_state_dict_post_hook(not_missing)


def _skipping_shared(model: AveragedModel) -> Callable[[Any, Any, Tensor | int], None]:
    """Return what averages lists of tensors, except those that both lists share."""
    single, several = model.avg_fn or get_swa_avg_fn(), model.multi_avg_fn

    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        pairs = [pair for pair in zip(averaged, current, strict=True) if pair[0].data_ptr() != pair[1].data_ptr()]
        if several is not None and pairs:
            several([average for average, _ in pairs], [weight for _, weight in pairs], count)
            return
        for average, weight in pairs:
            average.copy_(single(average, weight, count))

    return update


@contextmanager
def averaged_weights(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Put the averaged weights into a module for a while, outside of validations; without averaging, do nothing."""
    averaging = _averaging(trainer)
    for callback in averaging:
        callback._swap_models(module)
    try:
        yield
    finally:
        for callback in reversed(averaging):
            callback._swap_models(module)


def has_ended(trainer: pl.Trainer, callback: pl.Callback) -> bool:
    """Return whether averaged weights have left the module before a callback's hook at the end of a validation epoch.

    The averaging callback takes them out in that hook, and the hooks run in the order of the callbacks.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(callbacks.index(each) < callbacks.index(callback) for each in _averaging(trainer))


def settle_averages(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Put averaged and current weights where they belong in a checkpoint that is being written, in place."""
    # a validation exchanges them until it ends, and one that was interrupted does not end
    if CURRENT in checkpoint and trainer.validating and trainer.interrupted:
        checkpoint["state_dict"], checkpoint[CURRENT] = checkpoint[CURRENT], checkpoint["state_dict"]


def choose_weights(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a run that no longer averages resume from the weights that were being trained, in place."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if CURRENT in checkpoint and not any(isinstance(callback, WeightAveraging) for callback in callbacks):
        checkpoint["state_dict"] = checkpoint.pop(CURRENT)
