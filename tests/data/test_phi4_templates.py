"""The templates of the Phi-4 family: fixed system texts, ``<|im_sep|>``, thoughts, and tokens that end an answer.

What people reported: eos and pad of microsoft/phi-4, whose answers never end after training (hiyouga/LlamaFactory#7413,
unslothai/unsloth#1523); a system message that Phi-4-reasoning's template leaves out; thoughts that a trainer strips or
a server does not expect (zai-org/GLM-V#125).
"""

from typing import Any

import pytest

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.conversation import BadRowError, Conversation, TokenizedDocument
from phi3_lightning.data.formats import parse_row
from phi3_lightning.data.template import ChatTemplate

from .phi4 import (
    PHI4,
    PHI4_FIRST,
    PHI4_MINI,
    PHI4_MINI_REASONING,
    PHI4_REASONING,
    phi4_mini_tokenizer,
    phi4_tokenizer,
)

QUESTION = {"role": "user", "content": "What is 2 + 2?"}
THOUGHT = {"role": "assistant", "content": "4.", "reasoning_content": "Two and two."}
SAID = "<think>\nTwo and two.\n</think>\n\n4."
TEMPLATES = {
    "phi-4": phi4_tokenizer(PHI4),
    "phi-4 as first published": phi4_tokenizer(PHI4_FIRST),
    "Phi-4-reasoning": phi4_tokenizer(PHI4_REASONING),
    "Phi-4-mini-instruct": phi4_mini_tokenizer(PHI4_MINI),
    "Phi-4-mini-reasoning": phi4_mini_tokenizer(PHI4_MINI_REASONING),
}


def parse(*messages: dict[str, Any], **options: Any) -> Conversation:
    parsed = parse_row({"messages": list(messages)}, RowOptions(**options))
    assert isinstance(parsed, Conversation)
    return parsed


@pytest.mark.parametrize("name", TEMPLATES)
def test_thoughts_are_trained_and_stay_in_earlier_answers(name: str) -> None:
    tokenizer = TEMPLATES[name]
    template = ChatTemplate(tokenizer)
    [encoded] = template.encode([parse(QUESTION, THOUGHT, QUESTION, THOUGHT)])
    assert isinstance(encoded, TokenizedDocument)
    answer = {"role": "assistant", "content": SAID}
    request = [QUESTION, answer, QUESTION, answer]
    assert encoded.input_ids == tokenizer.apply_chat_template(request, tokenize=True, return_dict=False)
    end = tokenizer.convert_ids_to_tokens(template.stop_ids[0])
    assert end == ("<|end|>" if "mini" in name else "<|im_end|>")
    spans = [tokenizer.decode(encoded.input_ids[start:stop]) for start, stop in encoded.spans]
    assert spans == [SAID + end] * 2
    prompt = tokenizer.apply_chat_template([QUESTION], tokenize=True, return_dict=False, add_generation_prompt=True)
    assert encoded.input_ids[: encoded.spans[0][0]] == prompt


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_token_that_ends_an_answer_stops_it(name: str) -> None:
    tokenizer = TEMPLATES[name]
    ends = ["<|end|>" if "mini" in name else "<|im_end|>", "<|endoftext|>"]
    assert ChatTemplate(tokenizer).stop_ids == tokenizer.convert_tokens_to_ids(ends)


def test_a_fixed_system_text_leaves_out_the_rows_own_which_merging_keeps() -> None:
    template = ChatTemplate(TEMPLATES["Phi-4-reasoning"])
    system = {"role": "system", "content": "Be brief."}
    [lost] = template.encode([parse(system, QUESTION, THOUGHT)])
    assert isinstance(lost, BadRowError)
    assert "role 'system' is not rendered" in str(lost)
    assert "data.system: merge_into_user" in str(lost)
    [merged] = template.encode([parse(system, QUESTION, THOUGHT, system="merge_into_user")])
    assert isinstance(merged, TokenizedDocument)
    text = template.tokenizer.decode(merged.input_ids)
    assert "<|im_start|>user<|im_sep|>Be brief.\n\nWhat is 2 + 2?<|im_end|>" in text
    assert text.count("<|im_start|>system<|im_sep|>You are Phi") == 1


def test_system_messages_follow_the_fixed_text_of_phi4_mini_reasoning() -> None:
    template = ChatTemplate(TEMPLATES["Phi-4-mini-reasoning"])
    [encoded] = template.encode([parse({"role": "system", "content": "Be brief."}, QUESTION, THOUGHT)])
    assert isinstance(encoded, TokenizedDocument)
    start = "<|system|>Your name is Phi, an AI math expert developed by Microsoft. Be brief.<|end|><|user|>What"
    assert template.tokenizer.decode(encoded.input_ids).startswith(start)
