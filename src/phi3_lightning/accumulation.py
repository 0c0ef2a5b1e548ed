"""The exact gradient of one accumulation window, for any LightningModule.

One optimiser step uses the gradient of (sum of token losses) / (number of supervised tokens) over all micro-batches of
the window and all ranks. Micro-batches are therefore weighted by their tokens in the backward pass, and the sum is
divided by the window's tokens once, before anything else looks at the gradient. A mean of means, which Trainer and DDP
would compute, weights a one-token answer as much as a long one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from phi3_lightning.errors import DivergenceError

__all__ = ["TokenWeightedModule"]


@dataclass
class MicroBatch:
    """The contribution of a micro-batch to its window."""

    loss_sum: Tensor
    """Sum of the token losses, without a graph, a scalar."""
    count: Tensor
    """Number of supervised tokens, a scalar."""
    document_ids: list[int]
    """The documents of the batch."""


@dataclass
class AccumulationWindow:
    """The micro-batches since the gradients were last set to zero."""

    micro_batches: list[MicroBatch] = field(default_factory=list)
    """In the order in which they were seen."""
    loss: Tensor | None = None
    """Mean loss of a supervised token over window and ranks, a float32 scalar; None until the window is closed."""

    @property
    def document_ids(self) -> list[int]:
        """The documents of the window, in the order in which they were seen."""
        return [row for micro_batch in self.micro_batches for row in micro_batch.document_ids]

    def close(self, gradients: list[Tensor], all_reduce: Callable[[Tensor], Tensor], world_size: int) -> None:
        """Turn the summed gradient into that of the mean over the window's supervised tokens.

        Args:
            gradients: The gradients of the trained parameters, scaled in place.
            world_size: Number of ranks, over which the gradients have been averaged.
        """
        losses = torch.stack([micro_batch.loss_sum.double() for micro_batch in self.micro_batches])
        counts = torch.stack([micro_batch.count.double() for micro_batch in self.micro_batches])
        loss_sum, tokens = all_reduce(torch.stack([losses.sum(), counts.sum()]))
        tokens = tokens.clamp(min=1)
        if gradients:
            torch._foreach_mul_(gradients, (world_size / tokens).to(gradients[0].device, torch.float32))
        self.loss = (loss_sum / tokens).float()


class TokenWeightedModule(pl.LightningModule):
    """A LightningModule whose optimiser steps use the exact gradient over the accumulation window.

    A subclass returns :meth:`weighted_mean` from ``training_step``. A loss that it returns otherwise is left as the
    Trainer treats it, with one warning.
    """

    def __init__(self) -> None:
        super().__init__()
        self._window = AccumulationWindow()
        self._micro_batch: MicroBatch | None = None
        self._warned = False

    def trained_parameters(self) -> Iterator[nn.Parameter]:
        """Yield every parameter that an optimiser step may change."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def weighted_mean(self, loss_sum: Tensor, count: Tensor | float, document_ids: list[int]) -> Tensor:
        """Return the mean loss of the micro-batch, and store the weight of its gradient.

        Args:
            loss_sum: Sum of the losses, a scalar with a graph.
            count: Number of terms in the sum; 0 is allowed and gives a zero gradient.
            document_ids: The documents of the batch, for errors.
        """
        count = torch.as_tensor(count, device=loss_sum.device)
        self._micro_batch = MicroBatch(loss_sum.detach(), count, document_ids)
        return loss_sum / count.clamp(min=1)

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Start a new window where the gradients do."""
        self._window = AccumulationWindow()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the gradient of the micro-batch's summed loss to that of the window."""
        micro_batch, self._micro_batch = self._micro_batch, None
        if micro_batch is None:
            self._warn_unweighted()
            super().backward(loss, *args, **kwargs)
            return
        # the Trainer has divided by the number of micro-batches
        super().backward(loss * (micro_batch.count * self.trainer.accumulate_grad_batches), *args, **kwargs)
        self._window.micro_batches.append(micro_batch)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Rescale the gradient after the last backward pass: before clipping, and before any callback sees it."""

        def closure() -> Any:
            result = cast("Callable[[], Any]", optimizer_closure)()
            if self._window.micro_batches:
                own = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in self._gradients()]
                self._window.close(own, self._all_reduce, self.trainer.world_size)
            return result

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.trained_parameters() if parameter.grad is not None]

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        return cast("Tensor", self.trainer.strategy.reduce(tensor, reduce_op="sum"))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the window's loss, gradient norm and learning rate, and stop before a step that is not finite.

        Raises:
            DivergenceError: If loss or gradient are not finite; the weights are those of the step before.
        """
        if self._window.loss is None:
            return
        loss, norm = self._window.loss, nn.utils.get_total_norm(self._gradients())
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # over the shards of all ranks
        # a scaled gradient may overflow: the scaler then skips the step and lowers its scale
        watched = loss if self.scales_loss() else torch.stack([loss, norm])
        if not watched.isfinite().all():
            raise DivergenceError(
                f"optimiser step {self.global_step + 1}: the loss is {loss.item():.4g} and the norm of the gradient "
                f"{norm.item():.4g}. The step was not taken and the last checkpoint is good. Look at the rows of this "
                "window, lower model.optimizer.lr, or set trainer.gradient_clip_val: 1.0",
                self._window.document_ids,
            )
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/grad_norm", norm)
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    def scales_loss(self) -> bool:
        """Return whether the Trainer scales the loss, as ``16-mixed`` does on a GPU."""
        plugin = self.trainer.precision_plugin
        return isinstance(plugin, MixedPrecision) and plugin.scaler is not None

    def _warn_unweighted(self) -> None:
        if not self._warned:
            rank_zero_warn(
                f"{type(self).__name__}.training_step returns a loss that weighted_mean did not make: its gradient "
                "stays the Trainer's mean over micro-batches, in which a batch with few tokens weighs as much as one "
                "with many"
            )
        self._warned = True
