"""In which types weights are kept and matrix products are computed."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Phi3ForCausalLM

from phi3_lightning.config.checks import require


def autocast(model: Phi3ForCausalLM, device_type: str) -> AbstractContextManager[Any]:
    """Return the context of matrix products: autocast that is on already, or else the type of the base weights."""
    dtype = model.dtype  # of the first parameter: the frozen embedding
    if torch.is_autocast_enabled(device_type) or dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device_type, dtype=dtype)


def converting_frozen_alone(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a conversion for ``Module._apply`` that moves every tensor and changes the type of frozen weights alone.

    ``bf16-true`` converts the whole module: bfloat16 would lose LoRA's deltas, rotary angles and token counts.
    """
    frozen = {id(parameter) for parameter in module.parameters() if not parameter.requires_grad}

    def convert(tensor: Tensor) -> Tensor:
        converted = fn(tensor)
        keeps_type = id(tensor) not in frozen and converted.dtype != tensor.dtype
        return tensor.to(converted.device) if keeps_type else converted

    return convert


def check_precision(precision: str, dtype: str, *, fitting: bool) -> None:
    """Refuse types in which the adapter cannot be trained."""
    require(
        precision not in ("16-true", "transformer-engine-float16"),
        "trainer.precision",
        precision,
        "float16 without loss scaling loses gradients; use bf16-mixed, or 16-mixed on a GPU without bfloat16",
    )
    require(
        dtype != "float16" or precision == "16-mixed" or not fitting,
        "model.dtype",
        dtype,
        f"it needs trainer.precision: 16-mixed, which scales the loss, and not {precision}; or use bfloat16",
    )
