"""From prompts to answers, against a plain greedy loop."""

import pytest
import torch
from transformers import Phi3ForCausalLM

import synthetic
from phi3_lightning.config import Generation
from phi3_lightning.generate import answers

END, END_OF_TEXT = 7, 2
NEVER = [synthetic.VOCABULARY + 5]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14]]


class Script(Phi3ForCausalLM):
    """Answers every prompt with given tokens, whatever it was asked."""

    def say(self, *tokens: int) -> "Script":
        self.tokens = list(tokens)
        return self

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = torch.zeros_like(output.logits)
        output.logits[..., self.tokens.pop(0)] = 1.0
        return output


@pytest.fixture(scope="module")
def model(tiny_base) -> Phi3ForCausalLM:
    return Phi3ForCausalLM.from_pretrained(tiny_base).eval()


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


@pytest.mark.parametrize("sliding_window", [None, 4])
def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone(tmp_path, sliding_window):
    base = synthetic.save_tiny(tmp_path / "base", sliding_window=sliding_window)
    model = Phi3ForCausalLM.from_pretrained(base).eval()
    together = answers(model, synthetic.prompt_batch(PROMPTS, NEVER), Generation(max_new_tokens=12))
    alone = [
        answers(model, synthetic.prompt_batch([prompt], NEVER), Generation(max_new_tokens=12))[0] for prompt in PROMPTS
    ]
    assert together == alone == [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in together}) > 1


def test_right_padding_would_give_other_answers(model):
    batch = synthetic.prompt_batch(PROMPTS, NEVER)
    left = answers(model, batch, Generation(max_new_tokens=12))
    for name in ("input_ids", "attention_mask"):
        batch[name] = batch[name].flip(1)
    batch["input_ids"][:, :] = torch.tensor([prompt + [0] * (7 - len(prompt)) for prompt in PROMPTS])
    right = answers(model, batch, Generation(max_new_tokens=12))
    assert right[0] == left[0]
    assert right[1:] != left[1:]


@pytest.mark.parametrize("stop", [END, END_OF_TEXT])
def test_both_stop_tokens_end_an_answer(script, stop):
    script.say(20, 21, stop, 22, 23)
    batch = synthetic.prompt_batch([[5, 6]], [END, END_OF_TEXT])
    assert answers(script, batch, Generation(max_new_tokens=5)) == [[20, 21, stop]]
    assert script.tokens == [22, 23]  # which were never asked for


def test_what_follows_a_stop_is_not_returned_where_the_batch_runs_on(model):
    free = [greedy(model, prompt, 10) for prompt in PROMPTS]
    stop = free[0][3]
    expected = [greedy(model, prompt, 10, [stop]) for prompt in PROMPTS]
    assert len({len(answer) for answer in expected}) > 1  # one goes on where another has ended
    assert answers(model, synthetic.prompt_batch(PROMPTS, [stop]), Generation(max_new_tokens=10)) == expected


def test_an_answer_that_is_cut_has_no_stop_token(script):
    script.say(20, 21, 22, END)
    batch = synthetic.prompt_batch([[5]], [END, END_OF_TEXT])
    assert answers(script, batch, Generation(max_new_tokens=3)) == [[20, 21, 22]]


def test_an_answer_ends_with_the_window(model):
    window = model.config.max_position_embeddings
    batch = synthetic.prompt_batch([[5] * (window - 3)], NEVER)
    assert len(answers(model, batch, Generation(max_new_tokens=50))[0]) == 3


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_as_it_was(model, training):
    model.train(training)
    answers(model, synthetic.prompt_batch([[5]], NEVER), Generation(max_new_tokens=2))
    assert {module.training for module in model.modules()} == {training}
    model.eval()


def test_the_mode_is_as_it_was_after_an_error(model, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    model.train()
    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(KeyboardInterrupt):
        answers(model, synthetic.prompt_batch([[5]], NEVER), Generation(max_new_tokens=2))
    assert model.training
    model.eval()


def test_sampling_draws_and_greedy_does_not(model):
    batch = synthetic.prompt_batch([[5, 6]], NEVER)

    def drawn(seed: int, **options) -> list[int]:
        torch.manual_seed(seed)
        return answers(model, batch, Generation(max_new_tokens=8, **options))[0]

    assert drawn(0) == drawn(1) == greedy(model, [5, 6], 8)
    assert drawn(0, do_sample=True) != drawn(1, do_sample=True)
    assert drawn(0, do_sample=True, temperature=1e-4) == drawn(0)
    assert drawn(0, do_sample=True, top_p=1e-6) == drawn(0)


def test_stop_tokens_length_and_sampling_of_the_base_are_not_used(tiny_base):
    model = Phi3ForCausalLM.from_pretrained(tiny_base).eval()
    prompts = synthetic.prompt_batch([[5]], NEVER)
    plain = answers(model, prompts, Generation(max_new_tokens=20))
    model.generation_config.eos_token_id = plain[0][1]
    model.generation_config.max_length = 3
    model.generation_config.do_sample = True
    assert answers(model, prompts, Generation(max_new_tokens=20)) == plain
    assert model.generate(torch.tensor([[5]]), attention_mask=torch.ones(1, 1)).shape[1] <= 3  # where they are used
