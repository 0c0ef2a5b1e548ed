"""Corrections of PEFT's layers for a float32 adapter on a base in bfloat16 or 4 bits."""

from collections.abc import Callable
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
        """Return the frozen layer's output with the LoRA delta added; DoRA's stays PEFT's own."""
        if self.disable_adapters or self.lora_variant:
            return super().forward(x, *args, **kwargs)
        [adapter] = self.active_adapters
        down, up = (cast("Tensor", part[adapter].weight) for part in (self.lora_A, self.lora_B))
        result = self.base_layer(x, *args, **kwargs)
        return add_lora_delta(result, self.lora_dropout[adapter](x), down, up, self.scaling[adapter])


def make_linear(layer: nn.Module, *args: Any, **kwargs: Any) -> Linear | None:
    """Return :class:`Linear` over a linear layer; None leaves bitsandbytes' kinds to PEFT."""
    return None if type(layer).__module__.startswith("bitsandbytes") else Linear(layer, *args, **kwargs)


def patch_layer(layer: Any, adapter: str) -> None:
    """Make the weights of a ``LoraLayer`` float32, and its computation correct over any base, and cheap.

    These are attributes of a layer that PEFT has made: its constructors round to the type of the base.
    """
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if isinstance(layer.lora_dropout[adapter], nn.Dropout):
        layer.lora_dropout[adapter] = Dropout(layer.lora_dropout[adapter].p)
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
