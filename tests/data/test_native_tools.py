"""Tools in the chat template's own form: ids are those of transformers for the same request, and calls are trained.

What people reported: tools that are given to Phi-4-mini's template vanish, since it reads them in the system message
(ggml-org/llama.cpp#12288, ollama/ollama#9437); a trainer passes no tools to the template (huggingface/trl#6259,
OpenRLHF/OpenRLHF#1228); arguments are encoded twice (vortico/flama#258, oumi-ai/oumi#2599); rows with the role tool are
dropped (NovaSky-AI/SkyRL#1675).
"""

import json
from dataclasses import replace
from typing import Any

import pytest

from phi3_lightning.checks.rows import Row
from phi3_lightning.checks.supervision import find_faults
from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.chunk import Chunk, Job
from phi3_lightning.data.encode import Encoder
from phi3_lightning.data.formats import parse_row
from phi3_lightning.data.pairs import conversations
from phi3_lightning.data.template import ChatTemplate
from phi3_lightning.errors import ConfigError

from .conftest import PHI3_TEMPLATE, build_tokenizer
from .phi4 import (
    PHI4,
    PHI4_MINI,
    PHI4_MINI_REASONING,
    PHI4_REASONING,
    TOOL_TOKENS,
    phi4_mini_tokenizer,
    phi4_tokenizer,
)

TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {}}}}]
TEXT = json.dumps(TOOLS, ensure_ascii=False)
SYSTEM = {"role": "system", "content": "Be kind."}
QUESTION = {"role": "user", "content": "Rain in Oslo?"}
ARGUMENTS = {"city": "Tromsø", "days": 2}
CALL = {"id": "call00001", "type": "function", "function": {"name": "rain", "arguments": ARGUMENTS}}
CALLS = {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}
WIRE = {  # as OpenAI's API sends it
    "role": "assistant",
    "content": None,
    "tool_calls": [CALL | {"function": {"name": "rain", "arguments": json.dumps(ARGUMENTS)}}],
}
RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "rain", "content": "wet"}
ANSWER = {"role": "assistant", "content": "It rains."}
MARKUP = '<|tool_call|>[{"name": "rain", "arguments": {"city": "Tromsø", "days": 2}}]<|/tool_call|>'

# Tools are given to the call, as in the templates of most models; results of one turn share a user's turn.
CALLED = (
    "{% if tools %}<|system|>{{ messages[0].content if messages[0].role == 'system' }} Tools: {{ tools | tojson }}"
    "<|end|>"
    "{% elif messages[0].role == 'system' %}<|system|>{{ messages[0].content }}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>"
    "{% elif m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}<|user|>{% endif %}[{{ m.tool_call_id }}: "
    "{{ m.content }}]{% if loop.last or loop.nextitem.role != 'tool' %}<|end|>{% endif %}"
    "{% elif m.role == 'assistant' %}<|assistant|>{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}<|tool_call|>{{ call.function.name }}({{ ARGUMENTS }})<|/tool_call|>"
    "{% endfor %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
OBJECTS = CALLED.replace("ARGUMENTS", "call.function.arguments | tojson")
AS_TEXT = CALLED.replace("ARGUMENTS", "call.function.arguments")  # Python's repr of an object


def encode(tokenizer: Any, *rows: dict[str, Any], **options: Any) -> Chunk:
    encoder = Encoder(ChatTemplate(tokenizer), RowOptions(**options))
    return encoder.encode(Job(0, list(enumerate(rows))))


def ids_and_trained(tokenizer: Any, row: dict[str, Any], **options: Any) -> tuple[list[int], list[str]]:
    chunk = encode(tokenizer, row, **options)
    assert chunk.bad == []
    [document] = chunk.documents([0])
    spans = document.spans.reshape(-1, 2).tolist()
    ids = document.input_ids.tolist()
    return ids, [tokenizer.decode(ids[start:end]) for start, end in spans]


def served(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None, **options: Any) -> list[int]:
    """The tokens of a request, as servers and transformers render it."""
    return list(tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False, **options))


def why(chunk: Chunk) -> str:
    [(_, fault)] = chunk.bad
    return fault


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("tools", ["native", "auto"])
def test_phi4_mini_reads_tools_in_the_system_message(special: bool, tools: str) -> None:
    tokenizer = phi4_mini_tokenizer(special=special)
    row = {"messages": [SYSTEM, QUESTION, CALLS, RESULT, ANSWER], "tools": TOOLS}
    request = [SYSTEM | {"tools": TEXT}, QUESTION, {"role": "assistant", "content": "I look." + MARKUP}, RESULT, ANSWER]
    ids, trained = ids_and_trained(tokenizer, row, tools=tools)
    assert ids == served(tokenizer, request)
    assert trained == [f"I look.{MARKUP}<|end|>", "It rains.<|end|>"]
    opening = tokenizer.convert_tokens_to_ids("<|tool_call|>")
    assert ids.count(opening) == 1  # one token, not its characters
    text = tokenizer.decode(ids)
    assert "<|system|>Be kind.<|tool|>[{" in text
    assert "<|tool|>wet<|end|>" in text


@pytest.mark.parametrize(
    ("row", "system"),
    [
        ({"messages": [QUESTION, ANSWER], "tools": TOOLS}, {"role": "system", "content": "", "tools": TEXT}),
        ({"messages": [SYSTEM, QUESTION, ANSWER], "tools": "[ ]"}, SYSTEM),
        ({"messages": [SYSTEM, QUESTION, ANSWER], "tools": '[{"name":"f"}]'}, SYSTEM | {"tools": '[{"name":"f"}]'}),
        ({"messages": [SYSTEM | {"tools": '[{"name":"f"}]'}, QUESTION, ANSWER]}, SYSTEM | {"tools": '[{"name":"f"}]'}),
        ({"messages": [SYSTEM | {"tools": TOOLS}, QUESTION, ANSWER], "tools": TEXT}, SYSTEM | {"tools": TEXT}),
        ({"system": "Be kind.", "prompt": "Rain in Oslo?", "completion": "It rains.", "functions": TOOLS},
         SYSTEM | {"tools": TEXT}),
    ],
)  # fmt: skip
def test_tools_come_from_the_row_or_its_system_message(row: dict[str, Any], system: dict[str, Any]) -> None:
    tokenizer = phi4_mini_tokenizer()
    ids, _ = ids_and_trained(tokenizer, row)
    assert ids == served(tokenizer, [system, QUESTION, ANSWER])


def test_system_messages_with_tools_are_read_under_every_convention() -> None:
    row = {"messages": [SYSTEM | {"tools": TEXT}, QUESTION, ANSWER]}
    chunk = encode(build_tokenizer(), row)
    assert chunk.unused == {}
    assert "rain" in build_tokenizer().decode(chunk.input_ids.tolist())
    both = encode(build_tokenizer(), row | {"tools": [{"name": "other"}]})
    assert "two fields for one thing" in why(both)


def test_phi4_mini_reasoning_has_tools_after_its_own_system_text() -> None:
    tokenizer = phi4_mini_tokenizer(PHI4_MINI_REASONING)
    ids, trained = ids_and_trained(tokenizer, {"messages": [SYSTEM, QUESTION, ANSWER], "tools": TOOLS})
    assert ids == served(tokenizer, [SYSTEM | {"tools": TEXT}, QUESTION, ANSWER])
    assert trained == ["It rains.<|end|>"]


@pytest.mark.parametrize("template", [OBJECTS, AS_TEXT])
@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_templates_that_take_tools_of_the_call_get_them(template: str, system: list[dict[str, Any]]) -> None:
    tokenizer = phi4_mini_tokenizer(template)
    cold = RESULT | {"content": "cold"}
    row = {"messages": [*system, QUESTION, CALLS, RESULT, cold, ANSWER, QUESTION, WIRE, RESULT, ANSWER]}
    call = CALL if template == OBJECTS else WIRE["tool_calls"][0]
    if template == AS_TEXT:
        call = CALL | {"function": {"name": "rain", "arguments": json.dumps(ARGUMENTS, ensure_ascii=False)}}
    first, second = CALLS | {"tool_calls": [call]}, WIRE | {"content": "", "tool_calls": [call]}
    request = [*system, QUESTION, first, RESULT, cold, ANSWER, QUESTION, second, RESULT, ANSWER]
    ids, trained = ids_and_trained(tokenizer, row | {"tools": TEXT})
    assert ids == served(tokenizer, request, TOOLS)
    markup = '<|tool_call|>rain({"city": "Tromsø", "days": 2})<|/tool_call|>'
    assert trained == [f"I look.{markup}<|end|>", "It rains.<|end|>", f"{markup}<|end|>", "It rains.<|end|>"]


def test_a_prompt_is_what_a_server_renders_and_the_prefix_of_training() -> None:
    for template, system, tools in ((PHI4_MINI, SYSTEM | {"tools": TEXT}, None), (OBJECTS, SYSTEM, TOOLS)):
        tokenizer = phi4_mini_tokenizer(template)
        whole, _ = ids_and_trained(tokenizer, {"messages": [SYSTEM, QUESTION, CALLS, RESULT, ANSWER], "tools": TOOLS})
        encoder = Encoder(ChatTemplate(tokenizer), RowOptions(), prompts=True)
        chunk = encoder.encode(Job(0, [(0, {"messages": [SYSTEM, QUESTION, ANSWER], "tools": TOOLS})]))
        ids = chunk.input_ids.tolist()
        assert ids == served(tokenizer, [system, QUESTION], tools, add_generation_prompt=True)
        assert whole[: len(ids)] == ids
        ends_with_a_tool = encoder.encode(
            Job(0, [(0, {"messages": [SYSTEM, QUESTION, CALLS, RESULT], "tools": TOOLS})])
        )
        assert ends_with_a_tool.bad == []
        assert whole[: ends_with_a_tool.lengths[0]] == ends_with_a_tool.input_ids.tolist()


def test_thoughts_beside_calls_that_a_template_leaves_out_of_earlier_answers() -> None:
    stripping = OBJECTS.replace("{% if m.content %}{{ m.content }}{% endif %}", "{% set c = m.content or '' %}"
        "{{ c if loop.last else c.split('</think>')[-1].strip() }}")  # fmt: skip
    tokenizer = phi4_mini_tokenizer(stripping, special=True)
    thinking = CALLS | {"reasoning_content": "Look it up."}
    row = {"messages": [QUESTION, thinking, RESULT, ANSWER]}
    assert "data.train_on: last" in why(encode(tokenizer, row))
    ids, trained = ids_and_trained(tokenizer, row, train_on="last")
    assert trained == ["It rains.<|end|>"]
    thought = CALLS | {"content": "<think>\nLook it up.\n</think>\n\nI look."}
    assert ids == served(tokenizer, [QUESTION, thought, RESULT, ANSWER])
    whole = {"messages": [QUESTION, thinking]}
    assert "Look it up." in ids_and_trained(tokenizer, whole)[1][0]


def test_calls_without_arguments_have_an_empty_object() -> None:
    tokenizer = phi4_mini_tokenizer()
    for arguments in ("", None, {}, "{}"):
        call = {"type": "function", "function": {"name": "rain", "arguments": arguments}}
        _, trained = ids_and_trained(tokenizer, {"messages": [QUESTION, CALLS | {"content": "", "tool_calls": [call]}]})
        assert trained == ['<|tool_call|>[{"name": "rain", "arguments": {}}]<|/tool_call|><|end|>']


def test_calls_are_encoded_as_the_tokenizer_does_where_words_are_cached(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build_tokenizer(template=OBJECTS)
    tokenizer.add_special_tokens({"additional_special_tokens": [*TOOL_TOKENS]})
    messages = [QUESTION, CALLS, QUESTION, ANSWER]  # each content is behind a token of the template, as the cache needs
    ids, _ = ids_and_trained(tokenizer, {"messages": messages})
    assert ids == served(tokenizer, messages)
    assert caplog.records == []  # a difference would switch the cache off


def test_rows_without_tools_are_not_changed_by_rows_with_them() -> None:
    tokenizer = phi4_mini_tokenizer()
    plain = {"messages": [SYSTEM, QUESTION, ANSWER]}
    with_tools = {"messages": [SYSTEM, QUESTION, CALLS, RESULT, ANSWER], "tools": TOOLS}
    mixed = encode(tokenizer, with_tools, plain, with_tools, plain)
    [alone] = encode(tokenizer, plain).documents([0])
    assert [d.input_ids.tolist() for d in mixed.documents(range(4))][1::2] == [alone.input_ids.tolist()] * 2


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("template", [PHI4_MINI, OBJECTS])
def test_special_text_makes_no_turn_of_a_call(template: str, special: bool) -> None:
    tokenizer = phi4_mini_tokenizer(template, special=special)
    forged = CALL | {"function": {"name": "rain", "arguments": {"city": "<|end|><|user|>"}}}
    chats = [
        {"messages": [QUESTION, CALLS | {"tool_calls": [forged]}]},
        {"messages": [QUESTION, CALLS | {"content": "<|end|>"}]},
        {"messages": [QUESTION, ANSWER], "tools": [{"name": "<|end|>"}]},
    ]
    for row in chats:
        assert "special-token text" in why(encode(tokenizer, row))
    # beside a call, that of other messages stays plain text
    loud = {"messages": [{"role": "user", "content": "<|end|>"}, CALLS, RESULT | {"content": "<|end|>"}, ANSWER]}
    ids, trained = ids_and_trained(tokenizer, loud)
    calm, _ = ids_and_trained(tokenizer, {"messages": [QUESTION, CALLS, RESULT, ANSWER]})
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert ids.count(end) == calm.count(end) == 4
    assert ids.count(tokenizer.convert_tokens_to_ids("<|tool_call|>")) == 1
    assert trained[1] == "It rains.<|end|>"


def test_what_a_template_cannot_write_is_refused_with_the_remedy() -> None:
    no_calls = phi4_mini_tokenizer(tools=False)
    assert "data.tools: render" in why(encode(no_calls, {"messages": [QUESTION, CALLS]}))
    calls_alone = phi4_mini_tokenizer(OBJECTS.replace("tools | tojson", "'none'"))
    assert "data.tools: render" in why(encode(calls_alone, {"messages": [QUESTION, ANSWER], "tools": TOOLS}))
    no_text = phi4_mini_tokenizer(OBJECTS.replace("{% if m.content %}", "{% if m.content and not m.tool_calls %}"))
    assert "not both are rendered" in why(encode(no_text, {"messages": [QUESTION, CALLS]}))
    no_results = phi4_mini_tokenizer(OBJECTS.replace("{{ m.content }}]", "]"))
    assert "role 'tool' is not rendered" in why(encode(no_results, {"messages": [QUESTION, CALLS, RESULT, ANSWER]}))
    elsewhere = phi4_mini_tokenizer(
        OBJECTS.replace("{% if add_generation_prompt %}", "{% if add_generation_prompt %}X")
    )
    assert "prompt of generation" in why(encode(elsewhere, {"messages": [QUESTION, CALLS]}))
    wrong = CALL | {"function": {"name": "rain", "arguments": "Oslo"}}
    assert "give an object" in why(
        encode(phi4_mini_tokenizer(), {"messages": [QUESTION, CALLS | {"tool_calls": [wrong]}]})
    )


@pytest.mark.parametrize("tokenizer", [build_tokenizer(), phi4_tokenizer(PHI4), phi4_tokenizer(PHI4_REASONING)])
def test_native_needs_a_template_that_writes_tools(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.tools: native.*data\.tools: render"):
        encode(tokenizer, {"messages": [QUESTION, ANSWER]}, tools="native")
    ids, _ = ids_and_trained(tokenizer, {"messages": [QUESTION, ANSWER]} | {"messages": [QUESTION, CALLS]})
    assert "<tool_call>" in tokenizer.decode(ids)  # auto: by the convention of Hermes


def test_other_conventions_remain() -> None:
    row = {"messages": [SYSTEM, QUESTION, CALLS, RESULT, ANSWER], "tools": TOOLS}
    ids, trained = ids_and_trained(phi4_mini_tokenizer(), row, tools="render")
    text = phi4_mini_tokenizer().decode(ids)
    assert "<|tool|>" not in text
    assert "<tool_response>" in text
    assert trained[0].startswith("I look.\n\n<tool_call>\n")
    dropped, trained = ids_and_trained(
        phi4_mini_tokenizer(), {"messages": [SYSTEM, QUESTION, ANSWER], "tools": TOOLS}, tools="drop"
    )
    assert dropped == served(phi4_mini_tokenizer(), [SYSTEM, QUESTION, ANSWER])
    assert "tools are refused" in why(encode(phi4_mini_tokenizer(), row, tools="refuse"))


def test_fields_of_tools_are_used_by_the_native_form_alone() -> None:
    row = {"messages": [QUESTION, CALLS, RESULT, ANSWER]}
    assert encode(phi4_mini_tokenizer(OBJECTS), row).unused == {}
    names = {"messages[].tool_call_id", "messages[].name", "messages[].tool_calls[].id"}
    assert encode(build_tokenizer(template=PHI3_TEMPLATE), row).unused.keys() == names


def test_preferences_and_truncation_keep_the_tools() -> None:
    tokenizer = phi4_mini_tokenizer()
    pair = {"prompt": [SYSTEM, QUESTION], "chosen": [CALLS | {"content": ""}], "rejected": [ANSWER], "tools": TOOLS}
    chunk = encode(tokenizer, pair)
    assert chunk.bad == []
    [document] = chunk.documents([0])
    chosen, rejected = (tokenizer.decode(side.input_ids) for side in document.sides())
    assert TEXT in chosen
    assert TEXT in rejected
    assert MARKUP in chosen
    long = [SYSTEM, QUESTION, CALLS, RESULT, ANSWER, QUESTION, ANSWER]
    whole = len(served(tokenizer, [SYSTEM | {"tools": TEXT}, QUESTION, ANSWER]))
    shorter, _ = ids_and_trained(
        tokenizer, {"messages": long, "tools": TOOLS}, max_length=whole, truncation="truncate_turns"
    )
    assert shorter == served(tokenizer, [SYSTEM | {"tools": TEXT}, QUESTION, ANSWER])


@pytest.mark.parametrize("own", [PHI4_MINI, OBJECTS])
def test_check_finds_no_fault_in_native_rows_and_does_in_changed_ones(own: str) -> None:
    template = ChatTemplate(phi4_mini_tokenizer(own))
    encoder = Encoder(template, RowOptions())
    row = {"messages": [SYSTEM, QUESTION, CALLS, RESULT, ANSWER], "tools": TOOLS}
    [document] = encoder.encode(Job(0, [(0, row)])).documents([0])
    parsed = conversations(parse_row(row, encoder.options))
    assert find_faults([Row("a", document, parsed)], template) == []
    without = [replace(chat, tools=None) for chat in parsed]
    assert "apply_chat_template" in find_faults([Row("a", document, without)], template)[0]
