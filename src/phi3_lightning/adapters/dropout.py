"""Dropout of an adapter's input, at the cost of a quarter of the random numbers."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

STEPS = 2**16
"""The probability is a multiple of 1 / STEPS."""


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        # four numbers of 16 bits from each of 64: torch draws one of 24 bits for each value, in one thread
        numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        # not bool, whose kernels are several times slower than those of other types on a CPU
        keep = torch.empty(x.shape, dtype=torch.uint8)
        torch.ge(numbers[: x.numel()].view(x.shape), round(p * STEPS) - STEPS // 2, out=keep)
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - p)
        return keep.to(x.dtype).mul_(x).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return keep.to(grad.dtype).mul_(grad).mul_(ctx.scale), None


class Dropout(nn.Dropout):
    """``nn.Dropout``, cheaper on a CPU, where drawing numbers takes a tenth of a LoRA step."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        return _Drop.apply(x, self.p)  # type: ignore[no-any-return, no-untyped-call]
