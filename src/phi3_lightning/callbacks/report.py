"""Summary of a run in the terminal: before the first step, and at its end."""

import math
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.table import Table
from typing_extensions import override

from phi3_lightning import optim
from phi3_lightning.module import Phi3LoRAModule
from phi3_lightning.progress import table_console

MIN_EFFECTIVE_CHANGE = 1e-3
"""Total change of an adapter value, about the learning rate times steps, below which a LoRA changes no answer."""

VALIDATION_METRICS = (
    "val/loss", "val/token_accuracy", "val/preference_accuracy", "val/ranking_accuracy", "val/reward_margin",
    "val/rougeL", "val/chrf", "val/exact_match", "val/stop_rate",
)  # fmt: skip


class RunReport(pl.Callback):
    """Prints what is trained and for how long, and at the end the results and where they are."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._console = table_console()
        self._titles = "first", "last"
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Phi3LoRAModule) -> None:  # type: ignore[override]
        steps = trainer.estimated_stepping_batches
        schedule = pl_module.schedule
        phases = f"{optim.warmup_steps(schedule, steps)} of them warm-up"
        if schedule.name == "wsd":
            phases += f", the last {optim.decay_steps(schedule, steps)} decay"
        self._warn_if_too_short(pl_module, steps)
        self._print_coverage(pl_module)
        accumulated = trainer.accumulate_grad_batches
        self._print(
            f"{trainer.num_training_batches} batches an epoch, {accumulated} to an optimiser step; "
            f"{steps} optimiser steps, {phases}; "
            f"starting at epoch {trainer.current_epoch}, step {trainer.global_step}"
        )

    def _warn_if_too_short(self, module: Phi3LoRAModule, steps: float) -> None:
        if module.optimizer_config.class_path is not None:  # AdamW moves a value by about the learning rate
            return
        schedule = module.schedule
        share = 1.0 if schedule.name in ("constant", "wsd") else 0.5 * (1 + schedule.min_lr_ratio)  # the mean
        lr = module.optimizer_config.lr
        if steps * share * lr < MIN_EFFECTIVE_CHANGE:
            rank_zero_warn(
                f"{steps} optimiser steps at model.optimizer.lr {lr:g} move an adapter value by about "
                f"{steps * share * lr:.1e} at most, and the answers will not change. LoRA learns at 1e-4 to 5e-4"
            )

    def _print_coverage(self, module: Phi3LoRAModule) -> None:
        table = Table(title=f"LoRA by {module.lora.backend}")
        for column in ("layer or slice", "adapted", "rank", "parameters"):
            table.add_column(column, justify="left" if column == "layer or slice" else "right")
        for entry in module.coverage():
            ranks = ", ".join(map(str, entry.ranks))
            table.add_row(entry.layer, f"{entry.adapted} of {entry.existing}", ranks, f"{entry.parameters:,}")
        self._print(table)
        trained = sum(parameter.numel() for parameter in module.trained_parameters())
        total = sum(parameter.numel() for parameter in module.parameters())
        self._print(f"trainable {trained:,} of {total:,} parameters ({trained / total:.2%})")

    @override
    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if math.isinf(trainer.num_sanity_val_steps):  # all of the validation data, before the first step
            self._first, self._titles = _validation_metrics(trainer), ("before", "after")

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._last = _validation_metrics(trainer)
            if self._titles[0] == "first":
                self._first = self._last | self._first

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: Phi3LoRAModule) -> None:  # type: ignore[override]
        if self._last:
            table = Table(title="held-out rows")
            for column in ("", *self._titles):
                table.add_column(column, justify="right" if column else "left")
            for name in self._last:
                first = f"{self._first[name]:.4f}" if name in self._first else ""  # the sanity check answers nothing
                table.add_row(name, first, f"{self._last[name]:.4f}")
            self._print(table)
        last = self.folder / "checkpoints" / "last.ckpt"
        if last.is_file():
            self._print(f"checkpoint: {last} ({last.stat().st_size / 1e6:.1f} MB)")
        if (self.folder / "tensorboard").is_dir():
            self._print(f"curves:     tensorboard --logdir {self.folder / 'tensorboard'}")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn != "fit" or not isinstance(exception, KeyboardInterrupt | SIGTERMException):
            return
        where = f"stopped at step {trainer.global_step}"
        last = self.folder / "checkpoints" / "last.ckpt"
        if isinstance(exception, SIGTERMException):  # upon which RunCheckpoint saves
            self._print(f"{where}; the same command resumes there, unless trainer.enable_checkpointing is false")
        elif last.is_file():
            self._print(f"{where}; the same command resumes from {last}, which may be some steps older")
        else:
            self._print(f"{where}, before the first checkpoint; the same command begins again")

    @rank_zero_only
    def _print(self, content: str | Table) -> None:
        self._console.print(content, highlight=False)


def _validation_metrics(trainer: pl.Trainer) -> dict[str, float]:
    return {
        name: trainer.callback_metrics[name].item() for name in VALIDATION_METRICS if name in trainer.callback_metrics
    }
