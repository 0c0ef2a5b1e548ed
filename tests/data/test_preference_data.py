"""Pairs and labelled answers from a file to batches: each comes once and undivided, however the rows are read."""

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Trainer
from rich.console import Console

from phi3_lightning.batch import Batch
from phi3_lightning.checks.rows import read_sample
from phi3_lightning.checks.supervision import find_faults
from phi3_lightning.data.context_length import ContextLength
from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.data.packing import plan_batches
from phi3_lightning.data.preview import build_preview, render_html, render_terminal
from phi3_lightning.errors import ConfigError, DataError

from .conftest import chat
from .test_datamodule import Recorder, trainer

Write = Callable[..., str]
COUNT = 23
LIMIT = 120


def pair(index: int) -> dict[str, Any]:
    words = ["word " * (index % 7), "word " * (index * 5 % 13)]
    return {"prompt": f"question {index}", "chosen": f"a {words[0]}", "rejected": f"the {words[1]}", "id": index}


def labelled(index: int) -> dict[str, Any]:
    return chat(f"question {index}", "word " * (1 + index % 7)) | {"label": index % 3 == 0}


@pytest.fixture
def data(write: Write, tmp_path: Path, tokenizer_folder: str) -> Callable[..., ChatDataModule]:
    def data(rows: list[Any] | None = None, **options: Any) -> ChatDataModule:
        path = write([pair(index) for index in range(COUNT)] if rows is None else rows, "rows.jsonl")
        small = {"train": path, "tokenizer": tokenizer_folder, "max_length": LIMIT, "batch_size": 2, "num_workers": 0}
        small |= {"cache_dir": str(tmp_path / "cache"), "val_fraction": 0.0}
        return ChatDataModule(**(small | options))

    return data


def ready(datamodule: ChatDataModule) -> ChatDataModule:
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def by_pair(batches: list[Batch]) -> dict[int, list[list[int]]]:
    """The tokens of both sides of each pair, by its id; fails where a row holds one side alone."""
    pairs: dict[int, list[list[int]]] = {}
    for batch in batches:
        for row, ids in enumerate(batch["document_ids"]):
            assert ids[0::2] == ids[1::2]
            assert batch["preferred"][row] == [True, False] * (len(ids) // 2)
            assert batch["shared_lengths"][row][0::2] == [0] * (len(ids) // 2)
            tokens = iter(batch["input_ids"][row].tolist())
            sides = [list(itertools.islice(tokens, length)) for length in batch["document_lengths"][row]]
            for document_id, chosen, rejected, shared in zip(
                ids[0::2], sides[0::2], sides[1::2], batch["shared_lengths"][row][1::2], strict=True
            ):
                assert document_id not in pairs
                assert chosen[:shared] == rejected[:shared]
                pairs[document_id] = [chosen, rejected]
    return pairs


@pytest.mark.parametrize("packing", [True, False])
def test_each_pair_comes_once_and_undivided(data: Callable[..., ChatDataModule], packing: bool) -> None:
    datamodule = ready(data(packing=packing))
    batches = list(datamodule.train_dataloader())
    pairs = by_pair(batches)
    assert sorted(pairs) == list(range(COUNT))
    assert pairs == by_pair(list(ready(data(packing=not packing, batch_size=1)).train_dataloader()))
    widths = [sum(lengths) for batch in batches for lengths in batch["document_lengths"]]
    assert max(widths) <= 2 * LIMIT
    assert (max(widths) > LIMIT and datamodule.train_rows < COUNT) == packing
    assert datamodule.train_documents == COUNT


def test_both_sides_are_those_of_their_chats(data: Callable[..., ChatDataModule]) -> None:
    pairs = by_pair(list(ready(data()).train_dataloader()))
    for index, side in itertools.product(range(COUNT), (0, 1)):
        row = pair(index)
        messages = chat(row["prompt"], row[("chosen", "rejected")[side]])["messages"]
        expected = ready(data([{"messages": messages}], packing=False))
        assert expected.prepared["train"].documents([0])[0].input_ids.tolist() == pairs[index][side]


def test_statistics_count_both_sides(data: Callable[..., ChatDataModule]) -> None:
    datamodule = ready(data())
    statistics = datamodule.statistics["train"]
    batches = list(datamodule.train_dataloader())
    assert (statistics.kind, statistics.read, statistics.kept) == ("pair", COUNT, COUNT)
    assert statistics.tokens == sum(sum(map(sum, batch["document_lengths"])) for batch in batches)
    assert statistics.supervised_tokens == sum(int((batch["labels"] != -100).sum()) for batch in batches)


def test_the_cache_and_processes_change_nothing(data: Callable[..., ChatDataModule], tmp_path: Path) -> None:
    rows = [pair(index) for index in range(600)]
    one = ready(data(rows)).prepared["train"]
    two = ready(data(rows, num_proc=2, cache_dir=str(tmp_path / "other"))).prepared["train"]
    again = ready(data(rows)).prepared["train"]
    for other in (two, again):
        for name in ("length", "chosen_length", "shared_length", "preferred", "hash", "row"):
            assert np.array_equal(one.column(name), other.column(name))
        for document, same in zip(one.documents([0, 599]), other.documents([0, 599]), strict=True):
            assert document.sides()[1].input_ids.tolist() == same.sides()[1].input_ids.tolist()
            assert document[3:] == same[3:]


def test_labels_come_with_their_answers(data: Callable[..., ChatDataModule]) -> None:
    datamodule = ready(data([labelled(index) for index in range(COUNT)]))
    batches = list(datamodule.train_dataloader())
    labels = {
        document_id: flag
        for batch in batches
        for ids, flags in zip(batch["document_ids"], batch["preferred"], strict=True)
        for document_id, flag in zip(ids, flags, strict=True)
    }
    assert labels == {index: index % 3 == 0 for index in range(COUNT)}
    assert all("shared_lengths" not in batch for batch in batches)
    assert max(sum(row) for batch in batches for row in batch["document_lengths"]) <= LIMIT


@pytest.mark.parametrize("make", [pair, labelled])
def test_ranks_are_evened_out_with_fillers_of_the_same_kind(
    data: Callable[..., ChatDataModule], make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fields = set()
    for rank in range(2):
        datamodule = data([make(index) for index in range(3)], packing=False, batch_size=1)
        datamodule.trainer = trainer(tmp_path, max_steps=1)
        monkeypatch.setattr(Trainer, "distributed_sampler_kwargs", {"num_replicas": 2, "rank": rank})
        datamodule.prepare_data()
        datamodule.setup("fit")
        fields |= {frozenset(batch) for batch in datamodule.train_dataloader()}
    [names] = fields
    assert ("shared_lengths" in names) == (make is pair)


def test_a_fraction_of_the_pairs_is_held_out(data: Callable[..., ChatDataModule], tmp_path: Path) -> None:
    datamodule, module = data(val_fraction=0.2), Recorder()
    trainer(tmp_path).fit(module, datamodule=datamodule)
    seen = [row for _, rows in module.trained for row in rows]
    assert sorted({*seen, *module.validated}) == list(range(COUNT))
    assert not set(seen) & set(module.validated)
    rows = [pair(index) | {"user": index // 4} for index in range(COUNT)]
    grouped = ready(data(rows, val_fraction=0.2, group_by="user"))
    users = [{index // 4 for index in grouped.plans[split].documents.tolist()} for split in ("train", "val")]
    assert not users[0] & users[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pairs_are_streamed(data: Callable[..., ChatDataModule], num_workers: int) -> None:
    rows = [pair(index) for index in range(200)]
    datamodule = ready(data(rows, streaming=True, num_workers=num_workers))
    whole = by_pair(list(ready(data(rows)).train_dataloader()))
    seen: dict[int, list[list[int]]] = {}
    for batch in datamodule.train_dataloader():
        pairs = by_pair([batch])
        if pairs.keys() & seen.keys():
            break
        seen |= pairs
    assert len(seen) > 100
    assert all(sides == whole[number - 1] for number, sides in seen.items())  # lines count from 1
    assert datamodule.largest_train_row()["document_lengths"] == [[LIMIT, LIMIT]]


def test_rows_of_two_kinds_are_an_error_that_names_one_of_each(data: Callable[..., ChatDataModule]) -> None:
    kinds = {"a chat": chat(), "a pair of chosen and rejected": pair(1), "an answer with a label": labelled(1)}
    for (name, row), (other, odd) in itertools.permutations(kinds.items(), 2):
        expected = rf"rows.jsonl:1 is {name}, and .*rows.jsonl:3 is {other}; .*data.format"
        with pytest.raises(DataError, match=expected):
            ready(data([row, row, odd], on_bad_row="skip"))
        with pytest.raises(DataError, match=expected):
            next(iter(ready(data([row, row, odd], streaming=True)).train_dataloader()))
    mixed = ready(data([chat(), labelled(1) | {"good": 1}], format="messages"))
    assert mixed.statistics["train"].unused == {"label": 1, "good": 1}


def test_bad_pairs_are_counted_by_reason(data: Callable[..., ChatDataModule]) -> None:
    bad = [pair(1) | {"rejected": ""}, pair(1) | {"chosen": "x", "rejected": "x"}, {"chosen": "a", "rejected": "b"}]
    with pytest.raises(DataError, match=r"rows.jsonl:2: empty answer"):
        ready(data([pair(0), *bad]))
    statistics = ready(data([pair(0), *bad], on_bad_row="skip")).statistics["train"]
    assert statistics.dropped == {"empty answer": 1, "chosen equals rejected": 1, "no prompt": 1}


def test_a_batch_has_to_hold_a_pair(data: Callable[..., ChatDataModule]) -> None:
    with pytest.raises(ConfigError, match=rf"data.max_tokens_per_batch: {LIMIT} holds no row of pairs.*{2 * LIMIT}"):
        ready(data(max_tokens_per_batch=LIMIT))
    for packing in (True, False):
        batches = list(ready(data(max_tokens_per_batch=2 * LIMIT, packing=packing)).train_dataloader())
        assert max(batch["input_ids"].numel() for batch in batches) <= 2 * LIMIT
        assert sorted(by_pair(batches)) == list(range(COUNT))


def test_the_largest_batch_and_row_are_of_whole_pairs(data: Callable[..., ChatDataModule]) -> None:
    datamodule = ready(data())
    batches = list(datamodule.train_dataloader())
    largest, row = datamodule.largest_train_batch(), datamodule.largest_train_row()
    assert largest is not None
    tokens = [sum(map(sum, batch["document_lengths"])) for batch in [largest, *batches]]
    assert tokens[0] == max(tokens)
    assert len(row["document_lengths"]) == 1
    assert by_pair([row])


def test_the_longer_side_decides_about_longrope() -> None:
    chosen, lengths = np.array([9, 30, 6, 3]), np.array([18, 34, 40, 7])
    plan = plan_batches(lengths, batch_size=9, capacity=None, length_boundary=16, chosen_lengths=chosen)
    batches = [sorted(itertools.chain(*plan[index])) for index in range(len(plan))]
    assert batches == [[1, 2], [0, 3]]


@pytest.mark.parametrize("make", [pair, labelled])
def test_prompts_of_preferences_are_answered(data: Callable[..., ChatDataModule], make: Any) -> None:
    rows = [make(index) for index in range(3)]
    datamodule = ready(data(rows, predict=data(rows).options.train))
    batch = next(iter(datamodule.predict_dataloader()))
    questions = [row.get("prompt") or row["messages"][0]["content"] for row in rows]
    for document_id, ids, mask in zip(batch["document_ids"], batch["input_ids"], batch["attention_mask"], strict=True):
        prompt = [{"role": "user", "content": questions[document_id]}]
        tokenizer: Any = datamodule.tokenizer
        expected = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        assert ids[mask.bool()].tolist() == expected
    assert [origin.id for origin in datamodule.origins("predict", [0, 2])] == [row.get("id") for row in rows[::2]]


def render(datamodule: ChatDataModule) -> tuple[str, str, dict[str, str]]:
    preview = build_preview(datamodule, rows=2)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(render_terminal(preview, brackets=True))
    return console.export_text(), render_html(preview), preview.facts


def test_the_preview_shows_both_sides(data: Callable[..., ChatDataModule]) -> None:
    text, page, facts = render(ready(data([pair(3), pair(4), pair(3)])))
    for side, answer in (("chosen", "a word word word "), ("rejected", "the word word ")):
        assert f"rows.jsonl:1: {side}" in text
        assert f"<|assistant|>«{answer}<|end|>»<|endoftext|>" in text
        assert f"rows.jsonl:1: {side} (id 3)</h3>" in page
        assert f'<span class="trained">{answer}</span>' in page
    assert page.count("<article>") == 4
    assert "«question" not in text
    assert facts["documents in train"] == "3"
    assert facts["pairs"].startswith("3; ")
    assert "the chosen one is longer in 67% of pairs" in facts["tokens of an answer"]
    assert facts["exact duplicates"].startswith("1: ")
    assert f"of each row of {2 * LIMIT} used" in facts["packing"]


def test_the_preview_shows_labels(data: Callable[..., ChatDataModule]) -> None:
    text, page, facts = render(ready(data([labelled(0), labelled(1), labelled(2)])))
    assert "rows.jsonl:1: label true" in text
    assert "rows.jsonl:2: label false</h3>" in page
    assert facts["answers by label"] == "1 good, 2 bad"
    assert facts["tokens of an answer"].count("median") == 2


def test_answer_tokens_are_those_of_the_labels(data: Callable[..., ChatDataModule]) -> None:
    datamodule = ready(data([pair(3), pair(4), pair(5)]))
    trained = [
        [sum(side.spans[1::2] - side.spans[0::2]) for side in document.sides()]
        for document in datamodule.prepared["train"].documents([0, 1, 2])
    ]
    medians = np.median(trained, axis=0)
    expected = f"median {medians[0]:.0f} chosen, {medians[1]:.0f} rejected"
    assert build_preview(datamodule).facts["tokens of an answer"].startswith(expected)


@pytest.mark.parametrize("make", [pair, labelled])
def test_check_samples_preferences_and_finds_their_supervision_right(
    data: Callable[..., ChatDataModule], make: Any
) -> None:
    datamodule = ready(data([make(index) for index in range(COUNT)]))
    sample = read_sample(datamodule.options, datamodule.template, ContextLength(512, 512))
    assert (sample.read, sample.documents, sample.endless, sample.empty) == (COUNT, COUNT, 0, 0)
    assert sample.supervised == datamodule.statistics["train"].supervised_tokens
    assert find_faults(sample.rows, datamodule.template) == []
    row = sample.rows[0]
    assert row.answer[-1] == datamodule.template.stop_ids[0]
    shifted = row.document._replace(spans=row.document.spans + 1)
    assert find_faults([type(row)(row.place, shifted, row.conversations)], datamodule.template)
