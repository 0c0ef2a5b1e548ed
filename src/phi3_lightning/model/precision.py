"""In which type matrix products are computed."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import Phi3ForCausalLM


def autocast(model: Phi3ForCausalLM, device_type: str) -> AbstractContextManager[Any]:
    """Return the context of matrix products: autocast that is on already, or else the type of the base weights.

    Args:
        model: The model, with or without an adapter.
        device_type: Type of the device that computes.
    """
    dtype = model.dtype  # of the first parameter: the frozen embedding
    if torch.is_autocast_enabled(device_type) or dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device_type, dtype=dtype)
