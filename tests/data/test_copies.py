"""Documents of equal tokens are found and named, within training data and between training and held-out data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.copies import Part, repeated, shared
from phi3_lightning.data.encode import Encoder
from phi3_lightning.data.prepare import prepare
from phi3_lightning.data.sources import find_sources
from phi3_lightning.data.template import ChatTemplate

from .conftest import chat

Make = Callable[..., Part]


@pytest.fixture
def part(tokenizer: Any, write: Callable[..., str], tmp_path: Path) -> Make:
    def part(answers: str, name: str = "train.jsonl") -> Part:
        encoder = Encoder(ChatTemplate(tokenizer), RowOptions(max_length=256))
        sources = find_sources(write([chat("a question", answer) for answer in answers], name))
        prepared = prepare(sources, encoder, on_bad_row="raise", cache_dir=str(tmp_path / "cache"))
        return Part(prepared, np.arange(len(prepared.table)))

    return part


@pytest.mark.parametrize(
    ("answers", "count", "places"),
    [
        ("abc", 0, []),
        ("aba", 1, [(3, 1)]),
        ("abbabb", 4, [(3, 2), (4, 1), (5, 2)]),
        ("a" * 2000, 1999, [(2, 1), (3, 1), (4, 1)]),
    ],
)
def test_each_document_that_repeats_an_earlier_one_counts(
    part: Make, tmp_path: Path, answers: str, count: int, places: list[tuple[int, int]]
) -> None:
    path = tmp_path / "train.jsonl"
    found = repeated(part(answers))
    assert found.count == count
    assert found.places == [f"{path}:{copy} is {path}:{original}" for copy, original in places]
    assert str(found).startswith(f"{count:,}")


def test_only_documents_of_the_part_count(part: Make) -> None:
    whole = part("abab")
    assert repeated(Part(whole.prepared, np.array([0, 1]))).count == 0
    assert repeated(Part(whole.prepared, np.array([1, 2, 3]))).places == [
        f"{whole.prepared.describe([3])[0]} is {whole.prepared.describe([1])[0]}"
    ]


@pytest.mark.parametrize(
    ("train", "held_out", "places"), [("abc", "de", []), ("abc", "dac", [(2, 1), (3, 3)]), ("b", "ab", [(2, 1)])]
)
def test_each_held_out_document_that_is_trained_counts(
    part: Make, tmp_path: Path, train: str, held_out: str, places: list[tuple[int, int]]
) -> None:
    found = shared(part(held_out, "val.jsonl"), part(train))
    assert found.count == len(places)
    assert found.places == [f"{tmp_path}/val.jsonl:{a} is {tmp_path}/train.jsonl:{b}" for a, b in places]


def test_one_token_more_is_another_document(part: Make) -> None:
    assert shared(part(["x y"], "val.jsonl"), part(["x", "x y z", "x z"])).count == 0  # type: ignore[arg-type]
