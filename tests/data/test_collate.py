"""Padding is known by length, never by id, and a document's first token is never a label."""

import numpy as np
import pytest

from phi3_lightning.batch import IGNORE_INDEX
from phi3_lightning.data.collate import Document, collate, collate_prompts


def document(document_id: int, ids: list[int], *spans: tuple[int, int]) -> Document:
    return Document(document_id, np.array(ids, dtype=np.int32), np.array(spans, dtype=np.int32).reshape(-1))


def test_rows_of_several_documents() -> None:
    batch = collate([[document(5, [1, 2, 3], (1, 3)), document(2, [4, 5], (0, 2))], [document(0, [6], (0, 1))]], 9)
    x = IGNORE_INDEX
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 9, 9, 9, 9]]
    assert batch["labels"].tolist() == [[x, 2, 3, x, 5], [x, x, x, x, x]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 0, 0]]
    assert batch["document_lengths"] == [[3, 2], [1]]
    assert batch["document_ids"] == [[5, 2], [0]]


@pytest.mark.parametrize("pad", [0, 2, 3])
def test_the_pad_id_moves_no_label(pad: int) -> None:
    """This holds even if the pad id is that of the trained end token."""
    batch = collate([[document(0, [1, 2, 3], (1, 3))], [document(1, [1, 2, 3, 2, 3], (3, 5))]], pad)
    x = IGNORE_INDEX
    assert batch["labels"].tolist() == [[x, 2, 3, x, x], [x, x, x, 2, 3]]


def test_a_filler_row_has_no_label() -> None:
    batch = collate([], 7)
    assert batch["input_ids"].tolist() == [[7, 7]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX] * 2]
    assert batch["document_lengths"] == [[]]
    assert batch["document_ids"] == [[]]


def test_prompts_are_padded_on_the_left() -> None:
    batch = collate_prompts([[document(3, [1, 2])], [document(1, [9, 9, 9])]], 9, [7])
    assert batch["input_ids"].tolist() == [[9, 1, 2], [9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert (batch["document_ids"], batch["stop_ids"]) == ([3, 1], [7])
    assert collate_prompts([], 9, [7])["document_ids"] == []
