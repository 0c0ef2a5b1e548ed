"""Frozen linear layers whose products run in 8 bits, forward and backward, on a CPU with VNNI instructions.

Weights are quantised once, by row; what they are multiplied with, activations and gradients, by token. Both are rotated
first, in blocks of 64 inputs (Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456): a rotation leaves the product as
it is and spreads single large activations, which would otherwise round all others of their token to zero.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import Phi3ForCausalLM

from phi3_lightning.errors import ModelError

MAX_BLOCK = 64
"""Inputs that are rotated together at the most."""
PRODUCT_ELEMENTS = 2**22
"""Elements of the input or the output of a product at a time: their int32 sums take 16 MB, which the heap reuses, where
larger tensors would be mapped anew."""
CACHED_ELEMENTS = 2**20
"""Elements that are quantised or scaled at a time, so that they stay in the cache from one operation to the next."""
LARGEST = 127
SMALLEST_MAXIMUM = 1e-36
"""Of a token: one that is zero is divided by this."""


def check_device(device_type: str) -> None:
    """Refuse a device on which 8-bit products do not run or are slow.

    Raises:
        ModelError: If it is no CPU, or one without the instructions.
    """
    if device_type != "cpu":
        raise ModelError(
            f"model.quantization: int8_dynamic runs on a CPU, and this run uses {device_type}; use int8 or nf4, or set "
            "trainer.accelerator: cpu"
        )
    if not torch.cpu.get_capabilities().get("avx512_vnni"):
        raise ModelError(
            "model.quantization: int8_dynamic needs a CPU with AVX-512 VNNI instructions, and is slow on this one; "
            "leave it out, or use nf4 or int8 to save memory"
        )


class Int8DynamicLinear(nn.Linear):
    """A frozen linear layer in 8 bits; its ``weight`` is rotated."""

    scale: Tensor
    """Of each row of the weight, float32."""
    exact: bool = False
    """Whether the products are in the type of the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the product in the type of the input, or in that of autocast."""
        if x.device.type != "cpu":  # moved there after it was loaded
            check_device(x.device.type)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.exact:
            return F.linear(x, self.dequantize().to(x.dtype))
        product: Tensor = linear(x, self.weight, self.scale)
        return product

    def dequantize(self) -> Tensor:
        """Return the weight that the layer multiplies with, float32, not rotated."""
        return _rotated(self.weight * self.scale[:, None])


@torch.no_grad()
def quantize_layers(model: Phi3ForCausalLM) -> None:
    """Make the linear layers of the decoder, not the head, 8-bit ones, in place, one after the other."""
    for layer in model.model.modules():
        if type(layer) is nn.Linear:
            weight = _rotated(layer.weight.float()).div_(_block(layer.in_features))
            quantized, scale = _quantized(weight, None)
            layer.__class__ = Int8DynamicLinear
            layer.weight = nn.Parameter(quantized, requires_grad=False)
            layer.register_buffer("scale", scale[:, 0], persistent=False)


@contextmanager
def exact_products(model: nn.Module) -> Iterator[None]:
    """Multiply with the same weights in the type of the input, within the context."""
    layers = [layer for layer in model.modules() if isinstance(layer, Int8DynamicLinear)]
    for layer in layers:
        layer.exact = True
    try:
        yield
    finally:
        for layer in layers:
            layer.exact = False


@torch.library.custom_op("phi3_lightning::int8_dynamic_linear", mutates_args=(), device_types="cpu")
def linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return ``x @ W.T`` for the rotated W that ``weight`` and the scales of its rows stand for."""
    result = x.new_empty(*x.shape[:-1], len(weight))
    for rows, into in _parts(x, result):
        _multiply(_rotated(rows), weight.T, into, after=scale)
    return result


@torch.library.custom_op("phi3_lightning::int8_dynamic_linear_backward", mutates_args=(), device_types="cpu")
def linear_backward(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient of the input of :func:`linear`."""
    result = grad.new_empty(*grad.shape[:-1], weight.shape[1])
    for rows, into in _parts(grad, result):
        _multiply(rows, weight, into, before=scale)
        into.copy_(_rotated(into))
    return result


@linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], len(weight))


@linear_backward.register_fake
def _(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:  # noqa: ARG001
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[1:])


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return linear_backward(grad, *ctx.saved_tensors), None, None


linear.register_autograd(_gradient, setup_context=_keep)
LINEAR = torch.ops.phi3_lightning.int8_dynamic_linear.default
"""The operator that :func:`linear` calls."""


def _parts(x: Tensor, result: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of both that are multiplied at a time."""
    rows, into = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, result))
    count = max(1, PRODUCT_ELEMENTS // max(rows.shape[1], into.shape[1]))
    return zip(rows.split(count), into.split(count), strict=True)


def _multiply(
    rows: Tensor, weight: Tensor, into: Tensor, *, before: Tensor | None = None, after: Tensor | None = None
) -> None:
    """Set ``into`` to ``rows * before @ weight * after``, for an int8 weight and rows that are quantised here."""
    quantized, scales = _quantized(rows, before)
    sums = torch._int_mm(quantized, weight)
    for target, block, scale in _cached(into, sums, scales):
        values = block.float().mul_(scale)
        target.copy_(values if after is None else values.mul_(after))


def _cached(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of tensors that stay in the cache from one operation to the next."""
    count = max(1, CACHED_ELEMENTS // tensors[0].shape[1])
    return zip(*(tensor.split(count) for tensor in tensors), strict=True)


def _quantized(rows: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows times factors of the columns in 8 bits, rounded to nearest, and the scale of each, shape (rows, 1)."""
    quantized = torch.empty_like(rows, dtype=torch.int8)
    scales = rows.new_empty(len(rows), 1, dtype=torch.float32)
    for block, target, scale in _cached(rows, quantized, scales):
        values = block.float() if factors is None else block.float() * factors
        largest = torch.maximum(values.amax(-1, keepdim=True), values.amin(-1, keepdim=True).neg_())
        torch.div(largest.clamp_(min=SMALLEST_MAXIMUM), LARGEST, out=scale)
        target.copy_(values.div(scale).round_())
    return quantized, scales


def _rotated(rows: Tensor) -> Tensor:
    """Each block of a row times a Hadamard matrix, which is its own inverse but for a factor, the block's size."""
    size = _block(rows.shape[-1])
    return (rows.reshape(rows.numel() // size, size) @ _hadamard(size).to(rows)).view(rows.shape)


def _block(inputs: int) -> int:
    """The largest power of two that divides a number of inputs, or :data:`MAX_BLOCK`."""
    return min(inputs & -inputs, MAX_BLOCK)


@cache
def _hadamard(size: int) -> Tensor:
    """Sylvester's matrix of ones and minus ones, which every floating-point type holds exactly."""
    if size == 1:
        return torch.ones(1, 1)
    half = _hadamard(size // 2)
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])
