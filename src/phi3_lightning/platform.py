"""Where the package runs: Linux and macOS on the CPU, and CUDA."""

import sys

import torch

from phi3_lightning.errors import ConfigError


def check_platform() -> None:
    """Refuse an operating system that nothing here was tried on.

    Raises:
        ConfigError: On Windows.
    """
    if sys.platform == "win32":
        raise ConfigError("Windows is not supported: run phi3_lightning under WSL 2, which is Linux")


def check_accelerator(accelerator: str) -> None:
    """Refuse a device that nothing here was tried on.

    Args:
        accelerator: The Trainer's accelerator as the user wrote it, or the type of a device.

    Raises:
        ConfigError: Where the run would use Apple's MPS.
    """
    if accelerator == "mps" or (accelerator in ("auto", "gpu") and torch.backends.mps.is_available()):
        raise ConfigError(
            f"trainer.accelerator: {accelerator} means Apple's MPS here, which is not supported; set it to cpu"
        )
