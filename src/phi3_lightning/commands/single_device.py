"""A Trainer on one device that writes nothing, for commands that have no run folder."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from phi3_lightning.checkpoint.io import SafeCheckpointIO
from phi3_lightning.hardware import check_accelerator


def single_device_trainer(section: Mapping[str, Any], folder: str, **options: Any) -> pl.Trainer:
    """Return a Trainer with the device and the precision of a section ``trainer``.

    Raises:
        ConfigError: If the package does not run on the device.
    """
    accelerator, devices = section.get("accelerator") or "auto", device_list(section.get("devices"))
    check_accelerator(accelerator)
    return pl.Trainer(
        accelerator=accelerator,
        devices=devices[:1] if devices else 1,
        precision=section.get("precision"),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[SafeCheckpointIO()],
        **options,
    )


def device_list(devices: Any) -> list[int] | None:
    """Return the devices that ``trainer.devices`` lists, such as [1, 2] or "1,2"; None where it gives a number."""
    if isinstance(devices, str) and "," in devices:
        return [int(index) for index in devices.split(",") if index.strip()]
    return devices if isinstance(devices, list) else None
