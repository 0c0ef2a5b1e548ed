"""Whether an exported model answers as the live one does, in figures."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phi3_lightning.errors import ModelError

ROUNDINGS = 4.0
"""How many times the effect of one rounding a layer an export may be away from the live model.

Live and exported model round each adapted layer's output at most five times in different places: the live one the
base's product, the adapter's product and their sum; a merged one its weights and its product. Independent roundings add
up in squares: sqrt(5) = 2.2 times the effect of one. The rest is for the maximum of many values, which scatters.
"""


@dataclass(frozen=True)
class Difference:
    """How far the logits of two models are apart, over all positions of the prompts.

    Args:
        max_logit: The largest difference of two logits.
        kl: Mean Kullback-Leibler divergence of the next token, in nats.
        greedy: The share of positions at which both hold the same token for the likeliest.
    """

    max_logit: float
    kl: float
    greedy: float


@dataclass(frozen=True)
class Certificate:
    """What was compared, and what came of it.

    Args:
        compared: The two models, in words.
        positions: Tokens after which the models were asked for the next.
        export: Exported to live model.
        rounding: One rounding in each adapted layer to none: the yardstick.
        adapter: Live model to base: what the adapter does.
    """

    compared: str
    positions: int
    export: Difference
    rounding: Difference
    adapter: Difference

    @property
    def holds(self) -> bool:
        """Whether the export is as near to the live model as rounding lets it be."""
        near = self.export.max_logit <= ROUNDINGS * self.rounding.max_logit
        return near and self.export.kl <= ROUNDINGS**2 * self.rounding.kl + FLOAT32_KL

    def content(self) -> dict[str, Any]:
        """Return what ``certificate.json`` holds."""
        return {**asdict(self), "roundings_allowed": ROUNDINGS, "holds": self.holds}

    def check(self) -> None:
        """Refuse an export that does not answer as the live model does.

        Raises:
            ModelError: If the figures are beyond what rounding explains.
        """
        if not self.holds:
            raise ModelError(
                f"the export does not answer as the live model does ({self.compared}): logits differ by up to "
                f"{self.export.max_logit:.3g} (KL {self.export.kl:.2g}, same likeliest token at "
                f"{self.export.greedy:.1%} of {self.positions} positions), and rounding explains "
                f"{ROUNDINGS:g} x {self.rounding.max_logit:.3g}; nothing was written. The adapter itself moves logits "
                f"by up to {self.adapter.max_logit:.3g}"
            )


FLOAT32_KL = 1e-6
"""The KL below which float32 sums over a vocabulary tell nothing (32,064 terms of relative error 6e-8, and margin)."""


@torch.inference_mode()
def logits(model: nn.Module, prompts: list[list[int]], context: AbstractContextManager[Any]) -> Tensor:
    """Return the logits after every token of the prompts.

    Args:
        model: A causal language model; its mode is left as it was.
        prompts: Token ids.
        context: What to compute in, such as autocast.

    Returns:
        Shape (tokens of all prompts, vocabulary), float32, on the CPU.
    """
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=device)
    mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts], device=device)
    training = model.training
    model.eval()
    try:
        with context:
            found: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        model.train(training)
    return found[mask.bool()].float().cpu()


def rounded(model: nn.Module, layers: Iterable[str], dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return a context in which each of the layers' outputs is rounded once more, at random.

    Args:
        model: The model.
        layers: Paths of the layers.
        dtype: The type whose rounding it is.
    """
    unit = torch.finfo(dtype).eps / 2
    generator = torch.Generator().manual_seed(0)

    def disturb(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        noise = torch.rand(output.shape, generator=generator).to(output.device) * 2 - 1
        return (output.float() * (1 + unit * noise)).to(output.dtype)

    stack = ExitStack()
    for layer in layers:
        stack.callback(model.get_submodule(layer).register_forward_hook(disturb).remove)
    return stack


def difference(reference: Tensor, other: Tensor) -> Difference:
    """Compare logits.

    Args:
        reference: Shape (positions, vocabulary), float32.
        other: The same shape.
    """
    log_p, log_q = reference.log_softmax(-1), other.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    greedy = (reference.argmax(-1) == other.argmax(-1)).float().mean().item()
    return Difference((reference - other).abs().max().item(), max(kl, 0.0), greedy)


@dataclass(frozen=True)
class Reference:
    """What an export is held against, measured while the live model is in memory.

    Args:
        compared: The two models, in words.
        live: Logits, shape (positions, vocabulary), float32.
        rounding: The yardstick.
        adapter: What the adapter does.
    """

    compared: str
    live: Tensor
    rounding: Difference
    adapter: Difference

    def certify(self, exported: Tensor) -> Certificate:
        """Hold an export's logits against the live model's.

        Args:
            exported: Logits, shape (positions, vocabulary), float32.
        """
        export = difference(self.live, exported)
        return Certificate(self.compared, len(self.live), export, self.rounding, self.adapter)


def refer(
    compared: str,
    model: nn.Module,
    prompts: list[list[int]],
    layers: list[str],
    dtype: torch.dtype,
    autocast: Callable[[], AbstractContextManager[Any]],
    disabled: Callable[[], AbstractContextManager[Any]],
) -> Reference:
    """Measure the live model.

    Args:
        compared: The two models, in words.
        model: The live model.
        prompts: Token ids.
        layers: Paths of the adapted layers.
        dtype: The coarsest type that either model is rounded to.
        autocast: What it computes in.
        disabled: Switches the adapter off.
    """
    live = logits(model, prompts, autocast())
    with rounded(model, layers, dtype):
        rounding = difference(live, logits(model, prompts, autocast()))
    with disabled():
        adapter = difference(live, logits(model, prompts, autocast()))
    return Reference(compared, live, rounding, adapter)
