"""Encoding by cached words against the tokenizer's own encoding of whole texts."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.chunk import Job
from phi3_lightning.data.encode import Encoder, encode_all
from phi3_lightning.data.sentinels import Rendered
from phi3_lightning.data.template import ChatTemplate, load_tokenizer
from phi3_lightning.data.word_cache import WordCache, words_are_independent

from .conftest import build_tokenizer, chat

TOKENIZER = build_tokenizer()
WORDS = WordCache(TOKENIZER)
PARTS = st.sampled_from(
    [" ", "  ", "\n", "\t", "\u2581", "\u3000", "\x1c", "\x85", "the", "answer", "ing", "日本", "😀", "\x00"]
)
ADDED = st.sampled_from(["<s>", "<|end|>", "<|user|>", "</s>", "<|", "|>"])
TEXTS = st.lists(st.one_of(PARTS, ADDED, st.text(st.characters(exclude_categories=["Cs"]), max_size=5)), max_size=20)


def whole(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


@given(TEXTS.map("".join))
def test_word_by_word_encoding_equals_that_of_the_whole_text(text):
    assert WORDS.encode(Rendered(text, [])).ids == whole(TOKENIZER, text)


def test_word_by_word_encoding_equals_that_of_real_texts(shared, real_vectors, real_chats):
    tokenizer = load_tokenizer(str(shared / "phi3-mini-4k-instruct"))
    assert words_are_independent(tokenizer.backend_tokenizer.to_str())
    words = WordCache(tokenizer)
    texts = [case["text"] for case in real_vectors]
    texts += [line for file in sorted(real_chats.glob("*.jsonl")) for line in file.read_text().splitlines()[:200]]
    for text in texts:
        assert words.encode(Rendered(text, [])).ids == whole(tokenizer, text)


def test_a_cached_word_encodes_the_same_also_after_pickling():
    text = "the answer is a question"
    expected = whole(TOKENIZER, text)
    again = pickle.loads(pickle.dumps(WORDS))  # as for a spawned process
    assert [words.encode(Rendered(text, [])).ids for words in (WORDS, WORDS, again, again)] == [expected] * 4


def test_content_joined_to_template_text_is_left_to_the_tokenizer():
    assert WORDS.encode(Rendered("<|user|>\n  x<|end|>", [(11, 12)])) is not None
    assert WORDS.encode(Rendered("Question: x<|end|>", [(10, 11)])) is None


def test_special_text_in_a_content_is_encoded_as_plain_text():
    text = "<|user|>\nsay <|end|> now<|end|>"
    plain = WORDS.encode(Rendered(text, [(9, 22)]))
    end = TOKENIZER.convert_tokens_to_ids("<|end|>")
    assert [plain.ids.count(end), whole(TOKENIZER, text).count(end)] == [1, 2]
    assert TOKENIZER.decode(plain.ids[1:-1]) == "say <|end|> now"


def changed(**changes) -> PreTrainedTokenizerFast:
    definition = json.loads(TOKENIZER.backend_tokenizer.to_str())
    for key, value in changes.items():
        where, _, name = key.rpartition("__")
        (definition[where] if where else definition)[name] = value
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(definition)))


def crossing() -> dict[str, object]:
    model = json.loads(TOKENIZER.backend_tokenizer.to_str())["model"]
    return {
        "model__vocab": model["vocab"] | {"x\u2581": len(model["vocab"]) + 100},
        "model__merges": [*model["merges"], ["x", "\u2581"]],
    }


def without_a_byte() -> dict[str, object]:
    vocabulary = json.loads(TOKENIZER.backend_tokenizer.to_str())["model"]["vocab"]
    return {"model__vocab": {token: index for token, index in vocabulary.items() if token != "<0xF0>"}}


def swallowing_before() -> dict[str, object]:
    added = json.loads(TOKENIZER.backend_tokenizer.to_str())["added_tokens"]
    return {"added_tokens": [token | {"lstrip": True} for token in added]}


NOT_INDEPENDENT = {
    "a token that reaches into the next word": crossing(),
    "a byte without a token": without_a_byte(),
    "an added token that swallows what is before it": swallowing_before(),
    "another normalizer": {"normalizer": {"type": "NFKC"}},
    "cut into words by itself": {"pre_tokenizer": {"type": "Whitespace"}},
    "random merges": {"model__dropout": 0.1},
}


def test_phi3s_tokenizer_encodes_words_independently():
    assert words_are_independent(changed().backend_tokenizer.to_str())


@pytest.mark.parametrize("name", NOT_INDEPENDENT)
def test_tokenizers_with_dependent_words_are_not_cached(name):
    assert not words_are_independent(changed(**NOT_INDEPENDENT[name]).backend_tokenizer.to_str())


def test_negative_control_a_token_across_words_changes_the_ids():
    tokenizer = changed(**crossing())
    assert WordCache(tokenizer).encode(Rendered("x x", [])).ids != whole(tokenizer, "x x")


HARMLESS, CROSSING = chat("the answer is", "a question"), chat("x x", "x x")


@pytest.fixture
def dependent(monkeypatch) -> ChatTemplate:
    """A template of a tokenizer whose words depend on each other, which its definition does not show."""
    monkeypatch.setattr("phi3_lightning.data.template.words_are_independent", lambda definition: True)
    tokenizer = changed(**crossing())
    tokenizer.chat_template, tokenizer.eos_token = TOKENIZER.chat_template, TOKENIZER.eos_token
    return ChatTemplate(tokenizer)


def encoded(template: ChatTemplate, rows: list[dict], num_proc: int = 1) -> list[list[int]]:
    """The tokens of chats from one preparation."""
    numbered = list(enumerate(rows))
    jobs = (Job(0, numbered[start : start + 128]) for start in range(0, len(rows), 128))
    chunks = encode_all(jobs, Encoder(template, RowOptions()), num_proc)
    return [ids.tolist() for chunk in chunks for ids in np.split(chunk.input_ids, np.cumsum(chunk.lengths)[:-1])]


def expected(template: ChatTemplate, rows: list[dict]) -> list[list[int]]:
    apply = template.tokenizer.apply_chat_template
    return [apply(row["messages"], tokenize=True, return_dict=False) for row in rows]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_dependent_words_are_detected_and_switch_the_cache_off(dependent, caplog, num_proc):
    rows = [*[HARMLESS] * 150, *[CROSSING] * 350]
    assert encoded(dependent, rows, num_proc) == expected(dependent, rows)
    [line] = caplog.messages
    assert line.startswith("data.tokenizer: encoded word by word")
    assert "\n" not in line


def test_each_preparation_compares_its_first_chats(dependent, caplog):
    assert encoded(dependent, [HARMLESS] * 300) == expected(dependent, [HARMLESS] * 300)
    assert caplog.messages == []
    assert encoded(dependent, [CROSSING] * 2) == expected(dependent, [CROSSING] * 2)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("num_proc", [1, 2])
def test_independent_words_keep_the_cache_and_log_nothing(caplog, monkeypatch, num_proc):
    template = ChatTemplate(TOKENIZER)
    rows = [
        HARMLESS,
        CROSSING,
        chat("<|end|> 😀", "  <s>\n"),
        chat("\u3000", ""),
        {"messages": 5},
        {"text": "x x"},
    ] * 80
    tokens = encoded(template, rows, num_proc)
    assert caplog.messages == []
    monkeypatch.setattr(WordCache, "encode", lambda cache, rendered: None)
    assert tokens == encoded(ChatTemplate(TOKENIZER), rows)
