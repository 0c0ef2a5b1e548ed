"""Progress of the Trainer where there is no terminal."""

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override


class LineProgress(ProgressBar):
    """Logs a plain line with step, loss and speed at intervals.

    Args:
        every_n_seconds: Least time between two lines.
    """

    def __init__(self, every_n_seconds: float = 10.0) -> None:
        super().__init__()
        self.every_n_seconds = every_n_seconds
        self._last_line = 0.0
        self._enabled = True

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = time.monotonic() - self._last_line >= self.every_n_seconds or trainer.is_last_batch
        if self._enabled and due:
            self._last_line = time.monotonic()
            rank_zero_info(
                f"epoch {trainer.current_epoch}, batch {batch_idx + 1}/{trainer.num_training_batches}, "
                f"step {trainer.global_step}{_format(self.get_metrics(trainer, pl_module))}"
            )

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._enabled and not trainer.sanity_checking:
            rank_zero_info(f"step {trainer.global_step}, validated{_format(self.get_metrics(trainer, pl_module))}")


def _format(metrics: dict[str, Any]) -> str:
    numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
    texts = (f"{name} {value:,.0f}" if value >= 100 else f"{name} {value:.4g}" for name, value in numbers.items())
    return ": " + ", ".join(texts) if numbers else ""
