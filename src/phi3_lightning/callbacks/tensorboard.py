"""What loggers get besides numbers: text and tables, for TensorBoard, W&B and MLflow. All others get the numbers."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

WRAPPED = "<style>pre {white-space: pre-wrap}</style>\n"
"""Lets long lines of a page wrap, where a page may have a style."""


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


def log_page(trainer: pl.Trainer, name: str, page: str, step: int) -> None:
    """Log a text with HTML in it: TensorBoard and W&B show it, MLflow has it as a file among the run's artifacts."""
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, page, step)
        elif isinstance(logger, WandbLogger):
            from wandb import Html

            logger.log_metrics({name: Html(WRAPPED + page)}, step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(logger.run_id, WRAPPED + page, f"{name}.html")


def log_table(trainer: pl.Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
    """Log a table of texts: TensorBoard has one for each step, W&B and MLflow have the step as a column."""
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, TensorBoardLogger):
            lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(literal(text).replace(chr(10), '<br>') for text in row)} |" for row in rows]
            logger.experiment.add_text(name, "\n".join(lines), step)
        elif isinstance(logger, WandbLogger):
            logger.log_table(name, ["step", *columns], [[step, *row] for row in rows], step=step)
        elif isinstance(logger, MLFlowLogger):
            values = zip(*[(step, *row) for row in rows], strict=True)
            data = {column: list(cells) for column, cells in zip(("step", *columns), values, strict=True)}
            logger.experiment.log_table(logger.run_id, data, f"{name}.json")


def literal(text: str) -> str:
    """Return text as Markdown in which every sign is escaped."""
    return re.sub(r"[^\w\s]|_", lambda sign: f"&#{ord(sign[0])};", text)
