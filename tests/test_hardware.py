"""Unsupported platforms are refused in one sentence; memory and peak FLOPs of a device are measured."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from phi3_lightning import hardware
from phi3_lightning.errors import ConfigError
from phi3_lightning.hardware import (
    check_accelerator,
    check_platform,
    device_memory,
    limit_threads,
    peak_flops,
    peak_memory,
    resident_memory,
)


@pytest.fixture
def mps(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


def test_windows_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ConfigError, match="Windows is not supported"):
        check_platform()


@pytest.mark.parametrize("accelerator", ["auto", "gpu", "mps"])
def test_mps_is_refused_however_it_is_requested(mps, accelerator):
    with pytest.raises(ConfigError, match=rf"trainer\.accelerator: {accelerator} .*MPS.*set it to cpu"):
        check_accelerator(accelerator)


def test_a_mac_trains_on_its_cpu(mps, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    check_platform()
    check_accelerator("cpu")


@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cpu", "cuda"])
def test_linux_is_accepted(monkeypatch, accelerator):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    check_platform()
    check_accelerator(accelerator)


CPU = torch.device("cpu")


def test_the_memory_of_a_host_is_what_the_system_says(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    for limit in (None, "max\n"):
        if limit:
            (tmp_path / "memory.max").write_text(limit)
        free, total = device_memory(CPU)
        assert total == psutil.virtual_memory().total
        assert 0 < free <= total


def test_container_memory_is_its_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("500000000\n")
    (tmp_path / "memory.stat").write_text("anon 120000000\nfile 300000000\nkernel 1\n")
    assert device_memory(CPU) == (380_000_000, 500_000_000)  # the file cache is released when memory is requested


def test_reserved_but_unused_gpu_memory_counts_as_free(monkeypatch):
    for name, value in (("mem_get_info", (10, 80)), ("memory_reserved", 7), ("memory_allocated", 4)):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert device_memory(torch.device("cuda")) == (13, 80)


def test_process_memory_is_plausible():
    assert 1e8 < resident_memory() < 1e11


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux reports the peak there")
def test_peak_memory_is_that_of_the_process():
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    # both count pages, but one of them per thread with occasional sums
    assert peak_memory(torch.device("cpu")) == pytest.approx(peak, rel=0.02)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere the peak is that of getrusage")
def test_peak_memory_excludes_that_of_the_parent():
    child = (
        "import resource, torch; from phi3_lightning.hardware import peak_memory;"
        "print(peak_memory(torch.device('cpu')), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    held = b"1" * (2 * 10**9)
    found = subprocess.run([sys.executable, "-c", child], check=True, capture_output=True, text=True).stdout
    peak, by_getrusage = map(int, found.split())
    assert peak < len(held) / 2
    assert by_getrusage >= len(held)  # which is why getrusage is not used on Linux


def test_peak_flops_of_a_cpu_are_plausible():
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e15


def test_peak_flops_of_a_gpu_are_those_of_its_data_sheet(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == pytest.approx(989e12, rel=1e-3)


@pytest.mark.parametrize(("width", "variable", "threads"), [(64, None, 1), (3072, None, 2), (64, "2", 2)])
def test_a_narrow_model_uses_one_thread_unless_the_user_says_otherwise(monkeypatch, width, variable, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        limit_threads(width)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def huge_pages(**env: str) -> int:
    """Return how many kB of a tensor of 256 MB are in huge pages, in a process that has imported the package."""
    code = (
        "import phi3_lightning, torch; filled = torch.ones(2**26); rollup = open('/proc/self/smaps_rollup').read(); "
        "print(rollup.split('AnonHugePages:')[1].split()[0])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**os.environ, **env}
    )
    return int(run.stdout)


@pytest.mark.slow
def test_large_tensors_are_in_huge_pages(monkeypatch):
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("huge pages are for all allocations here, or for none")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    assert huge_pages() >= 2**17  # half of it at least: memory may be fragmented
    assert huge_pages(THP_MEM_ALLOC_ENABLE="0") < 2**17  # what the user has set counts
