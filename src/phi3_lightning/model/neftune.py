"""NEFTune: noise on the embeddings in training (Jain et al. 2023, https://arxiv.org/abs/2310.05914)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def noisy_embeddings(embedding: nn.Module, lengths: list[list[int]], alpha: float | None) -> Iterator[None]:
    """Add uniform noise to the output of an embedding, while the context lasts.

    The noise of a document of L tokens is within alpha / sqrt(L x hidden size), however it is packed or padded; alpha
    None adds none. ``lengths`` are those of the batch, row by row; the embedding may get its documents in one row.
    """
    if alpha is None:
        yield
        return

    def add_noise(_module: nn.Module, _inputs: tuple[Tensor, ...], hidden: Tensor) -> Tensor:
        rows, length, size = hidden.shape
        bounds = torch.zeros(rows, length, 1)
        by_row = lengths if len(lengths) == rows else [[document for row in lengths for document in row]]
        for row, documents in zip(bounds, map(torch.tensor, by_row), strict=True):
            row[: int(documents.sum()), 0] = (alpha / (documents * size).sqrt()).repeat_interleave(documents)
        return hidden + torch.empty_like(hidden).uniform_(-1, 1) * bounds.to(hidden)

    handle = embedding.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()
