"""One model, computed in two ways: whether the difference is that of rounding.

The yardstick is measured on the same model and rows: the change that one rounding in each linear layer makes. Linear
layers are the places where another order of computation shows: an output is rounded once to its type, on top of a
float32 sum of K products in another order, whose error is a random walk of sqrt(K) roundings.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from phi3_lightning.batch import Batch
from phi3_lightning.config.lora import PHI3_LINEAR_LAYERS
from phi3_lightning.model.activation_checkpointing import checkpoint_activations, mode_of
from phi3_lightning.model.loss import supervised_positions
from phi3_lightning.module import Phi3LoRAModule

ROUNDINGS = 8.0
"""How many times the yardstick two ways may be apart.

Four of about ten places in a block where values are rounded carry the yardstick's rounding (the others: norms, scores,
probabilities, activations, two residual sums), and two computations differ by the roundings of both: sqrt(2 x 10 / 4) =
2.2. The largest of many values scatters by another factor of 2, and the measured yardstick itself by as much.
"""

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Computed:
    """What a model makes of a batch.

    Args:
        logits: At each supervised position, shape (tokens, vocabulary), float32.
        losses: Of each supervised token, shape (tokens,), float32.
        gradient: Of the mean loss, all trained parameters in a row, float32.
    """

    logits: Tensor
    losses: Tensor
    gradient: Tensor

    def distance(self, other: "Computed") -> dict[str, float]:
        """Return how far another computation of the same is away.

        Args:
            other: The other one.

        Returns:
            The largest difference of two logits and of two losses, and the length of the gradients' difference
            relative to the gradient's.
        """
        gradient = (self.gradient - other.gradient).norm() / self.gradient.norm()
        return {
            "logits": (self.logits - other.logits).abs().max().item(),
            "loss": (self.losses - other.losses).abs().max().item(),
            "gradient": gradient.item(),
        }


def compute(module: Phi3LoRAModule, batch: Batch, context: Context, seed: int = 0) -> Computed:
    """Run a batch forward and backward.

    Args:
        module: The module, in any mode.
        batch: Rows on the module's device.
        context: What the Trainer computes in.
        seed: Of dropout.
    """
    torch.manual_seed(seed)
    parameters = list(module.trained_parameters())
    with context():
        hidden = module(batch)
        loss_sum, count = module.compute_loss(hidden, module.head, batch)
        found = torch.autograd.grad(loss_sum / count, parameters, allow_unused=True)
        with torch.no_grad():
            states, targets = supervised_positions(hidden.detach(), batch)
            logits = module.head(states).float()
    gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    losses = F.cross_entropy(logits, targets, reduction="none")
    return Computed(logits, losses, torch.cat([part.flatten().float() for part in gradient]))


@contextmanager
def rounded_once_more(model: nn.Module, seed: int) -> Iterator[None]:
    """Let the output of each linear layer of the blocks be off by one rounding, while the context lasts.

    Args:
        model: The model, with or without adapters.
        seed: Of the roundings' directions.
    """
    generator = torch.Generator().manual_seed(seed)

    def disturb(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        own, summed = torch.finfo(output.dtype).eps, torch.finfo(torch.float32).eps * math.sqrt(inputs[0].shape[-1])
        noise = torch.rand(output.shape, generator=generator).to(output.device) * 2 - 1
        return (output.float() * (1 + noise * (own + summed) / 2)).to(output.dtype)

    layers = [layer for name, layer in model.named_modules() if name.rpartition(".")[2] in PHI3_LINEAR_LAYERS]
    hooks = [layer.register_forward_hook(disturb) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def in_roundings(
    module: Phi3LoRAModule, one: Computed, other: Computed, batch: Batch, context: Context
) -> dict[str, float]:
    """Return the distance of two computations in multiples of one rounding in each linear layer.

    Args:
        module: The module, in the mode of the computations.
        one: Of ``batch``.
        other: The same in another way.
        batch: The batch.
        context: What the Trainer computes in.
    """
    yardsticks = []
    for seed in (1, 2):
        with rounded_once_more(module, seed):
            yardsticks.append(one.distance(compute(module, batch, context)))
    found = one.distance(other)
    smallest = torch.finfo(torch.float32).tiny  # of a yardstick where nothing rounds
    return {name: found[name] / max(smallest, *(yardstick[name] for yardstick in yardsticks)) for name in found}


def packed_against_single(module: Phi3LoRAModule, packed: Batch, single: Batch, context: Context) -> dict[str, float]:
    """Compare documents that share a row with the same documents in rows of their own, without dropout.

    Args:
        module: The module.
        packed: The documents in one row.
        single: The documents in a row each, in the same order.
        context: What the Trainer computes in.

    Returns:
        Distances of logits, losses and gradient, in roundings.
    """
    module.eval()
    alone = compute(module, single, context)
    return in_roundings(module, alone, compute(module, packed, context), single, context)


def checkpointed_against_kept(module: Phi3LoRAModule, batch: Batch, context: Context) -> dict[str, float]:
    """Compare activations that are computed again in the backward pass with activations that are kept, with dropout.

    Args:
        module: The module; its own mode is restored.
        batch: Rows.
        context: What the Trainer computes in.

    Returns:
        Distances of logits, losses and gradient, in roundings.
    """
    module.train()
    model = module.model
    assert model is not None  # configured by whoever made it
    own = mode_of(model)
    checkpoint_activations(model, "full" if own == "none" else own)
    again = compute(module, batch, context)
    checkpoint_activations(model, "none")
    kept = compute(module, batch, context)
    distances = in_roundings(module, kept, again, batch, context)
    checkpoint_activations(model, own)
    return distances


def without_gradient(module: Phi3LoRAModule, batch: Batch, context: Context) -> tuple[int, list[str]]:
    """Find the adapted layers, or slices, that a step would not change.

    Args:
        module: The module, in which no half of an adapter is zero.
        batch: Rows.
        context: What the Trainer computes in.

    Returns:
        The number of adapted layers and slices, and of those without a gradient the paths and names.
    """
    module.train()
    module.zero_grad()
    torch.manual_seed(0)
    with context():
        loss_sum, count = module.compute_loss(module(batch), module.head, batch)
        (loss_sum / count).backward()
    parts = dict(_gradients(module))
    module.zero_grad()
    return len(parts), [name for name, gradients in parts.items() if not all(map(_moves, gradients))]


def _moves(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())


def _gradients(module: Phi3LoRAModule) -> Iterator[tuple[str, list[Tensor | None]]]:
    """The gradients of each adapted layer or slice, and of each module that is trained whole."""
    model, adapter = module.model, module.adapter
    assert model is not None  # configured by whoever made it
    assert adapter is not None
    for target in adapter.targets:
        layer: Any = model.get_submodule(target.path)
        down, up = (half.grad for half in adapter.lora_AB(target))
        if len(target.slices) == 1 or down is None or up is None:
            yield target.path, [p.grad for p in layer.parameters() if p.requires_grad]
            continue
        slices = down.split(target.r), up.split(list(target.adapted.values()))
        for name, *pair in zip(target.adapted, *slices, strict=True):
            yield f"{target.path} ({name})", pair
    for path in adapter.modules_to_save:
        yield path, [p.grad for p in model.get_submodule(path).parameters() if p.requires_grad]


@torch.no_grad()
def leave_no_half_zero(module: Phi3LoRAModule) -> None:
    """Give each adapter's half that begins as zero small random values: it hides the gradient of the other half.

    Args:
        module: The module.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in module.trained_parameters():
        if parameter.ndim >= 2 and not parameter.any():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
