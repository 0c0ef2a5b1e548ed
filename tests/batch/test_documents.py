"""Documents and pairs of a batch, each in a batch of its own."""

import pytest
import torch

import synthetic
from phi3_lightning.batch.documents import single_documents

PAIRS = [synthetic.pair(3 + seed, 2, 4, seed) for seed in range(3)]


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(value, expected[name]) if isinstance(value, torch.Tensor) else value == expected[name]
        for name, value in found.items()
    )


def test_a_pair_stays_together():
    batch = synthetic.pairs_of([PAIRS[:2], PAIRS[2:]])
    singles = [synthetic.pairs_of([[pair]], index) for index, pair in enumerate(PAIRS)]
    assert all(map(same, single_documents(batch), singles))
    assert len(list(single_documents(batch))) == 3


@pytest.mark.parametrize("labelled", [True, False])
def test_a_document_stands_alone(labelled):
    documents = [pair[0] for pair in PAIRS]
    good = [[True, False], [True]]
    rows = [documents[:2], documents[2:]]
    batch = synthetic.labelled_of(rows, good) if labelled else synthetic.batch_of(rows)
    singles = [
        synthetic.labelled_of([[document]], [[label]], index) if labelled else synthetic.batch_of([[document]], index)
        for index, (document, label) in enumerate(zip(documents, [True, False, True], strict=True))
    ]
    assert all(map(same, single_documents(batch), singles))
    assert len(list(single_documents(batch))) == 3
