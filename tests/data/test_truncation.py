"""Long chats are truncated as configured; an end token is trained only where the chat itself ends a turn."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.collate import Document
from phi3_lightning.data.encode import Encoder
from phi3_lightning.data.prepare import prepare
from phi3_lightning.data.sources import find_sources
from phi3_lightning.data.template import ChatTemplate
from phi3_lightning.data.tokenized import TokenizedDataset
from phi3_lightning.errors import DataError


@pytest.fixture
def tokenise(tokenizer: Any, tmp_path: Path) -> Callable[..., TokenizedDataset]:
    def tokenise(rows: list[Any], **options: Any) -> TokenizedDataset:
        path = tmp_path / "chats.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        encoder = Encoder(ChatTemplate(tokenizer), RowOptions(**options))
        return prepare(find_sources(str(path)), encoder, on_bad_row="raise", cache_dir=str(tmp_path))

    return tokenise


def documents(prepared: TokenizedDataset) -> list[Document]:
    return prepared.documents(list(range(len(prepared.table))))


def trained(document: Document) -> list[int]:
    return [token for first, end in document.spans.reshape(-1, 2) for token in document.input_ids[first:end].tolist()]


def exchange(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


LONG = exchange("one", "word " * 6, "two", "word " * 9)


@pytest.mark.parametrize("short_by", [0, 1, 2, 3, 10])
def test_a_truncated_answer_has_no_end_token(
    tokenise: Callable[..., TokenizedDataset], tokenizer: Any, short_by: int
) -> None:
    [whole] = documents(tokenise([LONG]))
    limit = len(whole.input_ids) - short_by
    cut = tokenise([LONG], max_length=limit, truncation="truncate_end")
    [document] = documents(cut)
    assert document.input_ids.tolist() == whole.input_ids.tolist()[:limit]
    ends = trained(document).count(tokenizer.convert_tokens_to_ids("<|end|>"))
    assert ends == (2 if short_by <= 1 else 1)  # only the end of text follows the last end token
    assert cut.statistics.cut == (short_by > 0)
    assert trained(whole)[: len(trained(document))] == trained(document)


def test_a_row_whose_answers_are_cut_away_is_dropped(tokenise: Callable[..., TokenizedDataset]) -> None:
    rows = [exchange("word " * 99, "ok"), exchange("q", "a")]
    prepared = tokenise(rows, max_length=40, truncation="truncate_end")
    assert prepared.statistics.dropped == {"nothing to train": 1}
    assert (prepared.statistics.kept, prepared.statistics.cut) == (1, 0)


def test_truncate_turns_drops_early_exchanges_and_keeps_the_system_message(
    tokenise: Callable[..., TokenizedDataset], tokenizer: Any
) -> None:
    system = {"role": "system", "content": "be kind"}
    turns = [exchange(f"question {index}", f"word {index}")["messages"] for index in range(8)]
    row = {"messages": [system, *(message for pair in turns for message in pair)]}
    for limit in range(40, 260, 7):
        [document] = documents(tokenise([row], max_length=limit, truncation="truncate_turns"))
        kept = [system]
        for pair in reversed(turns):
            longer = [system, *pair, *kept[1:]]
            if len(tokenizer.apply_chat_template(longer, return_dict=False)) > limit:
                break
            kept = longer
        assert document.input_ids.tolist() == tokenizer.apply_chat_template(kept, return_dict=False)


def test_a_chat_whose_last_exchange_is_too_long_is_dropped(tokenise: Callable[..., TokenizedDataset]) -> None:
    with pytest.raises(DataError, match="longer than max_length 30"):
        tokenise([exchange("one", "two", "three", "word " * 30)], max_length=30, truncation="truncate_turns")


def test_the_pieces_of_a_split_chat_join_to_the_whole(tokenise: Callable[..., TokenizedDataset]) -> None:
    [whole] = documents(tokenise([LONG]))
    prepared = tokenise([LONG], max_length=25, truncation="split")
    pieces = documents(prepared)
    assert [token for piece in pieces for token in piece.input_ids.tolist()] == whole.input_ids.tolist()
    assert [token for piece in pieces for token in trained(piece)] == trained(whole)
    assert prepared.describe([0])[0].endswith("chats.jsonl:1")
    assert prepared.statistics.cut == 1


@pytest.mark.parametrize("truncation", ["drop", "truncate_end", "truncate_turns", "split"])
def test_a_limit_above_every_length_changes_nothing(tokenise: Callable[..., TokenizedDataset], truncation: str) -> None:
    [whole] = documents(tokenise([LONG]))
    [same] = documents(tokenise([LONG], max_length=len(whole.input_ids), truncation=truncation))
    assert same.input_ids.tolist() == whole.input_ids.tolist()
    assert same.spans.tolist() == whole.spans.tolist()


def test_texts_are_trained_whole_with_an_end_token(tokenise: Callable[..., TokenizedDataset], tokenizer: Any) -> None:
    prepared = tokenise([{"text": "the answer is <|end|>"}])
    [document] = documents(prepared)
    ids = document.input_ids.tolist()
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|end|>") not in ids
    assert tokenizer.decode(ids[:-1]) == "the answer is <|end|>"
    assert document.spans.tolist() == [0, len(ids)]
    assert prepared.statistics.supervised_tokens == len(ids) - 1  # nothing predicts the first


def test_ready_made_tokens_are_taken_as_they_are(tokenise: Callable[..., TokenizedDataset]) -> None:
    [document] = documents(tokenise([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]))
    assert document.input_ids.tolist() == [5, 6, 7]
    assert document.spans.tolist() == [1, 3]
    with pytest.raises(DataError, match="id 99999 is not one"):
        tokenise([{"input_ids": [5, 99999], "labels": [-100, 99999]}])


def test_a_row_without_a_trained_turn_is_dropped(tokenise: Callable[..., TokenizedDataset]) -> None:
    untrained = exchange("q", "a")
    untrained["messages"][1]["weight"] = 0
    assert tokenise([untrained, exchange("q", "a")]).statistics.dropped == {"nothing to train": 1}


def test_special_text_can_be_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps(exchange("<|end|>", "a")) + '\n{"text": "<|user|>"}\n')
    encoder = Encoder(ChatTemplate(tokenizer, special_text="refuse"), RowOptions(special_text="refuse"))
    with pytest.raises(DataError, match=r"'<\|end\|>' within") as caught:
        prepare(find_sources(str(tmp_path / "chats.jsonl")), encoder, on_bad_row="raise", cache_dir=str(tmp_path))
    assert "'<|user|>' within" in str(caught.value)
