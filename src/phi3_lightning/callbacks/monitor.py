"""The options of monitoring, and the callbacks that they stand for."""

from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl

from phi3_lightning.callbacks.adapter_statistics import AdapterStatistics
from phi3_lightning.callbacks.bad_rows import BadRows
from phi3_lightning.callbacks.base_drift import BaseDrift
from phi3_lightning.callbacks.samples import Samples
from phi3_lightning.callbacks.tensorboard_samples import TensorBoardSamples
from phi3_lightning.callbacks.throughput import Throughput
from phi3_lightning.config.checks import require

GENERAL = Path(__file__).parents[1] / "assets" / "general.jsonl"
"""Short chats of general knowledge and manners, in the format ``messages``."""


@dataclass(frozen=True)
class Monitor:
    """What is shown of a run besides its losses."""

    adapter_every_n_steps: int | None = 25
    """Optimiser steps between measurements of the norm and effective rank of the updates, and of gradients by layer;
    null: never."""
    base_drift: bool = True
    """Whether each validation compares the tuned model with its base on general chats."""
    general: str | list[str] | None = None
    """Chats on which drift from the base is measured, in any format of data.train; null: those of the package."""
    samples: int = 3
    """Number of prompts that base and tuned model answer at each validation, from data.predict or else from the
    validation data; 0: none."""
    sample_tokens: int = 64
    """Longest such answer, in tokens."""
    rows: int = 3
    """Number of rows of the first training batch that TensorBoard shows with the trained tokens marked; 0: none."""

    def __post_init__(self) -> None:
        """Refuse chats that nothing reads; the callbacks check the other options."""
        require(self.base_drift or self.general is None, "monitor.general", self.general, "monitor.base_drift is false")

    def callbacks(
        self, general: pl.LightningDataModule, row_length: int | None, *, from_predict: bool
    ) -> list[pl.Callback]:
        """Return the callbacks; ``row_length`` is the most tokens of a packed row, None where rows are not packed."""
        callbacks: list[pl.Callback] = [Throughput(row_length), BadRows()]
        if self.adapter_every_n_steps is not None:
            callbacks.append(AdapterStatistics(self.adapter_every_n_steps))
        if self.base_drift:
            callbacks.append(BaseDrift(general))
        return [*callbacks, Samples(self.samples, self.sample_tokens, from_predict), TensorBoardSamples(self.rows)]
