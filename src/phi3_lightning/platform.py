"""Where the package runs: Linux and macOS on the CPU, and CUDA."""

import sys
from pathlib import Path

import psutil
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


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return the memory of a device that is free, and all of it, in bytes; of a container what it may have.

    Args:
        device: CPU or CUDA device.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
    host = psutil.virtual_memory()
    limit = _CGROUP / "memory.max"
    if not limit.exists() or (allowed := limit.read_text().strip()) == "max":
        return host.available, host.total
    used = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())["anon"]
    return min(host.available, int(allowed) - int(used)), min(host.total, int(allowed))


_CGROUP = Path("/sys/fs/cgroup")
"""Where a container on Linux finds its limits (cgroup v2)."""
