"""TensorBoard's pages for text, which other loggers do not have; all loggers get the numbers."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger


def boards(trainer: pl.Trainer) -> Iterator[Any]:
    """Yield the TensorBoard writers of a Trainer, on the rank that writes."""
    if trainer.is_global_zero:
        yield from (logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger))


def step_of(trainer: pl.Trainer) -> int:
    """Return the step at which the Trainer logs now."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_scalars(trainer: pl.Trainer, scalars: Mapping[str, float]) -> None:
    """Log numbers, the same on every rank, to every logger, without the Trainer's costly bookkeeping of each."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step=step_of(trainer))


def literal(text: str) -> str:
    """Return text as Markdown in which every sign is escaped."""
    return re.sub(r"[^\w\s]|_", lambda sign: f"&#{ord(sign[0])};", text)
