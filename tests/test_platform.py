"""Where the package does not run is said in one sentence."""

import sys

import pytest
import torch

from phi3_lightning.errors import ConfigError
from phi3_lightning.platform import check_accelerator, check_platform


@pytest.fixture
def mps(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


def test_windows_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ConfigError, match="Windows is not supported"):
        check_platform()


@pytest.mark.parametrize("accelerator", ["auto", "gpu", "mps"])
def test_mps_is_refused_however_it_is_asked_for(mps, accelerator):
    with pytest.raises(ConfigError, match=rf"trainer\.accelerator: {accelerator} .*MPS.*set it to cpu"):
        check_accelerator(accelerator)


def test_a_mac_trains_on_its_cpu(mps, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    check_platform()
    check_accelerator("cpu")


@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cpu", "cuda"])
def test_linux_is_taken(monkeypatch, accelerator):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    check_platform()
    check_accelerator(accelerator)
