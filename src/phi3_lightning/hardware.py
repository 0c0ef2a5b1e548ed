"""Where the package runs (Linux and macOS on the CPU, and CUDA), under what name, and what a device has."""

import os
import resource
import sys
import time
from pathlib import Path

import psutil
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from phi3_lightning.errors import ConfigError

_PROBE = 1024
"""Side of the square matrices that a CPU is measured on: 2.1 GFLOP, some milliseconds."""

NARROW = 128
"""Hidden size up to which one thread is enough."""

_CGROUP = Path("/sys/fs/cgroup")
"""Where a container on Linux finds its limits (cgroup v2)."""


def check_platform() -> None:
    """Refuse Windows, which is untested."""
    if sys.platform == "win32":
        raise ConfigError("Windows is not supported: run phi3_lightning under WSL 2, which is Linux")


def program() -> str:
    """Return the words with which the user calls the command line."""
    return "python cli.py" if sys.argv[0].endswith("cli.py") else "phi3-lightning"


def check_accelerator(accelerator: str) -> None:
    """Refuse Apple's MPS, which is untested, as the Trainer's ``accelerator`` or the type of a device."""
    if accelerator == "mps" or (accelerator in ("auto", "gpu") and torch.backends.mps.is_available()):
        raise ConfigError(
            f"trainer.accelerator: {accelerator} means Apple's MPS here, which is not supported; set it to cpu"
        )


def limit_threads(width: int) -> None:
    """Use one thread of the CPU for a model this narrow, unless ``OMP_NUM_THREADS`` is set.

    Its products are too small to be shared, and beside another job the threads mostly wait for each other.
    """
    if width <= NARROW and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return the free and the total memory of a device, in bytes; in a container those within its limit."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
    host = psutil.virtual_memory()
    file = _CGROUP / "memory.max"
    if not file.exists() or (limit := file.read_text().strip()) == "max":
        return host.available, host.total
    used = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())["anon"]
    return min(host.available, int(limit) - int(used)), min(host.total, int(limit))


def resident_memory() -> float:
    """Return the bytes of memory that this process has now."""
    return float(psutil.Process().memory_info().rss)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process so far, in bytes; for a CUDA device that on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts no less than the parent held when it started this process
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(fields["VmHWM"].removesuffix("kB"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak operations a second in matrix products: a GPU's by its data sheet, a CPU's measured.

    None for a GPU that Lightning's table lacks, which it warns of.
    """
    if device.type == "cuda":
        return get_available_flops(device, dtype)
    square = torch.ones(_PROBE, _PROBE, dtype=dtype)
    seconds = []
    with torch.inference_mode():
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            square @ square
            seconds.append(time.perf_counter() - start)
    return 2 * _PROBE**3 / min(seconds)
