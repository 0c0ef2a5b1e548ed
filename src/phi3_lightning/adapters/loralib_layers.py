"""loralib's layers, on frozen layers of any kind.

A frozen layer becomes a loralib layer by a change of its class, as in :func:`torch.distributed.fsdp.fully_shard`:
loralib's constructors would allocate a second, dense weight, and know none in 4 or 8 bits. The layer, its weight and
its name stay as they are, and its own class computes the base's output. ``merge_weights`` is always false: loralib's
merging in place would round the frozen weights at every validation.
"""

import math
from functools import cache
from typing import Any, cast

import loralib
import torch
from torch import Tensor, nn

from phi3_lightning.adapters.convert import block_diagonal
from phi3_lightning.adapters.dropout import Dropout
from phi3_lightning.adapters.lora_delta import add_block_deltas, add_lora_delta
from phi3_lightning.adapters.targets import Target


class Linear(loralib.Linear):  # type: ignore[misc]  # loralib has no types
    """``loralib.Linear`` over any linear layer, also outside autocast and over quantised weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the LoRA delta added."""
        result = cast("Tensor", super(loralib.Linear, self).forward(x))
        if self.merged:
            return result
        return add_lora_delta(result, self.lora_dropout(x), self.lora_A, self.lora_B, self.scaling)


class FusedLinear(loralib.MergedLinear):  # type: ignore[misc]
    """``loralib.MergedLinear`` with slices of any size, of which each forward computes the blocks alone.

    ``lora_A`` is (enabled slices x rank, in) and ``lora_B`` (rows of the enabled slices, rank): where slices are equal,
    as in ``loralib.MergedLinear``. ``slices`` holds the rows of each slice.
    """

    slices: tuple[int, ...]

    def merge_AB(self) -> Tensor:  # noqa: N802, which is loralib's name
        """Return the dense LoRA delta without its factor, shape (out, in); zero on the rows of disabled slices."""
        return cast("Tensor", block_diagonal(self.lora_B, self.slices, self.enable_lora) @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with each enabled slice's LoRA delta added to its rows."""
        result = cast("Tensor", super(loralib.MergedLinear, self).forward(x))
        if self.merged:
            return result
        x = self.lora_dropout(x)
        if torch.compiler.is_compiling():  # dynamo cannot trace an autograd function that writes into views
            up = block_diagonal(self.lora_B, self.slices, self.enable_lora)
            return add_lora_delta(result, x, self.lora_A, up, self.scaling)
        return add_block_deltas(result, x, self.lora_A, self.lora_B, self.slices, self.enable_lora, self.scaling)


@cache
def _over(ours: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """A loralib class whose output without adapter is that of ``base``; ``ours`` itself where it derives from it."""
    return ours if issubclass(ours, base) else type(ours.__name__, (ours, base), {})


def adapt(layer: Any, target: Target, dropout: float) -> None:
    """Make a frozen layer a loralib layer, in place, with float32 adapter weights that change no output yet."""
    kind = type(layer)
    embedding = isinstance(layer, nn.Embedding)
    ours = loralib.Embedding if embedding else FusedLinear if len(target.slices) > 1 else Linear
    layer.__class__ = _over(ours, kind)  # type: ignore[arg-type]  # mypy: a class is not hashable
    loralib.LoRALayer.__init__(
        layer,
        r=target.r,
        lora_alpha=target.scaling * target.r,
        lora_dropout=0.0 if embedding else dropout,  # loralib's embeddings have none
        merge_weights=False,
    )
    inputs = layer.num_embeddings if embedding else layer.in_features
    adapted = target.adapted.values()
    options: dict[str, Any] = {"dtype": torch.float32, "device": layer.weight.device}
    layer.lora_A = nn.Parameter(torch.empty(len(adapted) * target.r, inputs, **options))
    layer.lora_B = nn.Parameter(torch.empty(sum(adapted), target.r, **options))
    layer.scaling = target.scaling
    layer.frozen_class = kind
    if layer.lora_dropout.__class__ is nn.Dropout:
        layer.lora_dropout = Dropout(dropout)
    if embedding:  # as loralib starts them
        nn.init.zeros_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
        return
    nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
    nn.init.zeros_(layer.lora_B)
    layer.fan_in_fan_out = False
    if ours is FusedLinear:
        layer.enable_lora = list(target.enabled)
        layer.slices = tuple(target.slices.values())


def restore(layer: Any) -> None:
    """Undo :func:`adapt`."""
    layer.__class__ = layer.frozen_class
    for name in ("r", "lora_alpha", "lora_dropout", "merged", "merge_weights", "scaling", "lora_A", "lora_B"):
        delattr(layer, name)
    for name in ("frozen_class", "fan_in_fan_out", "enable_lora", "slices"):
        layer.__dict__.pop(name, None)
