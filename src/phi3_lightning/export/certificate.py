"""How far an exported model's logits are from the live model's, and how far they may be."""

import hashlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from phi3_lightning.errors import ModelError

CERTIFICATE = "certificate.json"

ROUNDINGS = 4.0
"""Tolerance of an export, in multiples of the effect of one rounding in each layer.

Live and exported model round each adapted layer's output at most five times in different places: the live one the
base's product, the adapter's product and their sum; a merged one its weights and its product. Independent roundings add
up in squares: sqrt(5) = 2.2 times the effect of one. The rest is for the maximum of many values, which scatters.
"""

FLOAT32_KL = 1e-6
"""Rounding error of the KL in float32 (sums of 32,064 terms of relative error 6e-8, and margin)."""


@dataclass(frozen=True)
class Difference:
    """How far the logits of two models are apart, over all positions of the prompts."""

    max_logit: float
    """The largest difference of two logits."""
    kl: float
    """Mean Kullback-Leibler divergence of the next token, in nats."""
    greedy: float
    """The share of positions at which the argmax is the same."""


@dataclass(frozen=True)
class Certificate:
    """The result of a comparison."""

    compared: str
    """The two models, in words."""
    positions: int
    """Number of compared positions."""
    export: Difference
    """Exported against live model."""
    rounding: Difference
    """One more rounding in each adapted layer against none: the unit of the tolerance."""
    adapter: Difference
    """Live model against base: the effect of the adapter."""

    @property
    def holds(self) -> bool:
        """Whether the export is within the tolerance."""
        near = self.export.max_logit <= ROUNDINGS * self.rounding.max_logit
        return near and self.export.kl <= ROUNDINGS**2 * self.rounding.kl + FLOAT32_KL

    def content(self) -> dict[str, Any]:
        """Return what ``certificate.json`` holds."""
        return {**asdict(self), "roundings_allowed": ROUNDINGS, "holds": self.holds}

    def check(self) -> None:
        """Refuse an export that does not answer as the live model does."""
        if not self.holds:
            raise ModelError(
                f"the export does not answer as the live model does ({self.compared}): logits differ by up to "
                f"{self.export.max_logit:.3g} (KL {self.export.kl:.2g}, same argmax at "
                f"{self.export.greedy:.1%} of {self.positions} positions), and rounding explains "
                f"{ROUNDINGS:g} x {self.rounding.max_logit:.3g}; nothing was written. The adapter itself moves logits "
                f"by up to {self.adapter.max_logit:.3g}"
            )


def file_hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of files in a folder, by name."""
    hashes = {}
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


@torch.inference_mode()
def logits(model: nn.Module, prompts: list[list[int]], context: AbstractContextManager[Any]) -> Tensor:
    """Return the logits after every token of the prompts, shape (tokens, vocabulary), float32, on the CPU."""
    device = next(model.parameters()).device
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)
    mask = pad_sequence([torch.ones(len(prompt), dtype=torch.int64) for prompt in prompts], batch_first=True).to(device)
    training = model.training
    model.eval()
    try:
        with context:
            output: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        model.train(training)
    return output[mask.bool()].float().cpu()


def rounded(model: nn.Module, layers: Iterable[str], dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return a context in which each of the layers' outputs is rounded once more, at random, to ``dtype``."""
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
    """Compare logits, shape (positions, vocabulary), float32."""
    log_p, log_q = reference.log_softmax(-1), other.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    greedy = (reference.argmax(-1) == other.argmax(-1)).float().mean().item()
    return Difference((reference - other).abs().max().item(), max(kl, 0.0), greedy)


@dataclass(frozen=True)
class Reference:
    """The live model's logits and the tolerance, with which an export is compared."""

    compared: str
    """The two models, in words."""
    live: Tensor
    """Logits, shape (positions, vocabulary), float32."""
    rounding: Difference
    """The effect of one more rounding in each adapted layer."""
    adapter: Difference
    """The effect of the adapter."""

    def certify(self, exported: Tensor) -> Certificate:
        """Compare an export's logits with the live model's."""
        export = difference(self.live, exported)
        return Certificate(self.compared, len(self.live), export, self.rounding, self.adapter)


def measure_reference(
    compared: str,
    model: nn.Module,
    prompts: list[list[int]],
    layers: list[str],
    dtype: torch.dtype,
    autocast: Callable[[], AbstractContextManager[Any]],
    disabled: Callable[[], AbstractContextManager[Any]],
) -> Reference:
    """Measure the live model; ``dtype`` is the coarsest type that either model is rounded to."""
    live = logits(model, prompts, autocast())
    with rounded(model, layers, dtype):
        rounding = difference(live, logits(model, prompts, autocast()))
    with disabled():
        adapter = difference(live, logits(model, prompts, autocast()))
    return Reference(compared, live, rounding, adapter)
