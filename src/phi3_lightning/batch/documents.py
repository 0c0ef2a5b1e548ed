"""Splits a batch into its documents."""

from collections.abc import Iterator
from typing import NamedTuple

from phi3_lightning.batch.types import Batch


class DocumentSpan(NamedTuple):
    """The place of a document in a batch."""

    row: int
    tokens: slice
    document_id: int


def document_spans(batch: Batch) -> Iterator[DocumentSpan]:
    """Yield the place of each document of a batch, row by row."""
    for row, (lengths, document_ids) in enumerate(zip(batch["document_lengths"], batch["document_ids"], strict=True)):
        start = 0
        for length, document_id in zip(lengths, document_ids, strict=True):
            yield DocumentSpan(row, slice(start, start + length), document_id)
            start += length


def single_documents(batch: Batch) -> Iterator[Batch]:
    """Yield each document of a batch, or each pair of documents, as a batch of its own."""
    size = 2 if "shared_lengths" in batch else 1
    for row, lengths in enumerate(batch["document_lengths"]):
        start = 0
        for first in range(0, len(lengths), size):
            own = slice(first, first + size)
            tokens = slice(start, start + sum(lengths[own]))
            start = tokens.stop
            single = Batch(
                input_ids=batch["input_ids"][row : row + 1, tokens],
                labels=batch["labels"][row : row + 1, tokens],
                position_ids=batch["position_ids"][row : row + 1, tokens],
                document_lengths=[lengths[own]],
                document_ids=[batch["document_ids"][row][own]],
            )
            if "preferred" in batch:
                single["preferred"] = [batch["preferred"][row][own]]
            if "shared_lengths" in batch:
                single["shared_lengths"] = [batch["shared_lengths"][row][own]]
            yield single
