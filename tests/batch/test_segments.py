"""The segments of a document join to its text, whichever tokens are trained, and each token is in one of them."""

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import phi3_lightning
from data.conftest import build_tokenizer
from phi3_lightning.batch.segments import segments

TINY = Path(phi3_lightning.__file__).parent / "assets/tiny_phi3"
TEXTS = [
    "Do you sell ink?",
    " two  blanks ",
    "über 😀 你好",
    "a\n\n  b\tc",
    "",
    "1 2 3 . , ! n't",
    "\N{REPLACEMENT CHARACTER} x",
]


@pytest.fixture(scope="module", params=["byte fallback", "bytes", "phi3"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "byte fallback":
        return build_tokenizer()
    if request.param == "bytes":
        return PreTrainedTokenizerFast.from_pretrained(TINY)
    shared = request.getfixturevalue("shared")
    return PreTrainedTokenizerFast.from_pretrained(shared / "phi3-mini-4k-instruct")


@pytest.mark.parametrize("text", TEXTS)
def test_every_segmentation_of_a_text_joins_to_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    for cut in range(len(ids) + 1):
        found = segments(ids, [at >= cut for at in range(len(ids))], tokenizer)
        assert "".join(segment.text for segment in found) == whole
        assert [token for segment in found for token in segment.ids] == ids


def test_each_message_of_a_chat_is_shown_as_written(tokenizer: Any) -> None:
    question, answer = "Do you sell ink?", "Yes, two kinds: blue 😀 and black."
    ids = tokenizer(f"<|user|>\n{question}<|end|>\n<|assistant|>\n{answer}<|end|>", add_special_tokens=False)[
        "input_ids"
    ]
    rng = random.Random(0)
    for _ in range(20):
        trained = [rng.random() < 0.5 for _ in ids]
        found = segments(ids, trained, tokenizer)
        assert [flag for segment in found for flag in [segment.trained] * len(segment.ids)] == trained
        shown = "".join(f"[{segment.text}]" if segment.special else segment.text for segment in found)
        assert shown.replace("\n", "") == f"[<|user|>]{question}[<|end|>][<|assistant|>]{answer}[<|end|>]"
