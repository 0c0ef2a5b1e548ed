"""Callbacks, logger and plugins of the Trainer of a run."""

import sys
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO

from phi3_lightning.callbacks import (
    AgreedStop,
    AutoBatchSize,
    AutoCheckpointing,
    LineProgress,
    Monitor,
    OutOfMemory,
    PredictionWriter,
    PurgeOvertaken,
    RankFailure,
    RunReport,
    SingleWriter,
)
from phi3_lightning.callbacks.monitor import GENERAL
from phi3_lightning.checkpoint.io import SafeCheckpointIO
from phi3_lightning.config.data import DataConfig
from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.run_folder import RunFolder


def run_callbacks(
    section: Namespace, folder: RunFolder, writer: SingleWriter, *further: pl.Callback
) -> list[pl.Callback]:
    """Return the callbacks of a run in their order, with those of the section ``trainer``."""
    # the automatic ones come before the user's, which see what they decide
    callbacks = [writer, PurgeOvertaken(), AutoBatchSize(), AutoCheckpointing(), *(section.callbacks or []), *further]
    callbacks += [RunReport(folder.path), PredictionWriter(folder.predictions)]
    wants_bar = section.enable_progress_bar is not False and not section.barebones
    if wants_bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
        callbacks.append(RichProgressBar() if sys.stdout.isatty() else LineProgress())
    return [*callbacks, AgreedStop(), OutOfMemory(), RankFailure()]


def run_logger(section: Namespace, folder: RunFolder, *, fit: bool) -> bool | Logger | list[Logger]:
    """Return the logger of the section ``trainer``, or TensorBoard for fit; other commands print their metrics."""
    logger: bool | Logger | list[Logger] = section.logger
    if logger is None:
        logger = fit and not section.barebones
    if logger is True and not section.barebones:
        return TensorBoardLogger(folder.path, name="", version="", sub_dir="tensorboard", default_hp_metric=False)
    return logger


def run_plugins(section: Namespace) -> list[Any]:
    """Return the plugins of the section ``trainer``, with ours for checkpoints unless it has one."""
    plugins = section.plugins or []
    plugins = plugins if isinstance(plugins, list) else [plugins]
    return plugins if any(isinstance(plugin, CheckpointIO) for plugin in plugins) else [*plugins, SafeCheckpointIO()]


def general_chats(monitor: Monitor, options: DataConfig) -> ChatDataModule:
    """Return the chats on which drift from the base is measured, read with the run's data options."""
    return ChatDataModule(
        val=monitor.general or str(GENERAL),
        tokenizer=options.tokenizer,
        revision=options.revision,
        chat_template=options.chat_template,
        system=options.system,
        tools=options.tools,
        special_text=options.special_text,
        max_length=options.max_length,
        truncation="truncate_end",
        batch_size=options.batch_size,
        num_workers=0,
        cache_dir=options.cache_dir,
    )
