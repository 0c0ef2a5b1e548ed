"""The sum of a frozen layer's output and a LoRA delta."""

from collections.abc import Sequence
from itertools import compress
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def add_lora_delta(result: Tensor, x: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Return ``result + scaling * x @ down.T @ up.T``.

    Under autocast the products are in its type, and outside of it in the adapter's, which is float32.

    Args:
        result: Output of the frozen layer, shape (..., out).
        x: Input, shape (..., in).
        down: lora_A, shape (rank, in).
        up: lora_B, shape (out, rank).
    """
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(down.dtype)
    low = F.linear(x, down)
    if low.dtype != result.dtype:
        return (result + F.linear(low, up) * scaling).to(result.dtype)
    # one kernel for product, factor and sum, which allocates nothing else of the result's size
    rows = result.reshape(-1, result.shape[-1])
    summed = torch.addmm(rows, low.reshape(-1, low.shape[-1]), up.T, alpha=scaling)
    return summed if result.ndim == 2 else summed.view_as(result)  # FSDP2 warns of a unit that returns a view


def add_block_deltas(
    result: Tensor, x: Tensor, down: Tensor, up: Tensor, slices: Sequence[int], enabled: Sequence[bool], scaling: float
) -> Tensor:
    """Return ``result`` with ``scaling * x @ A_i.T @ B_i.T`` added to the columns of each enabled slice i.

    Types are as in :func:`add_lora_delta`. Only the blocks are computed: no matrix with zeros between them is built.

    Args:
        result: Output of the frozen fused layer, shape (..., sum of slices).
        down: The A of each enabled slice, one below the other, shape (enabled slices x rank, in).
        up: The B of each enabled slice, one below the other, shape (rows of the enabled slices, rank).
        slices: Rows of each slice.
    """
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(down.dtype)
    low = F.linear(x, down)
    rows = result.reshape(-1, result.shape[-1]).to(low.dtype)
    low = low.reshape(-1, low.shape[-1])
    summed = cast("Tensor", _AddBlocks.apply(rows, low, up.to(low.dtype), slices, enabled, scaling))  # type: ignore[no-untyped-call]
    return summed.to(result.dtype) if result.ndim == 2 else summed.to(result.dtype).view_as(result)


class _AddBlocks(torch.autograd.Function):
    """Products of the blocks, written side by side into one output; autograd would copy each once more to join them."""

    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        low: Tensor,
        up: Tensor,
        slices: Sequence[int],
        enabled: Sequence[bool],
        scaling: float,
    ) -> Tensor:
        ctx.save_for_backward(low, up)
        ctx.blocks, ctx.scaling = (slices, enabled), scaling
        summed = torch.empty_like(result)
        pairs = iter(zip(low.split(up.shape[1], -1), _blocks(up, slices, enabled), strict=True))
        for before, after, on in zip(
            result.split(list(slices), -1), summed.split(list(slices), -1), enabled, strict=True
        ):
            if on:
                low_block, up_block = next(pairs)
                torch.addmm(before, low_block, up_block.T, alpha=scaling, out=after)
            else:
                after.copy_(before)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, up = ctx.saved_tensors
        slices, enabled = ctx.blocks
        grad_low, grad_up = torch.empty_like(low), torch.empty_like(up)
        for block, low_block, up_block, into_low, into_up in zip(
            compress(grad.split(list(slices), -1), enabled),
            low.split(up.shape[1], -1),
            _blocks(up, slices, enabled),
            grad_low.split(up.shape[1], -1),
            _blocks(grad_up, slices, enabled),
            strict=True,
        ):
            torch.mm(block, up_block, out=into_low)
            torch.mm(block.T, low_block, out=into_up)
        return grad, grad_low.mul_(ctx.scaling), grad_up.mul_(ctx.scaling), None, None, None


def _blocks(up: Tensor, slices: Sequence[int], enabled: Sequence[bool]) -> tuple[Tensor, ...]:
    return cast("tuple[Tensor, ...]", up.split(list(compress(slices, enabled))))
