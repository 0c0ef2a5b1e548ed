"""Streaming token by token, against a loop without a cache, and against a batch of one prompt."""

import pytest
import torch
from transformers import Phi3ForCausalLM

import synthetic
from phi3_lightning.config import Generation
from phi3_lightning.errors import DataError
from phi3_lightning.generation.decode import generate, stream

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
def test_sliding_windows_and_longrope_match_a_loop_without_a_cache(tmp_path, sliding_window):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 10, "partial_rotary_factor": 1.0}  # fmt: skip
    changes = {"sliding_window": sliding_window, "original_max_position_embeddings": 10, "rope_parameters": rope}
    model = Phi3ForCausalLM.from_pretrained(synthetic.save_tiny(tmp_path / "base", **changes)).eval()
    # crosses the length at which the factors change: the cached prefix is computed again
    assert list(stream(model, PROMPT, NEVER, Generation(max_new_tokens=12))) == uncached(model, PROMPT, 12)


@pytest.mark.parametrize("kernel", ["sdpa", "documents"])
@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "temperature": 2.0, "top_p": 0.9}], ids=["greedy", "drawn"]
)
@pytest.mark.parametrize("length", [3, 9, 20])
def test_a_stream_equals_the_answer_of_a_batch_of_one(tmp_path, length, options, kernel):
    """This holds before, across and beyond the length at which longrope's factors change."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 16, "partial_rotary_factor": 1.0}  # fmt: skip
    base = synthetic.save_tiny(tmp_path / "base", original_max_position_embeddings=16, rope_parameters=rope)
    model = Phi3ForCausalLM.from_pretrained(base, attn_implementation=kernel).eval()
    prompt, config = synthetic.document(length, 1, length)[0], Generation(max_new_tokens=12, **options)
    torch.manual_seed(0)
    [expected] = generate(model, synthetic.prompt_batch([prompt], NEVER), config)
    torch.manual_seed(0)
    assert list(stream(model, prompt, NEVER, config)) == expected


def test_tokens_are_computed_only_on_request(model):
    forwards = []
    handle = model.model.embed_tokens.register_forward_hook(lambda *_: forwards.append(1))
    answer = stream(model, PROMPT, NEVER, Generation(max_new_tokens=12))
    for tokens in (1, 2, 3):
        next(answer)
        assert len(forwards) == tokens
    answer.close()
    handle.remove()
    assert len(forwards) == 3


def test_a_prompt_beyond_the_context_length_is_refused(model):
    with pytest.raises(DataError, match="the prompt: its 257 tokens do not fit into the 256 that the model reads"):
        next(stream(model, [5] * 257, NEVER, Generation()))


def test_answers_end_at_the_context_length(model):
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
