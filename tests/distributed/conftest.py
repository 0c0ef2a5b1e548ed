"""The base model and the batches that all ranks use."""

from pathlib import Path

import pytest
import torch

import synthetic
from cli.conftest import cli as cli
from cli.conftest import start
from phi3_lightning.batch import Batch

from . import cases
from .programs import LENGTH, TWO

LONG = {"max_position_embeddings": 600, "original_max_position_embeddings": 600}


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> str:
    """A tiny random Phi-3 in float32 that reads rows of 504 tokens."""
    return synthetic.save_tiny(tmp_path_factory.mktemp("distributed") / "base", **LONG)


@pytest.fixture(scope="session")
def batches() -> list[Batch]:
    """Eight rows of 1 to 500 supervised tokens, in four batches."""
    return [synthetic.batch_of([[d] for d in cases.DOCUMENTS[i : i + 2]]) for i in range(0, 8, 2)]


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> Path:
    """The folder in which two ranks have trained from the first step to the last."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = start(folder, "fit", *TWO, *LENGTH)
    assert run.wait() == 0, run.text
    return folder


@pytest.fixture(autouse=True)
def _needs_distributed() -> None:
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
