"""Prompts with the answers of others, from which KTO estimates its baseline."""

import torch

from phi3_lightning.batch.documents import document_spans
from phi3_lightning.batch.types import IGNORE_INDEX, Batch


def mismatched(batch: Batch) -> Batch:
    """Return each document's prompt with the answer of the document before it, in one row; the first gets the last one.

    An answer begins with the first supervised token of its document. A document that would be longer than the longest
    one of the batch is cut at that length.
    """
    documents = [
        (batch["input_ids"][row, tokens], batch["labels"][row, tokens]) for row, tokens, _ in document_spans(batch)
    ]
    if not documents:
        return batch
    starts = [_answer_start(labels) for _, labels in documents]
    longest = max(len(ids) for ids, _ in documents)
    ids, labels = [], []
    for index, (own, _) in enumerate(documents):
        other_ids, other_labels = documents[index - 1]
        start, other_start = starts[index], starts[index - 1]
        ids.append(torch.cat([own[:start], other_ids[other_start:]])[:longest])
        unsupervised = torch.full_like(own[:start], IGNORE_INDEX)
        labels.append(torch.cat([unsupervised, other_labels[other_start:]])[:longest])
    lengths = [len(document) for document in ids]
    return Batch(
        input_ids=torch.cat(ids)[None],
        labels=torch.cat(labels)[None],
        position_ids=torch.cat([torch.arange(length, device=ids[0].device) for length in lengths])[None],
        document_lengths=[lengths],
        document_ids=[[document_id for row in batch["document_ids"] for document_id in row]],
    )


def _answer_start(labels: torch.Tensor) -> int:
    """Return the place of the first supervised token, or the length where there is none."""
    supervised = (labels != IGNORE_INDEX).nonzero()
    return int(supervised[0]) if len(supervised) else len(labels)
