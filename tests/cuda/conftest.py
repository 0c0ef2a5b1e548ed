"""Tests that need a GPU; they are skipped without one.

With ``DRY_GPU=1``, as in ``scripts/gpu_checks.py --dry``, they run on a CPU instead, as far as it can: kernels by
stand-ins, runs of two steps.
"""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
DRY = os.environ.get("DRY_GPU") == "1"
DEVICE = "cpu" if DRY else "cuda"


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents and not DRY and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _stand_ins(request):
    if DRY:
        request.getfixturevalue("as_on_a_gpu")
