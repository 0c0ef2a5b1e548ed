"""NEFTune: noise on the embeddings in training (Jain et al. 2023, https://arxiv.org/abs/2310.05914)."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


@contextmanager
def noisy_embeddings(
    embedding: nn.Module, lengths: list[list[int]], alpha: float | None, shared: list[list[int]] | None = None
) -> Iterator[None]:
    """Add uniform noise to the output of an embedding, while the context lasts.

    The noise of a document of L tokens is within alpha / sqrt(L x hidden size), however it is packed or padded; alpha
    None adds none. ``lengths`` are those of the batch, row by row; the embedding may get its documents in one row,
    without the leading tokens that ``shared`` counts for each.
    """
    if alpha is None:
        yield
        return

    def add_noise(_module: nn.Module, _inputs: tuple[Tensor, ...], hidden: Tensor) -> Tensor:
        rows, length, size = hidden.shape
        bounds = torch.zeros(rows, length, 1)
        absent = shared or [[0] * len(row) for row in lengths]
        in_one_row = len(lengths) != rows
        by_row = ([list(chain.from_iterable(each))] if in_one_row else each for each in (lengths, absent))
        for row, *documents in zip(bounds, *by_row, strict=True):
            whole, missing = torch.tensor(documents, dtype=torch.int64)
            noise = (alpha / (whole * size).sqrt()).repeat_interleave(whole - missing)
            row[: len(noise), 0] = noise
        return hidden + torch.empty_like(hidden).uniform_(-1, 1) * bounds.to(hidden)

    handle = embedding.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()
