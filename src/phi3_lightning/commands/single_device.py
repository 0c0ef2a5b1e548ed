"""A Trainer on one device, for commands that are no run: it writes nothing, and computes as a run would."""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from phi3_lightning.checkpoint.io import SafeCheckpointIO
from phi3_lightning.hardware import check_accelerator


def single_device_trainer(section: Mapping[str, Any], folder: str, **options: Any) -> pl.Trainer:
    """Return a Trainer with the device and the precision of a configuration.

    Args:
        section: The section ``trainer`` of a configuration.
        folder: Where it would write, if it wrote anything.
        **options: Further options of the Trainer.

    Raises:
        ConfigError: If the device is none that the package runs on.
    """
    accelerator, devices = section.get("accelerator") or "auto", section.get("devices")
    check_accelerator(accelerator)
    return pl.Trainer(
        accelerator=accelerator,
        devices=devices[:1] if isinstance(devices, list) else 1,
        precision=section.get("precision"),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[SafeCheckpointIO()],
        **options,
    )


def quieten() -> None:
    """Leave out what Lightning says about data and Trainers; what counts is in the command's own tables."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers", UserWarning)
    warnings.filterwarnings("ignore", ".*smaller than the logging interval", UserWarning)
    warnings.filterwarnings("ignore", "You defined a `validation_step` but have no", UserWarning)
