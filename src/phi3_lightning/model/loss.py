"""From hidden states to token losses: the only place where labels are shifted.

The head runs on supervised positions only, in chunks, so that (positions x vocabulary) float32 values never exist at
once.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from phi3_lightning.batch import IGNORE_INDEX, Batch
from phi3_lightning.batch.documents import document_spans

CHUNK = 256
"""Supervised positions whose logits exist at one time (33 MB in float32 for a vocabulary of 32,064).
A CPU is fastest with 128 to 256."""
GPU_CHUNK = 1024
"""As many on a GPU (131 MB), which 256 do not fill."""


def _chunk(states: Tensor) -> int:
    return CHUNK if states.device.type == "cpu" else GPU_CHUNK


def supervised_positions(hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the states that predict a supervised token, shape (tokens, hidden size), and those tokens, int64.

    Args:
        hidden: Last hidden states, shape (rows, length, hidden size).
    """
    targets = batch["labels"][:, 1:]
    supervised = targets != IGNORE_INDEX
    return hidden[:, :-1][supervised], targets[supervised]


def cross_entropy(hidden: Tensor, head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the summed loss of the supervised tokens, a float32 scalar, and their number, an int64 scalar.

    A batch without a supervised token has the loss 0 with a graph, so that its backward pass gives zeros.
    """
    states, targets = supervised_positions(hidden, batch)
    return summed_loss(states, targets, head), torch.tensor(targets.numel(), device=hidden.device)


def document_losses(hidden: Tensor, head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the summed token losses of each document, float32 with a graph, and its supervised tokens, int64.

    Both have the shape (documents,), in the order of ``document_ids``. A batch without a document has a graph too.
    """
    states, targets = supervised_positions(hidden, batch)
    supervised = (batch["labels"] != IGNORE_INDEX).cpu()  # once, and not for each document
    counts = [int(supervised[row, tokens].sum()) for row, tokens, _ in document_spans(batch)]
    losses = token_losses(states, targets, head)
    sums = [part.sum() for part in losses.split(counts)] if counts else []
    return torch.stack(sums) if sums else losses, torch.tensor(counts, dtype=torch.int64, device=hidden.device)


def token_losses(states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """Return the loss of each token, shape (tokens,), float32 with a graph; arguments as in :func:`summed_loss`."""
    if not _is_trained(head):
        return cast("Tensor", _FrozenHeadByToken.apply(states, targets, head))  # type: ignore[no-untyped-call]
    size = _chunk(states)
    losses = [
        checkpoint(_chunk_loss, head, chunk, labels, "none", use_reentrant=False)
        for chunk, labels in zip(states.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(losses)


def _is_trained(head: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in head.parameters())


def summed_loss(states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """Return the sum of token losses, a float32 scalar with a graph, also where there is no token.

    Args:
        states: Hidden states that predict the tokens, shape (tokens, hidden size).
        targets: The tokens, shape (tokens,), int64.
    """
    if not _is_trained(head):
        return cast("Tensor", _FrozenHead.apply(states, targets, head))  # type: ignore[no-untyped-call]
    loss_sum = torch.zeros((), dtype=torch.float32, device=states.device)
    size = _chunk(states)
    for chunk, labels in zip(states.split(size), targets.split(size), strict=True):
        loss_sum = loss_sum + checkpoint(_chunk_loss, head, chunk, labels, use_reentrant=False)
    return loss_sum


class _FrozenHead(torch.autograd.Function):
    """Makes the gradient of the states beside the loss, while a chunk's logits exist: none is computed twice.

    As Liger's and torch's own fused losses do (https://arxiv.org/abs/2410.10989), for any frozen module as the head.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
        loss_sum = torch.zeros((), dtype=torch.float32, device=states.device)
        gradient = torch.empty_like(states) if states.requires_grad else None
        size = _chunk(states)
        for start in _starts(targets, size):
            chunk, labels = states[start : start + size].detach(), targets[start : start + size]
            if gradient is None:
                loss_sum += _chunk_loss(head, chunk, labels)
                continue
            loss, gradient[start : start + size] = _loss_and_gradient(head, chunk, labels)
            loss_sum += loss
        ctx.save_for_backward(gradient)
        return loss_sum

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * factor.to(gradient.dtype), None, None


class _FrozenHeadByToken(torch.autograd.Function):
    """The same for the loss of each token, of which the state's gradient is a multiple."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
        losses = torch.empty(len(targets), dtype=torch.float32, device=states.device)
        gradient = torch.empty_like(states) if states.requires_grad else None
        size = _chunk(states)
        for start in _starts(targets, size):
            part = slice(start, start + size)
            chunk, labels = states[part].detach(), targets[part]
            if gradient is None:
                losses[part] = _chunk_loss(head, chunk, labels, "none")
            else:
                losses[part], gradient[part] = _loss_and_gradient(head, chunk, labels, "none")
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * factors[:, None]).to(gradient.dtype), None, None  # float32 factors are not rounded first


def _starts(targets: Tensor, size: int) -> range:
    """Where the chunks start; without a token there is an empty one, since all ranks gather a sharded head together."""
    return range(0, max(len(targets), 1), size)


def _loss_and_gradient(
    head: nn.Module, states: Tensor, labels: Tensor, reduction: str = "sum"
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        logits = head(states.requires_grad_())
    log_probs = logits.detach().float().log_softmax(-1)
    loss = F.nll_loss(log_probs, labels, reduction=reduction)
    residuals = log_probs.exp_()  # less one at the targets: by hand in half of the passes over the vocabulary
    residuals[torch.arange(len(labels), device=labels.device), labels] -= 1
    return loss, torch.autograd.grad(logits, states, residuals.to(logits.dtype))[0]


def _chunk_loss(head: nn.Module, states: Tensor, labels: Tensor, reduction: str = "sum") -> Tensor:
    return F.cross_entropy(head(states).float(), labels, reduction=reduction)


@torch.no_grad()
def correct_tokens(hidden: Tensor, head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Count the supervised tokens that are the argmax of their logits, and all of them, int64 scalars."""
    states, targets = supervised_positions(hidden, batch)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    size = _chunk(states)
    for chunk, labels in zip(states.split(size), targets.split(size), strict=True):
        correct += (head(chunk).argmax(-1) == labels).sum()
    return correct, torch.tensor(targets.numel(), device=hidden.device)


@torch.no_grad()
def by_document(hidden: Tensor, head: nn.Module, batch: Batch) -> Tensor:
    """Measure each document of a batch.

    Returns:
        For each document, in the order of ``document_ids``: the sum of its token losses, its supervised tokens that
        are the argmax of their logits, and all its supervised tokens; shape (documents, 3), float64.
    """
    owner = torch.zeros_like(batch["labels"])
    spans = list(document_spans(batch))
    for index, (row, tokens, _) in enumerate(spans):
        owner[row, tokens] = index
    states, targets = supervised_positions(hidden, batch)
    owners = owner[:, 1:][batch["labels"][:, 1:] != IGNORE_INDEX]
    found = torch.zeros(len(spans), 3, dtype=torch.float64, device=hidden.device)
    size = _chunk(states)
    for chunk, labels, of in zip(states.split(size), targets.split(size), owners.split(size), strict=True):
        logits = head(chunk).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        measured = torch.stack([losses, (logits.argmax(-1) == labels).float(), torch.ones_like(losses)], dim=-1)
        found.index_add_(0, of, measured.double())
    return found
