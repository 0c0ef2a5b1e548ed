"""Which rows are used as prompts, and why others are not."""

import numpy as np
import pytest

import synthetic
from phi3_lightning.batch import IGNORE_INDEX
from phi3_lightning.evaluate.cases import Case, cases, choose, stop_ids, unusable

END, EOS, PLAIN = 90, 91, 40


class Token:
    def __init__(self, special: bool, content: str = "") -> None:
        self.special = special
        self.content = content


class FakeTokenizer:
    eos_token_id = EOS
    added_tokens_decoder = {END: Token(True), EOS: Token(True), 92: Token(False)}

    def decode(self, token_ids, skip_special_tokens=False):
        return " ".join(str(token) for token in token_ids if not (skip_special_tokens and token in (END, EOS)))


def document(ids: list[int], trained: list[int]) -> tuple[list[int], list[int]]:
    return ids, [token if index in trained else IGNORE_INDEX for index, token in enumerate(ids)]


def test_the_last_trained_turn_is_the_reference_in_packed_rows_too():
    rows = [
        [document([5, 6, 7, END, 8, 9, END, EOS], [2, 3, 5, 6]), document([10, 11, 12, END], [2, 3])],
        [document([20, 21, END], [1, 2])],
    ]
    assert cases(synthetic.batch_of(rows, first_id=7)) == [
        Case(7, [5, 6, 7, END, 8], [9, END]), Case(8, [10, 11], [12, END]), Case(9, [20], [21, END])
    ]  # fmt: skip


def test_a_filler_has_no_case():
    filler = synthetic.batch_of([[([5, 5], [IGNORE_INDEX] * 2)]])
    filler["document_lengths"], filler["document_ids"] = [[]], [[]]
    assert cases(filler) == []


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(0, [5, 6], [7, END]), None),
        (Case(0, [5, 6], [7, EOS]), None),
        (Case(0, [5, 6, 7], []), "no trained turn"),
        (Case(0, [5], [6, 7, EOS]), "no prompt before the trained text"),
        (Case(0, [5, 6], [7, PLAIN]), "the reference was cut off"),
        (Case(0, [5, 6], [7, 92]), "the reference was cut off"),
        (Case(0, [5, 6], [END]), "empty reference"),
    ],
)
def test_unusable_cases_have_a_reason(case, reason):
    assert unusable(case, FakeTokenizer()) == reason


def test_answers_stop_where_references_do_and_at_the_end_of_text():
    found = [Case(0, [5, 6], [7, END]), Case(1, [5, 6], [8, END])]
    assert stop_ids(found, FakeTokenizer()) == [END, EOS]
    assert stop_ids([], FakeTokenizer()) == [EOS]


def test_answers_of_phi4_also_stop_at_the_end_of_text_that_is_not_its_own():
    tokenizer = FakeTokenizer()
    tokenizer.eos_token_id = END
    tokenizer.added_tokens_decoder = {END: Token(True, "<|im_end|>"), EOS: Token(True, "<|endoftext|>")}
    assert stop_ids([Case(0, [5, 6], [7, END])], tokenizer) == [END, EOS]


def test_rows_are_chosen_alike_whatever_their_order():
    everyone = list(range(1000))
    chosen = choose(everyone, 50)
    assert len(set(chosen)) == 50
    assert chosen == sorted(chosen) == choose(reversed(everyone), 50) == choose(everyone + everyone, 50)
    assert 300 < np.mean(chosen) < 700  # not the first rows
    assert choose([3, 1, 2], None) == choose([3, 1, 2], 5) == [1, 2, 3]
