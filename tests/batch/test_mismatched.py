"""KTO's baseline: prompts with the answers of others."""

import torch

import synthetic
from phi3_lightning.batch import IGNORE_INDEX
from phi3_lightning.batch.mismatched import mismatched

DOCUMENTS = [synthetic.document(9, 4, 0), synthetic.document(6, 3, 1), synthetic.document(12, 2, 2)]


def test_each_prompt_has_the_answer_of_the_document_before():
    batch = synthetic.labelled_of([[DOCUMENTS[0], DOCUMENTS[1]], [DOCUMENTS[2]]], [[True, False], [True]])
    found = mismatched(batch)
    prompts = [DOCUMENTS[0][0][:5], DOCUMENTS[1][0][:3], DOCUMENTS[2][0][:10]]
    answers = [DOCUMENTS[2][0][10:], DOCUMENTS[0][0][5:], DOCUMENTS[1][0][3:]]
    assert found["document_lengths"] == [[7, 7, 12]]  # the last one is cut at the longest of the batch
    assert found["input_ids"].tolist() == [
        [*prompts[0], *answers[0], *prompts[1], *answers[1], *prompts[2], *answers[2][:2]]
    ]
    expected = [[IGNORE_INDEX] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
    assert found["labels"].tolist() == [[*expected[0], *expected[1], *expected[2][:12]]]
    assert found["position_ids"].tolist() == [[*range(7), *range(7), *range(12)]]


def test_rows_and_padding_do_not_matter():
    packed = mismatched(synthetic.labelled_of([DOCUMENTS], [[True, False, True]]))
    padded = mismatched(synthetic.labelled_of([[each] for each in DOCUMENTS], [[True], [False], [True]], pad=5))
    assert all(torch.equal(packed[name], padded[name]) for name in ("input_ids", "labels", "position_ids"))


def test_a_filler_batch_stays_as_it_is():
    filler = synthetic.batch_of([[]])
    assert mismatched(filler) is filler
