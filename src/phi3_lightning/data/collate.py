"""Collates token arrays into the batches that the model reads."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from phi3_lightning.batch import IGNORE_INDEX, Batch, PromptBatch
from phi3_lightning.batch.padding import prompt_batch
from phi3_lightning.data.conversation import Kind


class Document(NamedTuple):
    """One tokenised document."""

    document_id: int
    """Its index in the tokenised data set."""
    input_ids: NDArray[np.int32]
    """Its tokens, shape (length,)."""
    spans: NDArray[np.int32]
    """Start and end of each supervised range, flat, shape (2 * ranges,)."""
    chosen_length: int = 0
    """Tokens of the chosen conversation, which those of the rejected one follow; 0: not a pair."""
    shared_length: int = 0
    """Leading tokens that both conversations of a pair have in common, as ``Batch`` counts them."""
    preferred: bool | None = None
    """Whether a labelled answer is good, or which side of a pair this is; None: neither."""

    @property
    def kind(self) -> Kind:
        """The kind of its row."""
        return "pair" if self.chosen_length else "chat" if self.preferred is None else "labelled"

    def sides(self) -> list["Document"]:
        """Return the chosen and the rejected conversation of a pair; any other document as it is."""
        if not self.chosen_length:
            return [self]
        ids = np.split(self.input_ids, [self.chosen_length])
        spans = self.spans.reshape(-1, 2)
        of_rejected = spans[:, 0] >= self.chosen_length
        chosen, rejected = spans[~of_rejected].reshape(-1), spans[of_rejected].reshape(-1) - self.chosen_length
        return [
            Document(self.document_id, ids[0], chosen, preferred=True),
            Document(self.document_id, ids[1], rejected, shared_length=self.shared_length, preferred=False),
        ]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that fills up short rows; any will do, since padding is known by length and never by id."""
    return tokenizer.pad_token_id or 0


def full_row(length: int, kind: Kind = "chat") -> list[Document]:
    """Return a row of one placeholder document of ``length`` tokens, all but the first of them supervised.

    A pair has two conversations of this length.
    """
    if kind == "pair":
        spans = np.array([0, length, length, 2 * length], np.int32)
        return [Document(0, np.ones(2 * length, np.int32), spans, chosen_length=length)]
    preferred = True if kind == "labelled" else None
    return [Document(0, np.ones(length, np.int32), np.array([0, length], np.int32), preferred=preferred)]


def collate(rows: list[list[Document]], pad_token_id: int, kind: Kind = "chat") -> Batch:
    """Make a batch, as long as its longest row, of the documents of each row; no row gives a filler without labels.

    ``kind`` is that of a filler.
    """
    kind = rows[0][0].kind if rows else kind
    rows = [[side for document in row for side in document.sides()] for row in rows]
    width = max((sum(len(document.input_ids) for document in row) for row in rows), default=2)
    shape = (max(len(rows), 1), width)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    for index, row in enumerate(rows):
        start = 0
        for document in row:
            end = start + len(document.input_ids)
            input_ids[index, start:end] = document.input_ids
            position_ids[index, start:end] = np.arange(end - start)
            for first, stop in document.spans.reshape(-1, 2).tolist():
                first = max(first, 1)  # nothing predicts a document's first token
                labels[index, start + first : start + stop] = document.input_ids[first:stop]
            start = end
    batch = Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        document_lengths=[[len(document.input_ids) for document in row] for row in rows] or [[]],
        document_ids=[[document.document_id for document in row] for row in rows] or [[]],
    )
    if kind != "chat":
        batch["preferred"] = [[bool(document.preferred) for document in row] for row in rows] or [[]]
    if kind == "pair":
        batch["shared_lengths"] = [[document.shared_length for document in row] for row in rows] or [[]]
    return batch


def collate_prompts(rows: list[list[Document]], pad_token_id: int, stop_ids: list[int]) -> PromptBatch:
    """Make a left-padded batch of the prompts of all rows; no row gives a filler, a prompt without an id."""
    prompts = [prompt for row in rows for prompt in row]
    ids = [prompt.input_ids.tolist() for prompt in prompts]
    return prompt_batch(ids, [prompt.document_id for prompt in prompts], stop_ids, pad_token_id)
