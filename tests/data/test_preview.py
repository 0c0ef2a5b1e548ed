"""The preview shows each token once, colours trained text, and contains nothing that a browser would run."""

import html
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.data.preview import build_preview, render_html, render_terminal

from .conftest import chat


@pytest.fixture
def datamodule(write: Callable[..., str], tokenizer_folder: str, tmp_path: Path) -> ChatDataModule:
    rows = [chat("<script>alert(1)</script> 😀", "the answer"), {"messages": 5}]
    path = write([*rows, *(chat("word " * index) for index in range(30))])
    datamodule = ChatDataModule(
        train=path,
        tokenizer=tokenizer_folder,
        max_length=256,
        on_bad_row="skip",
        cache_dir=str(tmp_path),
        val_fraction=0.0,
    )
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def test_the_terminal_shows_lines_facts_and_special_tokens(datamodule: ChatDataModule) -> None:
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(render_terminal(build_preview(datamodule, rows=2), show_ids=True))
    text = console.export_text(styles=True)
    assert "chats.jsonl:1" in text
    assert "chats.jsonl:3" in text
    assert "dropped: not a list" in text
    assert "<|assistant|>" in text
    assert str(datamodule.tokenizer.convert_tokens_to_ids("<|end|>")) in text
    assert "\x1b[" in text


@pytest.mark.parametrize("show_ids", [False, True])
def test_the_page_is_self_contained_and_escaped(datamodule: ChatDataModule, show_ids: bool) -> None:
    page = render_html(build_preview(datamodule, rows=5), show_ids=show_ids)
    assert page.startswith("<!doctype html>")
    assert "<script" not in page
    assert not re.search(r"(src|href)=", page)
    assert '<span class="trained">the answer</span>' in page
    assert '<span class="trained special">&lt;|end|&gt;</span>' in page
    assert page.count("<article>") == 5
    assert ("<small>" in page) == show_ids
    assert "tokens of a document" in page


@pytest.mark.parametrize("show_ids", [False, True])
def test_text_is_shown_as_it_was_written(
    write: Callable[..., str], tokenizer_folder: str, tmp_path: Path, show_ids: bool
) -> None:
    texts = ["Do you sell ink?", "你好 😀 two  blanks", "a [b] <c>"]
    path = write([{"text": text} for text in texts])
    made = ChatDataModule(
        train=path, tokenizer=tokenizer_folder, max_length=256, cache_dir=str(tmp_path), val_fraction=0.0, packing=False
    )
    made.prepare_data()
    made.setup()
    preview = build_preview(made)
    page = render_html(preview, show_ids=show_ids)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(render_terminal(preview, show_ids=show_ids))
    shown = re.sub(r" \[[\d, ]+\] ", "", console.export_text())
    for text, section in zip(texts, re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL), strict=True):
        plain = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<small>[^<]*</small>", "", section)))
        assert plain == f"{text}<|endoftext|>"
        assert text in shown


def test_trained_text_is_in_brackets_without_colours(datamodule: ChatDataModule) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(render_terminal(build_preview(datamodule, rows=1), brackets=True))
    assert "<|assistant|>«the answer<|end|>»<|endoftext|>" in console.export_text()


def test_files_read_and_duplicates_are_reported(
    write: Callable[..., str], tokenizer_folder: str, tmp_path: Path
) -> None:
    train = write([chat("a"), chat("b"), chat("a"), chat("c"), chat("d")], "x/train.jsonl")
    val, test = write([chat("b"), chat("e")], "x/val.jsonl"), write([chat("d"), chat("d")], "x/test.jsonl")
    (tmp_path / "x/notes.txt").write_text("no data")
    folder = str(tmp_path / "x")
    made = ChatDataModule(
        train=folder,
        val=folder,
        test=folder,
        tokenizer=tokenizer_folder,
        max_length=64,
        cache_dir=str(tmp_path / "cache"),
    )
    made.prepare_data()
    made.setup()
    facts = build_preview(made).facts
    assert facts["read"] == f"{train} (5 rows)"
    assert facts["left out"] == "test.jsonl, val.jsonl, notes.txt"
    assert facts["exact duplicates"] == f"1: {train}:3 is {train}:1"
    assert facts["documents of val that are trained too"] == f"1: {val}:1 is {train}:2"
    assert facts["documents of test that are trained too"] == f"2: {test}:1 is {train}:5, {test}:2 is {train}:5"
    assert "exact duplicates" not in build_preview(made, "val").facts
    assert build_preview(made, "val").facts["documents of val that are trained too"] == f"1: {val}:1 is {train}:2"


def test_facts_add_up(datamodule: ChatDataModule) -> None:
    preview = build_preview(datamodule)
    assert preview.facts["rows read"] == "32"
    assert preview.facts["documents in train"] == "31"
    assert preview.facts["trained turns"] == "31"
    assert sum(count for _, count in preview.histogram) == 31


def test_unused_fields_are_reported(
    write: Callable[..., str], tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write([chat() | {"lang": "de"}, chat() | {"lang": "de", "note": "x"}, {"messages": 5, "lang": "de"}])
    options: dict[str, Any] = {"tokenizer": tokenizer_folder, "max_length": 256, "val_fraction": 0.0, "num_proc": 2}
    lines: list[str] = []
    monkeypatch.setattr("phi3_lightning.data.splits.rank_zero_info", lines.append)
    for _ in range(2):  # the second time from the cache
        lines.clear()
        datamodule = ChatDataModule(train=path, on_bad_row="skip", cache_dir=str(tmp_path), **options)
        datamodule.prepare_data()
        datamodule.setup()
        assert build_preview(datamodule).facts["fields not used"] == "lang (2 rows), note (1)"
        assert lines.count("train: fields that are not used: lang (2 rows), note (1)") == 1


def test_without_unused_fields_none_are_reported(datamodule: ChatDataModule) -> None:
    assert "fields not used" not in build_preview(datamodule).facts


def test_a_cell_of_a_notebook_shows_the_page_in_a_frame(datamodule: ChatDataModule) -> None:
    preview = build_preview(datamodule, rows=2)
    [page] = re.findall(r'<iframe srcdoc="([^"]*)"', preview._repr_html_())
    assert html.unescape(page) == render_html(preview)


def test_rows_that_are_left_out_or_have_an_empty_answer_are_named_and_counted(
    write: Callable[..., str], tokenizer_folder: str, tmp_path: Path
) -> None:
    path = write([chat("q", ""), chat("word " * 99, "a"), {**chat(), "id": "t-7"}])
    data = ChatDataModule(
        train=path, tokenizer=tokenizer_folder, max_length=64, cache_dir=str(tmp_path), val_fraction=0
    )
    data.prepare_data()
    data.setup()
    preview = build_preview(data)
    assert preview.facts["dropped: longer than max_length 64"] == f"1: {path}:2"
    assert preview.facts["empty answers"] == "1: such rows teach to say nothing"
    assert [place for place, _ in preview.samples] == [f"{path}:1", f"{path}:3 (id t-7)"]
