"""Token by token, against a loop without a cache; and text that never has to be taken back."""

import pytest
import torch
from transformers import Phi3ForCausalLM, PreTrainedTokenizerFast

import synthetic
from phi3_lightning.config import Generation
from phi3_lightning.data.template import load_tokenizer
from phi3_lightning.generation.stream import Text, stream

PROMPT = [5, 6, 7, 8, 9]
NEVER = [synthetic.VOCABULARY + 5]


def uncached(model, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def model(tiny_base) -> Phi3ForCausalLM:
    return Phi3ForCausalLM.from_pretrained(tiny_base).eval()


def test_greedy_tokens_are_those_of_a_loop_without_a_cache(model):
    expected = uncached(model, PROMPT, 12)
    assert list(stream(model, PROMPT, NEVER, Generation(max_new_tokens=12))) == expected
    stop = expected[4]
    stopped = list(stream(model, PROMPT, [stop], Generation(max_new_tokens=12)))
    assert stopped == expected[: expected.index(stop) + 1]


@pytest.mark.parametrize("sliding_window", [4, None])
def test_sliding_windows_and_long_ropes(tmp_path, sliding_window):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 10, "partial_rotary_factor": 1.0}  # fmt: skip
    changes = {"sliding_window": sliding_window, "original_max_position_embeddings": 10, "rope_parameters": rope}
    model = Phi3ForCausalLM.from_pretrained(synthetic.save_tiny(tmp_path / "base", **changes)).eval()
    # crosses the length at which the factors change: what was cached before is read again
    assert list(stream(model, PROMPT, NEVER, Generation(max_new_tokens=12))) == uncached(model, PROMPT, 12)


def test_answers_end_at_the_window(model):
    window = model.config.max_position_embeddings
    assert len(list(stream(model, [5] * (window - 3), NEVER, Generation(max_new_tokens=12)))) == 3


def test_sampling_follows_the_seed(model):
    config = Generation(max_new_tokens=12, do_sample=True, temperature=2.0, top_p=0.9)
    answers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers.append(list(stream(model, PROMPT, NEVER, config)))
    assert answers[0] == answers[1] != answers[2]
    torch.manual_seed(0)
    nearly_greedy = Generation(max_new_tokens=12, do_sample=True, top_p=1e-6)
    assert list(stream(model, PROMPT, NEVER, nearly_greedy)) == uncached(model, PROMPT, 12)


TEXTS = ["Hello  there,\n    indented\n\tand tabbed", "Grüße 東京 👋🏽 fin", " leading space", "a\n\n b . c , d"]


def pieces(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[str], str]:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    shown = Text(tokenizer)
    return [*map(shown.add, ids), shown.rest()], tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_of_the_whole(shared, text):
    found, whole = pieces(load_tokenizer(str(shared / "phi3-mini-4k-instruct")), text)
    assert "".join(found) == whole
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)
    assert len([piece for piece in found if piece]) >= 2  # it comes in pieces


def test_a_character_that_never_completes_is_shown_at_the_end(shared):
    tokenizer = load_tokenizer(str(shared / "phi3-mini-4k-instruct"))
    half = tokenizer("👋", add_special_tokens=False).input_ids[:-1]
    shown = Text(tokenizer)
    assert "".join(map(shown.add, half)).strip() == ""
    assert "\N{REPLACEMENT CHARACTER}" in shown.rest()
