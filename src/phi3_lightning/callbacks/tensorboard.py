"""Where a logger has a page for text and pictures: TensorBoard's. Other loggers get the numbers alone."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger


def boards(trainer: pl.Trainer) -> Iterator[Any]:
    """Yield the TensorBoard writers of a run, on the rank that writes.

    Args:
        trainer: The Trainer, with any loggers or none.
    """
    if trainer.is_global_zero:
        yield from (logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger))


def step_of(trainer: pl.Trainer) -> int:
    """Return where on the step axis the Trainer puts what it logs now.

    Args:
        trainer: The Trainer.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_scalars(trainer: pl.Trainer, scalars: Mapping[str, float]) -> None:
    """Give numbers to every logger, without the Trainer's bookkeeping of each, which costs more than they do.

    Args:
        trainer: The Trainer.
        scalars: Numbers by name, the same on every rank.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step=step_of(trainer))


def literal(text: str) -> str:
    """Return text as Markdown that shows it as it is, signs and all.

    Args:
        text: Any text.
    """
    return re.sub(r"[^\w\s]|_", lambda sign: f"&#{ord(sign[0])};", text)
