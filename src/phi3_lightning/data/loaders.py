"""DataLoaders in the one shape that Lightning takes in every stage, on one rank and on many."""

import os
from collections.abc import Callable
from typing import Any

import torch

from phi3_lightning.data.sampler import BatchLoader, BatchOrder, ElasticResume, PlannedBatches
from phi3_lightning.data.streaming import StreamedBatches, StreamLoader


def batch_loader(
    batches: PlannedBatches,
    *,
    seed: int,
    shuffle: bool,
    position: Callable[[], int],
    resumed: Callable[[], ElasticResume | None],
    num_replicas: int,
    rank: int,
    num_workers: int,
) -> BatchLoader:
    """Load the batches of a plan.

    Args:
        batches: The batches.
        seed: With the epoch, decides their order.
        shuffle: Whether each epoch has an order of its own.
        position: Says how many batches of an epoch this rank has already seen.
        resumed: Says where an epoch went on with another number of ranks.
        num_replicas: Number of ranks.
        rank: This rank.
        num_workers: Processes that collate ahead.

    Returns:
        The loader.
    """
    ranks: dict[str, Any] = {"num_replicas": num_replicas, "rank": rank}
    order = BatchOrder(batches.indices, seed=seed, shuffle=shuffle, position=position, resumed=resumed, **ranks)
    return BatchLoader(batches, batch_size=None, sampler=order, **_common(num_workers))


def stream_loader(stream: StreamedBatches, *, position: Callable[[], int], num_workers: int) -> StreamLoader:
    """Load the batches of a stream.

    Args:
        stream: The batches.
        position: Says how many batches this rank has already seen.
        num_workers: Processes that read and tokenise ahead.

    Returns:
        The loader.
    """
    if num_workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # their threads do not live on in forked workers
    loader = StreamLoader(stream, batch_size=None, **_common(num_workers))
    loader.position = position
    return loader


def _common(num_workers: int) -> dict[str, Any]:
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        # of its own: iterating draws from it, and must not from the global one
        "generator": torch.Generator(),
    }
