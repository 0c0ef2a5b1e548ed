"""Suites of checks on the embedded model."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import phi3_lightning
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.checks.shared_base import SharedBase
from phi3_lightning.checks.suite import Suite
from phi3_lightning.commands.single_device import single_device_trainer

TINY = Path(phi3_lightning.__file__).parent / "assets/tiny_phi3"


@pytest.fixture
def shared_base(tmp_path) -> Callable[..., SharedBase]:
    """Make a shared base of the embedded model with arguments of the module."""

    def make(precision: str = "32-true", **module) -> SharedBase:
        options = {"dtype": "float32", "optimizer": {"lr": 0.01}} | module
        section = {"accelerator": "cpu", "precision": precision}
        return SharedBase(Phi3LoRAModule(str(TINY), **options), partial(single_device_trainer, section, str(tmp_path)))

    return make


@pytest.fixture
def suite(shared_base, tmp_path) -> Callable[..., Suite]:
    """Make a suite with arguments of the data and of the module."""

    def make(data: dict | None = None, **module) -> Suite:
        arguments = {"train": str(TINY / "chats_train.jsonl"), "tokenizer": str(TINY), "max_length": 256}
        options = ChatDataModule(**arguments | (data or {})).options
        return Suite(options, shared_base(**module), 1.0, tmp_path, lambda name: None, lambda: None)

    return make
