"""Curves of a fit in the output of a notebook's cell."""

from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from phi3_lightning.config.checks import require
from phi3_lightning.errors import ConfigError
from phi3_lightning.event_files import Series
from phi3_lightning.pages import curves

NAMES = ("train/loss", "val/loss")


class LiveCurve(pl.Callback):
    """Draws ``train/loss`` and ``val/loss`` in a notebook, while the Trainer fits.

    Args:
        every_n_steps: Optimiser steps between two pictures.
    """

    def __init__(self, every_n_steps: int = 5) -> None:
        require(every_n_steps >= 1, "every_n_steps", every_n_steps, "give 1 or more")
        self.every_n_steps = every_n_steps
        self.series: dict[str, Series] = {}
        self._display: Any = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        try:
            from IPython.display import HTML, display
        except ImportError:
            raise ConfigError("LiveCurve: IPython is not installed; install the extra notebook") from None
        self.series = {name: [] for name in NAMES}
        self._html = HTML
        self._display = display(HTML(""), display_id=True) if trainer.is_global_zero else None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._note(trainer, "train/loss") and trainer.global_step % self.every_n_steps == 0:
            self._draw()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and self._note(trainer, "val/loss"):
            self._draw()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw()

    def _note(self, trainer: pl.Trainer, name: str) -> bool:
        """Note the metric of this step, once, and return whether there is one."""
        value = trainer.callback_metrics.get(name)
        points = self.series[name]
        if value is None or (points and points[-1][0] == trainer.global_step):
            return False
        points.append((trainer.global_step, float(value)))
        return True

    def _draw(self) -> None:
        series = {name: points for name, points in self.series.items() if points}
        if series and self._display is not None:
            # a stored notebook has the last picture alone
            self._display.update(self._html(f'<div style="max-width: 640px">{curves.draw(series)}</div>'))
