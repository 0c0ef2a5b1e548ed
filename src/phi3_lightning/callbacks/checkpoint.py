"""The two checkpoints of a run: the newest and the best."""

import math
import time
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from phi3_lightning.checkpoint.identity import Mismatch
from phi3_lightning.checkpoint.mixin import TrainableStateMixin
from phi3_lightning.checkpoint.resume import repeat_validation
from phi3_lightning.config.checks import require, require_choice
from phi3_lightning.errors import CheckpointError
from phi3_lightning.files import local_path
from phi3_lightning.renamed import check_metric

HIGHER_IS_BETTER = (
    "accuracy", "/reward_margin", "/chosen_logp", "/rougeL", "/chrf", "/exact_match", "/stop_rate",
)  # fmt: skip
"""What the names of metrics end with of which the highest value is the best, unless a mode is given."""

Mode = Literal["min", "max"]


class RunCheckpoint(ModelCheckpoint):
    """Writes ``last.ckpt``, from which the same command resumes, and ``best.ckpt``.

    ``last.ckpt`` is written at intervals, at the end of each epoch and of training, and on SIGTERM; ``best.ckpt`` after
    a validation that was better than all before it. Both are real files, and the folder may be moved: the callback
    stores the best value and no path.

    It is a ``ModelCheckpoint`` because Lightning uses no other class to find the files of ``ckpt_path="last"`` and
    ``"best"``; every hook of that class is replaced, so that it saves nothing else.

    Args:
        dirpath: Folder of the two files; null: ``checkpoints`` in the run's folder.
        monitor: The metric that decides which checkpoint is the best; null: only the newest is kept.
        mode: Whether the lowest value is the best (min) or the highest (max); null: the highest of accuracies,
            reward_margin, chosen_logp, rougeL, chrf, exact_match and stop_rate, and the lowest of all others.
        every_n_steps: Optimiser steps after which ``last.ckpt`` is written; null: by time alone.
        every_n_minutes: Minutes since the last time after which ``last.ckpt`` is written.
        on_mismatch: Whether a checkpoint of another base, tokenizer or adapter is refused, or loaded with a warning.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        monitor: str | None = "val/loss",
        mode: Mode | None = None,
        every_n_steps: int | None = None,
        every_n_minutes: float = 5.0,
        on_mismatch: Mismatch = "refuse",
    ) -> None:
        require_choice("checkpoint.on_mismatch", on_mismatch, Mismatch)
        if mode is not None:
            require_choice("checkpoint.mode", mode, Mode)
        check_metric("checkpoint.monitor", monitor)
        if every_n_steps is not None:
            require(every_n_steps >= 1, "checkpoint.every_n_steps", every_n_steps, "it is at least 1")
        require(every_n_minutes >= 0, "checkpoint.every_n_minutes", every_n_minutes, "it is 0 or more")
        super().__init__(monitor=monitor, mode=mode or _mode_of(monitor))
        self.dirpath = None if dirpath is None else local_path("checkpoint.dirpath", dirpath)
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.on_mismatch = on_mismatch
        self.mode_by_name = mode is None
        self.best_score = -math.inf if self.mode == "max" else math.inf
        self._saved_step = 0
        self._saved_at = time.monotonic()
        self._validation_interrupted = False
        self._warned = False
        if self.dirpath is not None:
            self._find_files()

    @property
    @override
    def state_key(self) -> str:
        return type(self).__qualname__  # without options, which may change between two starts

    @property
    def last_path(self) -> Path:
        """Where the newest checkpoint is."""
        return self._folder() / "last.ckpt"

    @property
    def best_path(self) -> Path:
        """Where the best checkpoint is."""
        return self._folder() / "best.ckpt"

    def _folder(self) -> Path:
        if self.dirpath is None:
            raise ValueError("RunCheckpoint: dirpath is not known before the run starts")
        return Path(self.dirpath)

    def _find_files(self) -> None:
        """Set the paths of the existing files in the attributes that Lightning and scripts read."""
        self.best_model_path = str(self.best_path) if self.best_path.exists() else ""
        self.last_model_path = str(self.last_path) if self.last_path.exists() else ""

    @override
    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        self._set_folder(trainer)
        if self.last_model_path:
            return {self.last_model_path}
        if trainer.state.fn != "fit" and trainer.checkpoint_callbacks == [self]:
            # Lightning would continue with the weights in memory
            raise CheckpointError(f'ckpt_path="last": {self.last_path}: there is no such checkpoint')
        return set()

    def _set_folder(self, trainer: pl.Trainer) -> None:
        if self.dirpath is None:
            self.dirpath = Path(trainer.default_root_dir) / "checkpoints"
        self._find_files()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._set_folder(trainer)
        if isinstance(pl_module, TrainableStateMixin):
            pl_module.on_mismatch = self.on_mismatch

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        if trainer.is_global_zero and not cast("Any", trainer).fast_dev_run:
            self._folder().mkdir(parents=True, exist_ok=True)  # an error comes now, and not after the first hour

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # after an epoch's last batch it is saved at the epoch's end, from where Lightning restarts cleanly
        if not trainer.is_last_batch and self._due(trainer):
            self._save_last(trainer)

    def _due(self, trainer: pl.Trainer) -> bool:
        if trainer.global_step == self._saved_step:
            return False
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            return True
        overdue = time.monotonic() - self._saved_at >= self.every_n_minutes * 60
        return bool(trainer.strategy.broadcast(overdue))

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is not None and self._is_better(score.item()):
            self.best_score, self.best_model_score = score.item(), score.detach().clone()
            self._save(trainer, self.best_path)
            self.best_model_path = str(self.best_path)
        elif score is None and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"checkpoint.monitor: {self.monitor} is not logged (there are "
                f"{', '.join(sorted(trainer.callback_metrics))}), and no best.ckpt is kept"
            )

    def _is_better(self, score: float) -> bool:  # false for NaN
        return score > self.best_score if self.mode == "max" else score < self.best_score

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save_last(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self._saved_step:
            self._save_last(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # any other exception may have come in the middle of a step
        if isinstance(exception, SIGTERMException) and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validation_interrupted = trainer.validating
            self._save_last(trainer)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._validation_interrupted:
            repeat_validation(checkpoint["loops"])

    def _save(self, trainer: pl.Trainer, path: Path) -> None:
        if not cast("Any", trainer).fast_dev_run:  # set where type checkers do not see it
            trainer.save_checkpoint(path, weights_only=False)  # False: with optimiser and loops

    def _save_last(self, trainer: pl.Trainer) -> None:
        self._save(trainer, self.last_path)
        self.last_model_path = str(self.last_path)
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "mode": self.mode, "best_score": self.best_score}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        former = state_dict["monitor"], state_dict.get("mode") or _mode_of(state_dict["monitor"])
        if former == (self.monitor, self.mode):
            self.best_score = state_dict["best_score"]
            self.best_model_score = torch.tensor(self.best_score)


def _mode_of(monitor: str | None) -> Mode:
    """The mode where none is given, and of checkpoints that were written before there was a choice."""
    return "max" if (monitor or "").endswith(HIGHER_IS_BETTER) else "min"
