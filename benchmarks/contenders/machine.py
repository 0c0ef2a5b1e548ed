"""What a result has to say about where it comes from."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import psutil
import torch

REPOSITORY = Path(__file__).parents[2]


def provenance() -> dict[str, str]:
    """Return machine, load, date and commit of this run."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in cpus if line.startswith("model name")), platform.processor())
    git = ["git", "-C", str(REPOSITORY)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=False, capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain"], check=False, capture_output=True, text=True).stdout
    found = {
        "machine": f"{cpu}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB",
        "load before": f"{os.getloadavg()[0]:.2f}",
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "commit": commit.stdout.strip() + (" with changes" if changed else ""),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
