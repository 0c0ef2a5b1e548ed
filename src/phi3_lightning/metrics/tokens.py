"""Metrics that add up over tokens, so that neither batch size nor ranks change them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class TokenMean(Metric):
    """Mean of a quantity over supervised tokens; NaN where there were none.

    Sums are float64, so that the order of batches does not change the digits that are printed.
    """

    total: Tensor
    tokens: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, total: Tensor, tokens: Tensor) -> None:
        """Add a batch: the quantity, summed over its supervised tokens, and their number."""
        # not in place: `trainer.validate` leaves tensors behind that only inference mode may write
        self.total = self.total + total.double()
        self.tokens = self.tokens + tokens

    def compute(self) -> Tensor:
        """Return the mean over all tokens so far, a float32 scalar."""
        return (self.total / self.tokens).float()


class Perplexity(TokenMean):
    """The exponential of the mean token loss."""

    def compute(self) -> Tensor:
        """Return the perplexity of all tokens so far, a float32 scalar."""
        return (self.total / self.tokens).exp().float()


class TokenMetrics(nn.Module):
    """Loss, perplexity and token accuracy on held-out rows."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = TokenMean()
        self.perplexity = Perplexity()
        self.token_accuracy = TokenMean()

    def update(self, loss_sum: Tensor, count: Tensor, correct: Tensor, supervised: Tensor) -> None:
        """Add a batch: the sum of its losses and its weight in the loss, its correct and all its supervised tokens."""
        self.loss.update(loss_sum, count)
        self.perplexity.update(loss_sum, count)
        self.token_accuracy.update(correct, supervised)

    def log(self, log: Callable[..., Any], stage: str) -> None:
        """Log each metric by the method of a LightningModule, under ``stage/``."""
        log(f"{stage}/loss", self.loss, prog_bar=True)
        log(f"{stage}/perplexity", self.perplexity)
        log(f"{stage}/token_accuracy", self.token_accuracy)
