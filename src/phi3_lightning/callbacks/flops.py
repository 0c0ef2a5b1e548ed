"""The arithmetic of a LoRA step, and the most that a device can do of it."""

import time
from dataclasses import dataclass

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import nn
from torch.distributed.tensor import DTensor

from phi3_lightning.model.checkpointing import recomputed_share, way_of
from phi3_lightning.module import Phi3LoRAModule

_PROBE = 1024
"""Side of the square matrices that a CPU is measured on: 2.1 GFLOP, some milliseconds."""


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of training, in products with weights; attention's own products are left out."""

    per_token: float
    """For each token of a document."""
    per_supervised_token: float
    """In the head, which runs on supervised positions alone."""


def step_flops(module: Phi3LoRAModule) -> StepFlops:
    """Return what a token costs.

    A frozen weight takes 2 operations in the forward pass and 2 for the gradient of its input, and none for its own; a
    trained one 2 more; gradient checkpointing computes the forward pass again, 2 more, and so does a head that is
    trained or sharded.
    This is the formula 6N of Kaplan et al. 2020 (https://arxiv.org/abs/2001.08361) without the gradient of what is
    frozen.

    Args:
        module: After ``configure_model``.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear) and not layer.weight.requires_grad]
    frozen = sum(layer.in_features * layer.out_features for layer in layers)  # bitsandbytes packs what numel counts
    trained = sum(parameter.numel() for parameter in module.trained_parameters())
    model = module.loaded_model
    config = model.config
    recomputed = 2 * recomputed_share(way_of(model), len(model.model.layers))
    head = config.hidden_size * config.vocab_size
    once = not any(p.requires_grad or isinstance(p, DTensor) for p in module.head.parameters())
    per_token = (frozen - head) * (4 + recomputed) + trained * (6 + recomputed)
    return StepFlops(per_token, (4 if once else 6) * head)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the most operations a second in matrix products of ``dtype``: a GPU's by its data sheet, a CPU's measured.

    Args:
        device: CPU or CUDA device.
        dtype: Type of the products.

    Returns:
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
