"""The tokens that the answers of a pair have in common, computed once.

The row that a kernel computes has the chosen answer's document whole, and of the rejected answer's only what follows
the shared tokens. Its queries are fewer than its keys:

    computed      p0 p1 p2 p3 c4 c5 | r3 r4 r5 r6        3 tokens are shared, p3 = r3 is the one before the first answer
    keys          p0 p1 p2 p3 c4 c5 | p0 p1 p2 r3 r4 r5 r6
    positions      0  1  2  3  4  5 |           3  4  5  6

The token before the first supervised one is computed for both documents, since its hidden state predicts what the two
answers begin with; so labels and loss are those of two whole documents.
"""

from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from phi3_lightning.batch import Batch


class ComputedRow(NamedTuple):
    """The tokens of a batch that a kernel computes, one after the other in one row."""

    places: Tensor
    """The place of each among all places of the batch, shape (computed,), int64."""
    lengths: list[int]
    """Computed tokens of each document."""
    shared: list[int]
    """Tokens of each document that are those with which the document before it begins."""
    sources: Tensor
    """Which of them each token of the documents is, shape (tokens,), int64; the documents' keys come in this order."""


def computed_row(batch: Batch) -> ComputedRow:
    """Return what is computed of a batch with ``shared_lengths``."""
    width = batch["input_ids"].shape[1]
    lengths = list(chain.from_iterable(batch["document_lengths"]))
    shared = list(chain.from_iterable(batch["shared_lengths"]))
    starts = [
        row * width + sum(documents[:index])
        for row, documents in enumerate(batch["document_lengths"])
        for index in range(len(documents))
    ]
    places, sources = [], []
    computed = former = 0  # the first computed token of this document, and of the one before it
    for start, length, common in zip(starts, lengths, shared, strict=True):
        places.append(torch.arange(start + common, start + length))
        own = torch.arange(computed, computed + length - common)
        sources.append(torch.cat([torch.arange(former, former + common), own]))
        former, computed = computed, computed + length - common
    device = batch["input_ids"].device
    return ComputedRow(
        torch.cat(places).to(device),
        [length - common for length, common in zip(lengths, shared, strict=True)],
        shared,
        torch.cat(sources).to(device),
    )


def with_shared(parts: tuple[Tensor, ...], shared: list[int]) -> list[Tensor]:
    """Return the keys or values of each document, with the tokens that it shares with the one before it in front.

    Args:
        parts: Those of the computed tokens of each document, shape (1, heads, computed tokens, head size).
    """
    return [
        part if common == 0 else torch.cat([parts[index - 1][:, :, :common], part], dim=2)
        for index, (part, common) in enumerate(zip(parts, shared, strict=True))
    ]
