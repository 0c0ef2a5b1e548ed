"""Where the package runs: Linux and macOS on the CPU, and CUDA."""

import sys

import torch

from phi3_lightning.errors import ConfigError


def check_platform(accelerator: str = "auto") -> None:
    """Refuse a machine or device that nothing here was tried on.

    Args:
        accelerator: The Trainer's accelerator, as the user wrote it.

    Raises:
        ConfigError: On Windows, or where the run would use Apple's MPS.
    """
    if sys.platform == "win32":
        raise ConfigError("Windows is not supported: run phi3_lightning under WSL 2, which is Linux")
    if accelerator == "mps" or (accelerator in ("auto", "gpu") and torch.backends.mps.is_available()):
        raise ConfigError(
            f"trainer.accelerator: {accelerator} means Apple's MPS here, which is not supported; set it to cpu"
        )
