"""The two checkpoints of a run: the newest, and the best."""

import math
import time
from pathlib import Path
from typing import Any, cast

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


class RunCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``, from which the same command goes on, and ``best.ckpt``.

    ``last.ckpt`` is written on the way, at the end of each epoch and of training, and when the job is asked to stop
    (SIGTERM); ``best.ckpt`` after a validation that was better than all before it. Both are real files, and a folder
    may be moved: only the best value is remembered, no path.

    It is a ``ModelCheckpoint`` since Lightning asks no other class for the files behind ``ckpt_path="last"`` and
    ``"best"``; every hook of that class is replaced, so that nothing else of it saves.

    Args:
        dirpath: Folder of the two files; null: ``checkpoints`` in the run's folder.
        monitor: The metric, lower is better, that decides which checkpoint is the best; null keeps the newest only.
        every_n_steps: Write ``last.ckpt`` every so many optimiser steps; null: by time alone.
        every_n_minutes: Write ``last.ckpt`` when so many minutes have passed since the last time.
        on_mismatch: Whether a checkpoint of another base, tokenizer or adapter is refused, or loaded with a warning.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        monitor: str | None = "val/loss",
        every_n_steps: int | None = None,
        every_n_minutes: float = 5.0,
        on_mismatch: Mismatch = "refuse",
    ) -> None:
        require_choice("checkpoint.on_mismatch", on_mismatch, Mismatch)
        check_metric("checkpoint.monitor", monitor)
        if every_n_steps is not None:
            require(every_n_steps >= 1, "checkpoint.every_n_steps", every_n_steps, "it is at least 1")
        require(every_n_minutes >= 0, "checkpoint.every_n_minutes", every_n_minutes, "it is 0 or more")
        super().__init__(monitor=monitor)
        self.dirpath = None if dirpath is None else local_path("checkpoint.dirpath", dirpath)
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.on_mismatch = on_mismatch
        self.best_score = math.inf
        self._saved_step = 0
        self._saved_at = time.monotonic()
        self._validation_cut = False
        self._warned = False
        if self.dirpath is not None:
            self._look_around()

    @property
    @override
    def state_key(self) -> str:
        return type(self).__qualname__  # and not with options, which may change between two starts

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

    def _look_around(self) -> None:
        """Note which of the two files are there, under the names by which Lightning and scripts ask for them."""
        self.best_model_path = str(self.best_path) if self.best_path.exists() else ""
        self.last_model_path = str(self.last_path) if self.last_path.exists() else ""

    @override
    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        self._settle_in(trainer)
        if self.last_model_path:
            return {self.last_model_path}
        if trainer.state.fn != "fit" and trainer.checkpoint_callbacks == [self]:
            # Lightning would go on with the weights in memory
            raise CheckpointError(f'ckpt_path="last": {self.last_path}: there is no such checkpoint')
        return set()

    def _settle_in(self, trainer: pl.Trainer) -> None:
        if self.dirpath is None:
            self.dirpath = Path(trainer.default_root_dir) / "checkpoints"
        self._look_around()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._settle_in(trainer)
        if isinstance(pl_module, TrainableStateMixin):
            pl_module.on_mismatch = self.on_mismatch

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        if trainer.is_global_zero and not cast("Any", trainer).fast_dev_run:
            self._folder().mkdir(parents=True, exist_ok=True)  # now, and not after the first hour, it is an error

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # what follows an epoch's last batch is saved at the epoch's end, from where Lightning restarts cleanly
        if not trainer.is_last_batch and self._due(trainer):
            self._save_last(trainer)

    def _due(self, trainer: pl.Trainer) -> bool:
        if trainer.global_step == self._saved_step:
            return False
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            return True
        late = time.monotonic() - self._saved_at >= self.every_n_minutes * 60
        return bool(trainer.strategy.broadcast(late))

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            self._warn_not_logged(sorted(trainer.callback_metrics))
        elif score.item() < self.best_score:  # false for NaN
            self._save_best(trainer, score)

    def _warn_not_logged(self, logged: list[str]) -> None:
        if not self._warned:
            rank_zero_warn(
                f"checkpoint.monitor: {self.monitor} is not logged (there are {', '.join(logged)}), and no best.ckpt "
                "is kept"
            )
        self._warned = True

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
            self._validation_cut = trainer.validating
            self._save_last(trainer)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._validation_cut:
            repeat_validation(checkpoint["loops"])

    def _save(self, trainer: pl.Trainer, path: Path) -> None:
        if not cast("Any", trainer).fast_dev_run:  # set in a place that type checkers do not see
            trainer.save_checkpoint(path, weights_only=False)  # False: with optimiser and loops

    def _save_best(self, trainer: pl.Trainer, score: torch.Tensor) -> None:
        self.best_score, self.best_model_score = score.item(), score.detach().clone()
        self._save(trainer, self.best_path)
        self.best_model_path = str(self.best_path)

    def _save_last(self, trainer: pl.Trainer) -> None:
        self._save(trainer, self.last_path)
        self.last_model_path = str(self.last_path)
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "best_score": self.best_score}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["monitor"] == self.monitor:
            self.best_score = state_dict["best_score"]
            self.best_model_score = torch.tensor(self.best_score)
