"""One model, computed in two ways: whether the difference is that of rounding.

The unit of the tolerance is measured on the same model and rows: the change that one rounding in each linear layer
makes. Linear layers are the places where another order of computation shows: an output is rounded once to its type, on
top of a float32 sum of K products in another order, whose error is a random walk of sqrt(K) roundings.
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
from phi3_lightning.model import int8_dynamic
from phi3_lightning.model.activation_checkpointing import checkpoint_activations, mode_of
from phi3_lightning.model.loss import supervised_positions
from phi3_lightning.module import Phi3LoRAModule

MAX_ROUNDINGS = 8.0
"""The tolerance: how many times the effect of one rounding in each linear layer two ways may be apart.

Of about ten places in a block where values are rounded, four are linear layers (the others: norms, scores,
probabilities, activations, two residual sums), and two computations differ by the roundings of both: sqrt(2 x 10 / 4) =
2.2. The largest of many values scatters by another factor of 2, and the measured unit itself by as much.
"""

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Computed:
    """The results of a forward and a backward pass, in float32."""

    logits: Tensor
    """At each supervised position, shape (tokens, vocabulary)."""
    losses: Tensor
    """Of each supervised token, shape (tokens,)."""
    gradient: Tensor
    """Of the mean loss, all trained parameters in a row."""

    def distance(self, other: "Computed") -> dict[str, float]:
        """Return the largest difference of logits and of losses, and the relative norm of the gradients' difference."""
        gradient = (self.gradient - other.gradient).norm() / self.gradient.norm()
        return {
            "logits": (self.logits - other.logits).abs().max().item(),
            "loss": (self.losses - other.losses).abs().max().item(),
            "gradient": gradient.item(),
        }


def compute(module: Phi3LoRAModule, batch: Batch, context: Context, seed: int = 0) -> Computed:
    """Run a batch forward and backward, in the Trainer's precision context; the seed is of dropout."""
    torch.manual_seed(seed)
    parameters = list(module.trained_parameters())
    with context():
        hidden = module(batch)
        loss_sum, count = module.compute_loss(hidden, module.head, batch)
        gradients = torch.autograd.grad(loss_sum / count, parameters, allow_unused=True)
        with torch.no_grad():
            states, targets = supervised_positions(hidden.detach(), batch)
            logits = module.head(states).float()
    gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    losses = F.cross_entropy(logits, targets, reduction="none")
    return Computed(logits, losses, torch.cat([part.flatten().float() for part in gradient]))


@contextmanager
def rounded_once_more(model: nn.Module, seed: int) -> Iterator[None]:
    """Change the output of each linear layer of the blocks by one rounding in random directions, within the context."""
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
    """Return the distance of two computations of a batch in multiples of one rounding in each linear layer.

    The module is in the mode of the computations.
    """
    units = []
    for seed in (1, 2):
        with rounded_once_more(module, seed):
            units.append(one.distance(compute(module, batch, context)))
    smallest = torch.finfo(torch.float32).tiny  # of a unit where nothing rounds
    return {
        name: distance / max(smallest, *(unit[name] for unit in units))
        for name, distance in one.distance(other).items()
    }


def packed_against_single(module: Phi3LoRAModule, packed: Batch, single: Batch, context: Context) -> dict[str, float]:
    """Return how far documents that share a row are, in roundings, from the same documents in rows of their own."""
    module.eval()
    alone = compute(module, single, context)
    return in_roundings(module, alone, compute(module, packed, context), single, context)


def checkpointed_against_stored(module: Phi3LoRAModule, batch: Batch, context: Context) -> dict[str, float]:
    """Return how far recomputed activations are, in roundings, from stored ones, with dropout."""
    module.train()
    model = module.loaded_model
    mode = mode_of(model)
    checkpoint_activations(model, "full" if mode == "none" else mode)
    recomputed = compute(module, batch, context)
    checkpoint_activations(model, "none")
    stored = compute(module, batch, context)
    distances = in_roundings(module, stored, recomputed, batch, context)
    checkpoint_activations(model, mode)
    return distances


def gradient_error_of_8_bits(module: Phi3LoRAModule, batch: Batch, context: Context) -> tuple[float, float]:
    """Return how far the gradient is from that of exact products with the same weights: relative norm, and cosine."""
    module.train()
    model = module.loaded_model
    mode = mode_of(model)
    checkpoint_activations(model, "full")  # keeps no dequantised weight for the backward pass
    own = compute(module, batch, context).gradient
    with int8_dynamic.exact_products(model):
        exact = compute(module, batch, context).gradient
    checkpoint_activations(model, mode)
    return ((own - exact).norm() / exact.norm()).item(), F.cosine_similarity(own, exact, dim=0).item()


def without_gradient(module: Phi3LoRAModule, batch: Batch, context: Context) -> tuple[int, list[str]]:
    """Return the number of adapted layers and slices, and the paths and names of those that a step would not change.

    Neither half of the adapter is zero.
    """
    module.train()
    module.zero_grad()
    torch.manual_seed(0)
    with context():
        loss_sum, count = module.compute_loss(module(batch), module.head, batch)
        (loss_sum / count).backward()
    layers = dict(_gradients(module))
    module.zero_grad()
    return len(layers), [name for name, gradients in layers.items() if not all(map(_moves, gradients))]


def _moves(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())


def _gradients(module: Phi3LoRAModule) -> Iterator[tuple[str, list[Tensor | None]]]:
    """The gradients of each adapted layer or slice, and of each module of ``modules_to_save``."""
    model, adapter = module.loaded_model, module.adapter
    assert adapter is not None  # of a loaded model
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
    """Give each adapter's half that begins as zero small random values: it hides the gradient of the other half."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.trained_parameters():
        if parameter.ndim >= 2 and not parameter.any():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
