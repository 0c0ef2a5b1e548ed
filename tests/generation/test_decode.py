"""From prompts to answers, against a plain greedy loop."""

import pytest
import torch
from transformers import GenerationConfig, Phi3ForCausalLM

import synthetic
from phi3_lightning.batch.padding import prompt_batch
from phi3_lightning.config import Generation
from phi3_lightning.errors import DataError
from phi3_lightning.generation.decode import generate

END, END_OF_TEXT = 7, 2
NEVER = [synthetic.VOCABULARY + 5]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14]]


class Script(Phi3ForCausalLM):
    """Answers every prompt with the given tokens."""

    def say(self, *tokens: int) -> "Script":
        self.tokens = list(tokens)
        return self

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = torch.zeros_like(output.logits)
        output.logits[..., self.tokens.pop(0)] = 1.0
        return output


KERNELS = ["sdpa", "documents"]
"""Other kernels read prompts with padding, 'documents' without."""


def load(base, kernel: str = "sdpa", kind: type = Phi3ForCausalLM, **options) -> Phi3ForCausalLM:
    return kind.from_pretrained(base, attn_implementation=kernel, **options).eval()


@pytest.fixture(scope="module", params=KERNELS)
def model(request, tiny_base) -> Phi3ForCausalLM:
    return load(tiny_base, request.param)


@pytest.fixture
def script(tiny_base) -> Script:
    return Script.from_pretrained(tiny_base)


def greedy(model, prompt: list[int], count: int, stop=()) -> list[int]:
    """Token by token, without a cache, a batch or padding."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
            if ids[-1] in stop:
                break
    return ids[len(prompt) :]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sliding_window", [None, 4])
def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone(tmp_path, sliding_window, kernel):
    model = load(synthetic.save_tiny(tmp_path / "base", sliding_window=sliding_window), kernel)
    together = generate(model, synthetic.prompt_batch(PROMPTS, NEVER), Generation(max_new_tokens=12))
    alone = [
        generate(model, synthetic.prompt_batch([prompt], NEVER), Generation(max_new_tokens=12))[0] for prompt in PROMPTS
    ]
    assert together == alone == [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in together}) > 1


def test_negative_control_attending_to_padding_changes_answers(model):
    batch = synthetic.prompt_batch(PROMPTS, NEVER)
    hidden = generate(model, batch, Generation(max_new_tokens=12))
    batch["attention_mask"][:] = 1
    seen = generate(model, batch, Generation(max_new_tokens=12))
    assert seen[0] == hidden[0]
    assert seen[1:] != hidden[1:]


@pytest.mark.parametrize("stop", [END, END_OF_TEXT])
def test_both_stop_tokens_end_an_answer(script, stop):
    script.say(20, 21, stop, 22, 23)
    batch = synthetic.prompt_batch([[5, 6]], [END, END_OF_TEXT])
    assert generate(script, batch, Generation(max_new_tokens=5)) == [[20, 21, stop]]
    assert script.tokens == [22, 23]  # these were never requested


def test_tokens_after_a_stop_token_are_not_returned(model):
    free = [greedy(model, prompt, 10) for prompt in PROMPTS]
    stop = free[0][3]
    expected = [greedy(model, prompt, 10, [stop]) for prompt in PROMPTS]
    assert len({len(answer) for answer in expected}) > 1  # some answers end before others
    assert generate(model, synthetic.prompt_batch(PROMPTS, [stop]), Generation(max_new_tokens=10)) == expected


class Counting(Phi3ForCausalLM):
    """Records the number of tokens of each forward."""

    given: list[int]

    def count(self) -> "Counting":
        self.given = []
        self.model.embed_tokens.register_forward_hook(
            lambda module, inputs, output: self.given.append(inputs[0].numel())
        )
        return self


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sliding_window", [None, 4])
def test_padding_and_finished_rows_cost_no_computation(tmp_path, sliding_window, kernel):
    model = load(synthetic.save_tiny(tmp_path / "base", sliding_window=sliding_window), kernel, Counting).count()
    free = [greedy(model, prompt, 10) for prompt in PROMPTS]
    stop = free[0][3]
    expected = [greedy(model, prompt, 10, [stop]) for prompt in PROMPTS]
    model.given = []
    assert generate(model, synthetic.prompt_batch(PROMPTS, [stop]), Generation(max_new_tokens=10)) == expected
    read = {"sdpa": 3 * max(map(len, PROMPTS)), "documents": sum(map(len, PROMPTS))}[kernel]
    assert model.given[0] == read
    assert sum(model.given[1:]) == sum(len(answer) - 1 for answer in expected)  # each token but the last is read
    assert sum(model.given[1:]) < 3 * (max(map(len, expected)) - 1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("lengths", [(30, 26, 3), (40, 30, 3), (31, 31)])
def test_longrope_reads_each_row_as_if_it_were_alone(tmp_path, lengths, kernel):
    """Longrope's factors follow the longest row of a batch: rows are separated at the limit of the short factors."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 32}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    base = synthetic.save_tiny(tmp_path / "base", rope_parameters=rope, original_max_position_embeddings=32)
    model = load(base, kernel)
    prompts = [synthetic.document(length, 1, seed)[0] for seed, length in enumerate(lengths)]
    together = generate(model, synthetic.prompt_batch(prompts, NEVER), Generation(max_new_tokens=12))
    assert together == [greedy(model, prompt, 12) for prompt in prompts]


def test_a_truncated_answer_has_no_stop_token(script):
    script.say(20, 21, 22, END)
    batch = synthetic.prompt_batch([[5]], [END, END_OF_TEXT])
    assert generate(script, batch, Generation(max_new_tokens=3)) == [[20, 21, 22]]


def test_an_answer_ends_at_the_context_length_whatever_shares_the_batch(model):
    window = model.config.max_position_embeddings
    batch = synthetic.prompt_batch([[5] * (window - 3), [6] * (window - 9), [7]], NEVER)
    assert [len(answer) for answer in generate(model, batch, Generation(max_new_tokens=50))] == [3, 9, 50]


def test_a_prompt_beyond_the_context_length_is_named(model):
    batch = synthetic.prompt_batch([[5], [5] * 257], NEVER)
    batch["document_ids"] = [4, 17]
    with pytest.raises(DataError, match="prompt 17: its 257 tokens do not fit into the 256 that the model reads"):
        generate(model, batch, Generation(max_new_tokens=50))
    assert generate(model, synthetic.prompt_batch([[5] * 256], NEVER), Generation(max_new_tokens=50))[0]


def test_a_filler_batch_gets_no_answer(model):
    filler = prompt_batch([], [], NEVER)
    assert generate(model, filler, Generation(max_new_tokens=50)) == []


def test_prompt_batch_pads_prompts_on_the_left(model):
    expected = synthetic.prompt_batch(PROMPTS, NEVER)
    batch = prompt_batch(PROMPTS, [0, 1, 2], NEVER)
    assert all(torch.equal(batch[name], expected[name]) for name in ("input_ids", "attention_mask"))
    assert (batch["document_ids"], batch["stop_ids"]) == ([0, 1, 2], NEVER)


@pytest.mark.parametrize("training", [True, False])
def test_train_or_eval_mode_is_restored(model, training):
    model.train(training)
    generate(model, synthetic.prompt_batch([[5]], NEVER), Generation(max_new_tokens=2))
    assert {module.training for module in model.modules()} == {training}
    model.eval()


def test_train_or_eval_mode_is_restored_after_an_error(model, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    model.train()
    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        generate(model, synthetic.prompt_batch([[5]], NEVER), Generation(max_new_tokens=2))
    assert model.training
    model.eval()


def test_sampling_draws_and_greedy_does_not(model):
    batch = synthetic.prompt_batch([[5, 6]], NEVER)

    def drawn(seed: int, **options) -> list[int]:
        torch.manual_seed(seed)
        return generate(model, batch, Generation(max_new_tokens=8, **options))[0]

    assert drawn(0) == drawn(1) == greedy(model, [5, 6], 8)
    assert drawn(0, do_sample=True) != drawn(1, do_sample=True)
    assert drawn(0, do_sample=True, temperature=1e-4) == drawn(0)
    assert drawn(0, do_sample=True, top_p=1e-6) == drawn(0)


def test_sampling_follows_our_options_alone(tiny_base):
    """transformers samples from the 50 most likely tokens by default."""
    model = Phi3ForCausalLM.from_pretrained(tiny_base).eval()
    batch = synthetic.prompt_batch([[5]] * 2000, NEVER)
    torch.manual_seed(0)
    first = [answer[0] for answer in generate(model, batch, Generation(max_new_tokens=1, do_sample=True))]
    with torch.no_grad():
        shares = model(torch.tensor([[5]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor(first), minlength=len(shares))
    assert (counts > 0).sum() > 50
    deviations = (counts - 2000 * shares) / (2000 * shares * (1 - shares)).sqrt()
    assert deviations.abs().max() < 5  # binomial counts of 97 tokens: beyond 5 deviations in 1 of 18,000 such draws


def test_stop_tokens_length_and_sampling_of_the_base_are_not_used(tiny_base):
    model = Phi3ForCausalLM.from_pretrained(tiny_base).eval()
    prompts = synthetic.prompt_batch([[5]], NEVER)
    plain = generate(model, prompts, Generation(max_new_tokens=20))
    model.generation_config.eos_token_id = plain[0][1]
    model.generation_config.max_length = 3
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 50.0
    assert generate(model, prompts, Generation(max_new_tokens=20)) == plain
    assert model.generate(torch.tensor([[5]]), attention_mask=torch.ones(1, 1)).shape[1] <= 3  # transformers uses them


def test_a_repetition_penalty_of_the_base_is_not_used(tiny_base):
    model = Phi3ForCausalLM.from_pretrained(tiny_base).eval()
    prompts = synthetic.prompt_batch([[5]], NEVER)
    plain = generate(model, prompts, Generation(max_new_tokens=40))[0]
    assert len(set(plain)) < len(plain)
    model.generation_config.repetition_penalty = 50.0
    assert generate(model, prompts, Generation(max_new_tokens=40))[0] == plain
    options = GenerationConfig(max_new_tokens=40, eos_token_id=NEVER, pad_token_id=0)
    theirs = model.generate(torch.tensor([[5]]), attention_mask=torch.ones(1, 1), generation_config=options)
    assert theirs[0, 1:].tolist() != plain  # transformers merges the base's configuration into the given one


ROWS = [synthetic.document(length, 1, length)[0] for length in (3, 30, 7, 16, 5, 22, 11, 4, 9)]


def in_batches(model, size: int) -> list[list[int]]:
    parts = [ROWS[start : start + size] for start in range(0, len(ROWS), size)]
    config = Generation(max_new_tokens=24)
    return [answer for part in parts for answer in generate(model, synthetic.prompt_batch(part, [END]), config)]


@pytest.mark.parametrize("size", [1, 2, 8])
def test_float32_answers_are_equal_for_every_batch_size(model, size):
    assert in_batches(model, size) == in_batches(model, len(ROWS))


def test_bfloat16_answers_differ_only_at_near_ties(tiny_base):
    """Another shape rounds its products differently: the argmax may change at a near tie."""
    model = Phi3ForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).eval()
    assert in_batches(model, 4) == in_batches(model, 4)
    exact = Phi3ForCausalLM.from_pretrained(tiny_base).eval()
    parted = 0
    for size in (1, 2, 4):
        for prompt, one, other in zip(ROWS, in_batches(model, size), in_batches(model, 9), strict=True):
            at = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
            if at is None:
                assert one == other
                continue
            parted += 1
            with torch.no_grad():
                logits = exact(torch.tensor([prompt + one[:at]])).logits[0, -1]
            # each logit of a layer's dozen roundings of relative size eps / 2, and those of its head
            rounding = 12 * torch.finfo(torch.bfloat16).eps / 2 * logits.abs().max()
            assert logits[[one[at], other[at]]].diff().abs() <= 2 * rounding
            assert logits.max() - logits[one[at]] <= 2 * rounding
    print(f"{parted} of {3 * len(ROWS)} answers part")
