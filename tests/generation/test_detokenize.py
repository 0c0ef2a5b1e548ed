"""Text streamed token by token is never retracted."""

import pytest
from transformers import PreTrainedTokenizerFast

from phi3_lightning.data.template import load_tokenizer
from phi3_lightning.generation.detokenize import IncrementalDetokenizer

TEXTS = ["Hello  there,\n    indented\n\tand tabbed", "Grüße 東京 👋🏽 fin", " leading space", "a\n\n b . c , d"]


def pieces(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[str], str]:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [*map(detokenizer.add, ids), detokenizer.flush()], tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_of_the_whole(shared, text):
    found, whole = pieces(load_tokenizer(str(shared / "phi3-mini-4k-instruct")), text)
    assert "".join(found) == whole
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)
    assert len([piece for piece in found if piece]) >= 2  # it is streamed in pieces


def test_a_character_that_never_completes_is_shown_at_the_end(shared):
    tokenizer = load_tokenizer(str(shared / "phi3-mini-4k-instruct"))
    half = tokenizer("👋", add_special_tokens=False).input_ids[:-1]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert "".join(map(detokenizer.add, half)).strip() == ""
    assert "\N{REPLACEMENT CHARACTER}" in detokenizer.flush()
