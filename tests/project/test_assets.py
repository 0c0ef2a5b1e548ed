"""The embedded tiny model behaves like Phi-3, and has not learnt the chats beside it."""

import json
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from jinja2 import UndefinedError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Phi3ForCausalLM, PreTrainedTokenizerBase

REPOSITORY = Path(__file__).parents[2]
ASSETS = REPOSITORY / "src/phi3_lightning/assets/tiny_phi3"
FILES = {"train": "chats_train.jsonl", "val": "chats_val.jsonl", "prompts": "prompts.jsonl"}
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Hi\n"}],
    [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "é\n\nworld "},
        {"role": "user", "content": "?"},
    ],
    [{"role": "tool", "content": "dropped"}, {"role": "user", "content": "<|end|> said"}],
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ASSETS, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Phi3ForCausalLM:
    torch.set_num_threads(1)
    return Phi3ForCausalLM.from_pretrained(ASSETS, local_files_only=True, use_safetensors=True, dtype=torch.float32)


@pytest.fixture(scope="module")
def chats() -> dict[str, list]:
    return {
        part: [json.loads(line)["messages"] for line in (ASSETS / name).read_text().splitlines()]
        for part, name in FILES.items()
    }


@pytest.fixture(scope="module")
def pairs() -> dict[str, list]:
    return {
        part: [json.loads(line) for line in (ASSETS / f"pairs_{part}.jsonl").read_text().splitlines()]
        for part in ("train", "val")
    }


@pytest.fixture
def scripts(monkeypatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    yield
    for name in ("build_tiny_phi3", "tiny_phi3_chats", "tiny_phi3_corpus", "tiny_phi3_pairs"):
        sys.modules.pop(name, None)


def questions(conversations: list) -> set[str]:
    return {message["content"] for message in chain(*conversations) if message["role"] == "user"}


def test_the_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in ASSETS.iterdir()) <= 4_000_000


def test_the_model_fits_its_tokenizer(model, tokenizer) -> None:
    stops = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")}
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert set(model.generation_config.eos_token_id) == stops
    assert model.config.eos_token_id == model.config.pad_token_id == tokenizer.eos_token_id
    assert model.config.bos_token_id == tokenizer.bos_token_id
    assert tokenizer.model_max_length == model.config.max_position_embeddings


def test_the_weights_are_stored_in_bfloat16() -> None:
    stored = Phi3ForCausalLM.from_pretrained(ASSETS, local_files_only=True)
    assert {weight.dtype for weight in stored.parameters()} == {torch.bfloat16}


def test_no_embedding_row_is_untrained(model) -> None:
    for rows in (model.model.embed_tokens.weight, model.lm_head.weight):
        norms = rows.norm(dim=1)
        assert norms.min() > norms.median() / 2


def test_special_tokens(tokenizer) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "<|endoftext|>", "<unk>")
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.padding_side == "left"
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]) == [0, 1, 2, 3, 258]


def test_chat_tokens_swallow_white_space_and_nothing_is_added(tokenizer) -> None:
    for role in ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"):
        assert tokenizer(f"{role} \n\t Hi")["input_ids"] == tokenizer(f"{role}Hi")["input_ids"]
        assert tokenizer(f"{role}\n")["input_ids"] == [tokenizer.convert_tokens_to_ids(role)]
    assert len(tokenizer("<|endoftext|> ")["input_ids"]) > 1


@pytest.mark.parametrize(
    "text", ["Hi", "héllo", " two  spaces ", "\n\ttab", "a\x00b", "👩🏽‍🚀🔥", "שלום עולם", "漢字", "▁" * 0]
)
def test_any_text_comes_back(tokenizer, text) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_digits_stay_single(tokenizer) -> None:
    assert tokenizer.tokenize("2027") == ["▁", "2", "0", "2", "7"]


@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_template_writes_what_phi3_writes(tokenizer, shared, messages, generation_prompt) -> None:
    real = AutoTokenizer.from_pretrained(shared / "phi3-mini-4k-instruct")
    ours, theirs = (
        side.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
        for side in (tokenizer, real)
    )
    assert ours == theirs


@pytest.mark.parametrize("content", [None, [{"type": "text", "text": "Hi"}]])
def test_the_template_refuses_what_phi3_refuses(tokenizer, content) -> None:
    with pytest.raises((TypeError, UndefinedError)):
        tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)


def test_the_tokenizer_is_built_like_phi3s(shared) -> None:
    ours, theirs = (
        json.loads((folder / "tokenizer.json").read_text()) for folder in (ASSETS, shared / "phi3-mini-4k-instruct")
    )
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert ours[part] == theirs[part]
    assert [token | {"id": 0} for token in ours["added_tokens"]] == [
        token | {"id": 0} for token in theirs["added_tokens"]
    ]
    assert ours["model"].keys() >= theirs["model"].keys()
    assert {key: ours["model"][key] for key in theirs["model"] if key not in ("vocab", "merges")} == {
        key: value for key, value in theirs["model"].items() if key not in ("vocab", "merges")
    }


def test_rows_are_valid_chats(chats) -> None:
    assert {part: len(rows) for part, rows in chats.items()} == {"train": 320, "val": 40, "prompts": 3}
    for part, rows in chats.items():
        for messages in rows:
            roles = [message["role"] for message in messages]
            turns = roles[roles[0] == "system" :]
            assert turns == (["user", "assistant"] * len(turns))[: len(turns)]
            assert turns[-1] == ("user" if part == "prompts" else "assistant")
            assert all(message.keys() == {"role", "content"} and message["content"] for message in messages)


def test_every_kind_of_chat_is_there(chats) -> None:
    for part in ("train", "val"):
        kinds = {(messages[0]["role"] == "system", len(messages) > 3) for messages in chats[part]}
        assert len(kinds) == 4


def test_no_question_is_shared_between_the_files(chats) -> None:
    train, val, prompts = (questions(chats[part]) for part in FILES)
    assert train.isdisjoint(val | prompts)
    assert val.isdisjoint(prompts)


def test_held_out_answers_can_be_learned(chats) -> None:
    learned = {fact for messages in chats["train"] for fact in sentences(messages)}
    assert {fact for messages in chats["val"] for fact in sentences(messages)} <= learned


def sentences(messages: list) -> set[str]:
    answers = (message["content"] for message in messages if message["role"] == "assistant")
    return {sentence.strip("!. ") for answer in answers for sentence in answer.replace("!", ".").split(".")}


def test_the_base_has_much_to_learn(model, tokenizer, chats) -> None:
    ids = [torch.tensor([tokenizer.apply_chat_template(chat, return_dict=False)]) for chat in chats["val"]]
    with torch.no_grad():
        losses = [model(input_ids=row, labels=row, use_cache=False).loss.item() for row in ids]
    assert all(2 < loss < 10 for loss in losses)


def test_pairs_differ_in_their_answers_alone(pairs) -> None:
    assert {part: len(rows) for part, rows in pairs.items()} == {"train": 120, "val": 32}
    asked = {part: {row["prompt"][-1]["content"] for row in rows} for part, rows in pairs.items()}
    assert asked["train"].isdisjoint(asked["val"])
    for rows in pairs.values():
        assert all(row.keys() == {"prompt", "chosen", "rejected"} and row["chosen"] != row["rejected"] for row in rows)
        shorter = [len(row["chosen"][0]["content"]) < len(row["rejected"][0]["content"]) for row in rows]
        assert sum(shorter) == len(rows) / 2  # length alone tells nothing


def test_the_files_come_from_the_script(scripts, chats, pairs) -> None:
    from tiny_phi3_chats import build_chats
    from tiny_phi3_pairs import build_pairs

    assert build_chats()._asdict() == chats
    assert build_pairs()._asdict() == pairs


def test_the_corpus_follows_from_its_seed(scripts) -> None:
    from tiny_phi3_corpus import pretraining_documents

    assert pretraining_documents(7, 50) == pretraining_documents(7, 50)
    assert pretraining_documents(7, 50) != pretraining_documents(8, 50)


def test_pretraining_reads_every_token(scripts, tokenizer) -> None:
    from build_tiny_phi3 import echoes

    assert set(chain(*echoes(tokenizer, 90))) == set(range(len(tokenizer)))


def test_training_the_tokenizer_is_deterministic(scripts) -> None:
    from build_tiny_phi3 import train_tokenizer
    from tiny_phi3_corpus import pretraining_documents

    texts = [document for document in pretraining_documents(0, 300) if isinstance(document, str)]
    first, second = train_tokenizer(texts), train_tokenizer(texts)
    assert isinstance(first, Tokenizer)
    assert first.to_str() == second.to_str()
