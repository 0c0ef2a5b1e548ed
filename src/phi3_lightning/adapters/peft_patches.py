"""Corrections of PEFT's layers for a float32 adapter on a base in bfloat16 or 4 bits."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn

from phi3_lightning.adapters.dropout import Dropout
from phi3_lightning.adapters.lora_delta import add_lora_delta


class _WithoutAutocast:
    """True where PEFT must cast a layer's input to float32 itself.

    Under autocast the small weights are cast to the activations' type, and casting the activations first is useless.
    """

    def __bool__(self) -> bool:
        return not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"))


class Linear(lora.Linear):
    """PEFT's layer with product, factor and sum in one kernel, which allocates nothing else of the output's size."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the frozen layer's output with the LoRA delta added."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1 or args or kwargs:
            return super().forward(x, *args, **kwargs)
        (adapter,) = self.active_adapters
        down, up = (cast("Tensor", part[adapter].weight) for part in (self.lora_A, self.lora_B))
        return add_lora_delta(self.base_layer(x), self.lora_dropout[adapter](x), down, up, self.scaling[adapter])


def patch_layer(layer: Any, adapter: str) -> None:
    """Make the weights of a ``LoraLayer`` float32, and its computation correct over any base, and cheap."""
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if isinstance(layer.lora_dropout[adapter], nn.Dropout):
        layer.lora_dropout[adapter] = Dropout(layer.lora_dropout[adapter].p)
    if type(layer) is lora.Linear and adapter not in layer.lora_variant:
        layer.__class__ = Linear
    layer.cast_input_dtype_enabled = cast("bool", _WithoutAutocast())
    if adapter in layer.lora_variant:
        layer.lora_variant[adapter].init(layer, adapter_name=adapter)  # again, from float32: PEFT rounds the magnitude
        dora = layer.lora_magnitude_vector[adapter]
        dora.get_weight_norm = _in_float32(dora.get_weight_norm)


def _in_float32(weight_norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """DoRA divides its magnitude by this norm: in bfloat16, a fresh adapter would move outputs by 0.4 per cent."""

    def float32_norm(weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None) -> Tensor:
        return weight_norm(weight.float(), lora_weight.float(), scaling=scaling, adapter_name=adapter_name)

    return float32_norm


@torch.no_grad()
def start_orthogonal(layer: Any, adapter: str) -> None:
    """Start ``A`` and ``B`` from orthogonal directions, so that their product is zero.

    ``LoraLayer.orthogonal_init`` of PEFT rounds to the type of the base: in bfloat16 the product is no longer zero, and
    in 4 bits nothing is left. Embeddings stay as they are.
    """
    if adapter not in layer.lora_A:
        return
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    rank = len(down)
    directions, _ = torch.linalg.qr(torch.randn(rank, rank))
    down.copy_(torch.randn(down.shape[1], rank // 2).mm(directions[0::2]).T / 10.0)
    up.copy_(torch.randn(rank // 2, len(up)).T.mm(directions[1::2]) / 10.0)


@contextmanager
def float32_default() -> Iterator[None]:
    """Make new weights float32 while the context lasts."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


@contextmanager
def tied_input_is_meant() -> Iterator[None]:
    """Adapt embed_tokens where lm_head shares its weight, without PEFT's warning: only the input side is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        yield
