"""Size and rank of the adapter's LoRA delta, and its gradient, layer by layer."""

import math
from collections import defaultdict
from statistics import fmean

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from phi3_lightning.adapters.statistics import Statistics
from phi3_lightning.callbacks.tensorboard import log_scalars
from phi3_lightning.config.checks import require
from phi3_lightning.module import Phi3LoRAModule


class AdapterStatistics(pl.Callback):
    """Logs norm and effective rank of the updates, and the norm of the gradient before clipping, every so many steps.

    ``adapter/relative_norm/q_proj`` is the mean over the layers of the norm of the update of ``q_proj`` divided by that
    of its weight, ``adapter/effective_rank/q_proj`` that of :attr:`~.statistics.LoraDelta.effective_rank`, and
    ``adapter/grad_norm/qkv_proj`` the norm of the gradient of all adapters on such layers in the optimiser step, over
    the whole accumulation window and all ranks. ``adapter_layers/...`` has the same for each layer, by number.
    With DoRA the update is that of the direction, without the magnitude.

    Args:
        every_n_steps: Optimiser steps between two measurements; the first is at the first step.
    """

    def __init__(self, every_n_steps: int = 25) -> None:
        require(every_n_steps >= 1, "monitor.adapter_every_n_steps", every_n_steps, "it is at least 1, or null")
        self.every_n_steps = every_n_steps
        self._statistics: Statistics | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Phi3LoRAModule) -> None:  # type: ignore[override]
        self._statistics = None
        if trainer.loggers:
            self._statistics = pl_module.adapter_statistics()
        if pl_module.quantization in ("int8", "int8_dynamic"):
            rank_zero_info("adapter/relative_norm is not logged: the norms of a base in 8 bits are not known")

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._statistics is not None and trainer.global_step % self.every_n_steps == 0:
            log_scalars(trainer, scalars(self._statistics))


def scalars(statistics: Statistics) -> dict[str, float]:
    """Measure the statistics; return them by the names under which they are logged."""
    single: dict[str, float] = {}
    kinds: dict[str, list[float]] = defaultdict(list)
    for delta in statistics.deltas():
        for name, value in (("relative_norm", delta.relative_norm), ("effective_rank", delta.effective_rank)):
            if value is not None:
                kinds[f"{name}/{delta.slice}"].append(value)
                single[f"{name}/{_short(delta.layer, delta.slice)}"] = value
    means = {name: fmean(values) for name, values in kinds.items()}
    norms: dict[str, list[float]] = defaultdict(list)
    for path, norm in statistics.gradient_norms().items():
        kind = path.rpartition(".")[2]
        norms[f"grad_norm/{kind}"].append(norm)
        single[f"grad_norm/{_short(path, kind)}"] = norm
    means |= {name: math.hypot(*values) for name, values in norms.items()}
    return {f"adapter/{name}": value for name, value in means.items()} | {
        f"adapter_layers/{name}": value for name, value in single.items()
    }


def _short(path: str, name: str) -> str:
    """``03.q_proj`` for ``model.layers.3.self_attn.qkv_proj`` and ``q_proj``; such names sort as the layers do."""
    number = next((f"{int(part):02}." for part in path.split(".") if part.isdigit()), "")
    return number + name
