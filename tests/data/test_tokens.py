"""Ready-made tokens: padding is removed, masks are applied, and inconsistent rows are named."""

from typing import Any

import pytest

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.conversation import BadRowError, TokenizedDocument
from phi3_lightning.data.formats import parse_row

from .conftest import case

ROW = {"input_ids": [4, 5, 6, 7], "labels": [-100, 5, -100, 7]}
WHOLE = TokenizedDocument([4, 5, 6, 7], [(1, 2), (3, 4)])


def padded(left: int, right: int, label: int = -100) -> dict[str, Any]:
    return {
        "input_ids": [9] * left + ROW["input_ids"] + [9] * right,
        "labels": [label] * left + ROW["labels"] + [label] * right,
        "attention_mask": [0] * left + [1] * 4 + [0] * right,
    }


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        *(padded(left, right) for left, right in ((0, 0), (3, 0), (0, 3), (2, 1))),
        padded(2, 1, label=9),  # labels that are a copy of input_ids, padding included
        ROW | {"attention_mask": None, "position_ids": [], "loss_mask": ""},
        padded(2, 0) | {"position_ids": [1, 1, 0, 1, 2, 3], "token_type_ids": [0] * 6},
        ROW | {"seq_lengths": [4]},
        ROW | {"attention_mask": [True] * 4},
        {"input_ids": [4.0, 5.0, 6.0, 7.0], "labels": [-100.0, 5.0, -100.0, 7.0]},
        {"input_ids": "[4, 5, 6, 7]", "labels": "[-100, 5, -100, 7]", "attention_mask": "[1, 1, 1, 1]"},
    ],
)
def test_padding_is_cut_wherever_it_is(row: dict[str, Any]) -> None:
    assert parse_row(row, RowOptions()) == WHOLE


def test_a_padded_file_gives_the_tokens_of_the_plain_one() -> None:
    left, plain = (parse_row(case(f"f17.{name}.jsonl")[0], RowOptions()) for name in ("left_padded", "plain"))
    assert left == plain
    assert isinstance(left, TokenizedDocument)
    assert len(left.input_ids) == 17


@pytest.mark.parametrize("name", ["assistant_masks", "completion_mask", "loss_mask"])
def test_a_loss_mask_chooses_the_trained_tokens(name: str) -> None:
    assert parse_row({"input_ids": [4, 5, 6, 7], name: [0, 1, 0, 1]}, RowOptions()) == WHOLE
    assert parse_row(ROW | {name: [1, 1, 1, 0]}, RowOptions()) == TokenizedDocument([4, 5, 6, 7], [(1, 2)])
    both = {"input_ids": [4, 5, 6, 7], name: [0, 1, 1, 1], "labels": None} | (
        {"completion_mask": [1, 1, 0, 1]} if name != "completion_mask" else {"loss_mask": [1, 1, 0, 1]}
    )
    assert parse_row(both, RowOptions()) == WHOLE


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"attention_mask": [1, 0, 1, 1]}, "attention_mask has a hole"),
        ({"attention_mask": [0, 1, 0, 1]}, "attention_mask has a hole"),
        ({"attention_mask": [1, 1, 1]}, "not a mask"),
        ({"attention_mask": [1, 1, 1, 2]}, "not a mask"),
        ({"attention_mask": [[1, 1, 1, 1]]}, "not a mask"),
        ({"attention_mask": 1}, "not a list"),
        ({"completion_mask": [1, 1]}, "not a mask"),
        ({"assistant_masks": [0, 1, 0, 0.5]}, "not a mask"),
        ({"position_ids": [0, 1, 0, 1]}, "several documents in one row"),
        ({"position_ids": [5, 6, 7, 8]}, "several documents in one row"),
        ({"seq_lengths": [2, 2]}, "several documents in one row"),
        ({"token_type_ids": [0, 0, 1, 1]}, "token types"),
        ({"labels": None}, "no labels"),
        ({"input_ids": [4, 5, 6, 7.5]}, "not tokens"),
        ({"input_ids": [4, 5, 6, True]}, "not tokens"),
    ],
)
def test_inconsistent_masks_and_labels_are_a_bad_row(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError) as caught:
        parse_row(ROW | fields, RowOptions())
    assert caught.value.reason == reason


def test_text_is_read_where_tokens_have_no_labels() -> None:
    assert parse_row({"text": "x", "input_ids": [1], "attention_mask": [1]}, RowOptions()) is not None
    with pytest.raises(BadRowError, match="no labels"):
        parse_row({"input_ids": [1], "attention_mask": [1]}, RowOptions())
