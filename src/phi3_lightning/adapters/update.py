"""The sum of a frozen layer's answer and an adapter's update."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def add_update(result: Tensor, x: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Return ``result + scaling * x @ down.T @ up.T``.

    Under autocast the products are in its type, and outside of it in the adapter's, which is float32.

    Args:
        result: What the base answers, shape (..., out).
        x: Input, shape (..., in).
        down: lora_A, shape (rank, in).
        up: lora_B, shape (out, rank).
        scaling: Factor of the update.
    """
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(down.dtype)
    low = F.linear(x, down)
    if low.dtype != result.dtype:
        return (result + F.linear(low, up) * scaling).to(result.dtype)
    # one kernel for product, factor and sum: nothing of the size of the result is held besides
    rows = result.reshape(-1, result.shape[-1])
    summed = torch.addmm(rows, low.reshape(-1, low.shape[-1]), up.T, alpha=scaling)
    return summed if result.ndim == 2 else summed.view_as(result)  # FSDP2 warns of a unit that returns a view
