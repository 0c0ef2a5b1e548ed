"""For any text: ids are the template's, the assistant's words are trained, and every fault is named."""

import contextlib
import json
import random
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.chunk import Job
from phi3_lightning.data.conversation import BadRowError, Conversation, TokenizedDocument
from phi3_lightning.data.encode import Encoder
from phi3_lightning.data.formats import parse_row
from phi3_lightning.data.template import ChatTemplate, load_tokenizer

from .conftest import build_tokenizer

END = "<|end|>"
SPECIALS = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>", "<s>"]
EDGES = st.sampled_from(["", " ", "\n", "\t ", "\r\n", "\u00a0", "\u2028", "  \n\n"])
PIECES = st.sampled_from(
    ["the answer", "שלום", "😀", "👩‍👩‍👧", "e\u0301", "\x00", "\ufdd0", "</s>", "<|", "|>", "{{ x }}", "ab"]
)
WORDS = st.one_of(PIECES, st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
CONTENT = st.tuples(EDGES, st.lists(WORDS, max_size=4).map(" ".join), EDGES).map("".join)
LOUD = st.tuples(CONTENT, st.sampled_from(SPECIALS), CONTENT).map("".join)


@st.composite
def chats(draw: st.DrawFn, content: st.SearchStrategy[str]) -> dict[str, Any]:
    turns = draw(st.lists(st.tuples(content, content), min_size=1, max_size=4))
    if draw(st.booleans()):
        turns += turns  # later turns echo earlier ones
    messages = [{"role": "system", "content": draw(content)}] if draw(st.booleans()) else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


TEMPLATE = ChatTemplate(build_tokenizer())
SETTINGS = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def encode(row: dict[str, Any], template: ChatTemplate) -> tuple[Conversation, TokenizedDocument]:
    talk = parse_row(row, RowOptions())
    assert isinstance(talk, Conversation)
    [encoded] = template.encode([talk])
    assert isinstance(encoded, TokenizedDocument), encoded
    return talk, encoded


def check(row: dict[str, Any], template: ChatTemplate) -> None:
    talk, encoded = encode(row, template)
    tokenizer = template.tokenizer
    assert encoded.input_ids == tokenizer.apply_chat_template(talk.messages, return_dict=False)
    answers = [message["content"] for message in talk.messages if message["role"] == "assistant"]
    answers = [answer.replace("\u2581", " ") for answer in answers]  # as decoding gives it
    spoken = [tokenizer.decode(encoded.input_ids[start:end]) for start, end in encoded.spans]
    # A role token swallows leading white space, and decoding drops one more leading space of a text.
    assert [text.lstrip() for text in spoken] == [(answer.lstrip() + END).lstrip() for answer in answers]


@SETTINGS
@given(chats(CONTENT.filter(lambda text: not any(special in text for special in SPECIALS))))
def test_ids_are_the_templates_and_the_mask_the_assistants(row: dict[str, Any]) -> None:
    check(row, TEMPLATE)


@SETTINGS
@given(chats(LOUD))
def test_special_text_never_becomes_a_turn(row: dict[str, Any]) -> None:
    talk, encoded = encode(row, TEMPLATE)
    tokenizer = TEMPLATE.tokenizer
    quiet = {"messages": [message | {"content": "x"} for message in talk.messages]}
    _, honest = encode(quiet, TEMPLATE)
    specials = set(tokenizer.added_tokens_decoder)
    assert [i for i in encoded.input_ids if i in specials] == [i for i in honest.input_ids if i in specials]
    for start, end in encoded.spans:
        assert [i for i in encoded.input_ids[start:end] if i in specials] == [tokenizer.convert_tokens_to_ids(END)]


FIELDS = (
    "messages role content prompt completion conversations from value text type tools tool_calls instruction output"
)
KEYS = st.sampled_from([*FIELDS.split(), "history", "input_ids", "labels", "weight", "train", "function_call"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner),
)


@settings(SETTINGS, max_examples=300)
@given(JSON)
def test_any_json_is_read_or_named(row: Any) -> None:
    with contextlib.suppress(BadRowError):
        parse_row(row, RowOptions())


def test_ten_thousand_mutated_rows_are_trained_or_named() -> None:
    """Types are changed, keys dropped, bytes flipped, JSON truncated; good neighbours keep their tokens."""
    rng = random.Random(0)
    good = json.dumps(
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "a question 😀"},
                {"role": "assistant", "content": [{"type": "text", "text": "the answer"}]},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
                {"role": "tool", "content": "r"},
                {"role": "assistant", "content": "end", "weight": 1},
            ]
        }
    ).encode()
    rows = [(number, mutate(good, rng) if number % 2 else good) for number in range(20_000)]
    encoder = Encoder(TEMPLATE, RowOptions())
    expected = encoder.encode(Job(0, [(0, good)])).input_ids.tolist()
    named = trained = 0
    for start in range(0, len(rows), 1000):
        chunk = encoder.encode(Job(0, rows[start : start + 1000]))
        ends = chunk.lengths.cumsum()
        for number, first, end in zip(chunk.rows.tolist(), (ends - chunk.lengths).tolist(), ends.tolist(), strict=True):
            trained += number % 2
            if number % 2 == 0:
                assert chunk.input_ids[first:end].tolist() == expected
        assert sum(number % 2 == 0 for number in chunk.rows.tolist()) == 500
        named += sum(chunk.dropped.values())
    assert named + trained == 10_000
    assert named > 5_000
    assert trained > 100


def mutate(line: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return line[: rng.randrange(1, len(line))]
    if kind == 1:
        place = rng.randrange(len(line))
        return line[:place] + bytes([rng.randrange(256)]) + line[place + 1 :]
    row = json.loads(line)
    target = rng.choice([row, *row["messages"], row["messages"][2]["content"][0], row["messages"][4]["tool_calls"][0]])
    key = rng.choice(list(target))
    if kind == 2:
        del target[key]
    else:
        target[key] = rng.choice([None, 5, True, 1.5, "", "\ud800", [], {}, [None], {"role": "user"}, "x" * 999])
    return json.dumps(row).encode()


def test_ids_and_mask_of_the_real_tokenizer(shared: Path) -> None:
    real = ChatTemplate(load_tokenizer(str(shared / "phi3-mini-4k-instruct")))

    @SETTINGS
    @given(chats(CONTENT.filter(lambda text: not any(special in text for special in [*SPECIALS, "</s>"]))))
    def holds(row: dict[str, Any]) -> None:
        check(row, real)

    holds()
