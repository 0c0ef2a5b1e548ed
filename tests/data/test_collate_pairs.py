"""A pair is two whole documents of one row; chats have no field of preferences."""

from typing import Any

import numpy as np
import pytest
import torch

from phi3_lightning.batch import IGNORE_INDEX, Batch
from phi3_lightning.batch.documents import single_documents
from phi3_lightning.data.collate import Document, collate, full_row

FIELDS = {"input_ids", "labels", "position_ids", "document_lengths", "document_ids"}


def pair(document_id: int, chosen: list[int], rejected: list[int], prompt: int) -> Document:
    ids = np.array(chosen + rejected, np.int32)
    spans = np.array([prompt, len(chosen), len(chosen) + prompt, len(ids)], np.int32)
    return Document(document_id, ids, spans, chosen_length=len(chosen), shared_length=prompt - 1)


PAIRS = [pair(7, [1, 2, 3, 4], [1, 2, 5], 2), pair(3, [8, 9], [8, 6, 6], 1), pair(5, [4, 4], [4, 5], 1)]
LABELLED = [
    Document(index, np.array([1, 2, 3], np.int32), np.array([1, 3], np.int32), preferred=index > 0) for index in (0, 1)
]


def test_a_pair_is_two_whole_documents_of_one_row() -> None:
    x = IGNORE_INDEX
    batch = collate([PAIRS[:2]], 0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 1, 2, 5, 8, 9, 8, 6, 6]]
    assert batch["labels"].tolist() == [[x, x, 3, 4, x, x, 5, x, 9, x, 6, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["document_lengths"] == [[4, 3, 2, 3]]
    assert batch["document_ids"] == [[7, 7, 3, 3]]
    assert batch["preferred"] == [[True, False, True, False]]
    assert batch["shared_lengths"] == [[0, 1, 0, 0]]


def test_labelled_documents_share_nothing() -> None:
    batch = collate([LABELLED, LABELLED[:1]], 0)
    assert batch["preferred"] == [[False, True], [False]]
    assert batch.keys() == FIELDS | {"preferred"}


def test_chats_have_no_field_of_preferences() -> None:
    chat = LABELLED[0]._replace(preferred=None)
    assert collate([[chat]], 0).keys() == collate([], 0).keys() == FIELDS


def test_fillers_have_the_fields_of_their_kind() -> None:
    assert collate([], 0, "pair")["preferred"] == collate([], 0, "pair")["shared_lengths"] == [[]]
    assert collate([], 0, "labelled")["preferred"] == [[]]
    assert collate([], 0, "labelled").keys() == FIELDS | {"preferred"}


@pytest.mark.parametrize("kind", ["chat", "pair", "labelled"])
def test_placeholder_rows_are_full(kind: Any) -> None:
    batch = collate([full_row(5, kind)], 0)
    assert batch["document_lengths"] == [[5, 5] if kind == "pair" else [5]]
    assert (batch["labels"] != IGNORE_INDEX).sum() == (8 if kind == "pair" else 4)
    assert batch.keys() == collate([], 0, kind).keys()


def plain(batch: Batch) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@pytest.mark.parametrize("documents", [PAIRS, LABELLED, [LABELLED[0]._replace(preferred=None)]])
def test_single_documents_keep_pairs_together(documents: list[Document]) -> None:
    singles = list(single_documents(collate([documents[:2], documents[2:]] if documents[2:] else [documents], 0)))
    assert [plain(single) for single in singles] == [plain(collate([[document]], 0)) for document in documents]
