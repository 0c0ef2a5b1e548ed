"""The preview shows each token once, colours what is trained, and carries nothing that a browser would run."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.data.preview import look, render_terminal, segments
from phi3_lightning.data.preview_html import render_html

from .conftest import chat


@pytest.fixture
def datamodule(write: Callable[..., str], tokenizer_folder: str, tmp_path: Path) -> ChatDataModule:
    rows = [chat("<script>alert(1)</script> 😀", "the answer"), {"messages": 5}]
    path = write([*rows, *(chat("word " * index) for index in range(30))])
    datamodule = ChatDataModule(
        path, tokenizer=tokenizer_folder, max_length=256, on_bad_row="skip", cache_dir=str(tmp_path), val_fraction=0.0
    )
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def test_segments_hold_every_token_once_and_know_what_is_trained(datamodule: ChatDataModule) -> None:
    for document in datamodule.prepared["train"].documents(list(range(31))):
        found = segments(document, datamodule.tokenizer)
        assert [token for segment in found for token in segment.ids] == document.input_ids.tolist()
        assert "".join(segment.text for segment in found if segment.trained) == "the answer<|end|>"


def test_the_terminal_shows_places_facts_and_special_tokens(datamodule: ChatDataModule) -> None:
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(render_terminal(look(datamodule, rows=2), show_ids=True))
    text = console.export_text(styles=True)
    assert "chats.jsonl:1" in text
    assert "chats.jsonl:3" in text
    assert "dropped: no list" in text
    assert "<|assistant|>" in text
    assert str(datamodule.tokenizer.convert_tokens_to_ids("<|end|>")) in text
    assert "\x1b[" in text


@pytest.mark.parametrize("show_ids", [False, True])
def test_the_page_is_whole_and_safe(datamodule: ChatDataModule, show_ids: bool) -> None:
    page = render_html(look(datamodule, rows=5), show_ids=show_ids)
    assert page.startswith("<!doctype html>")
    assert "<script" not in page
    assert not re.search(r"(src|href)=", page)
    assert '<span class="trained">the answer</span>' in page
    assert '<span class="trained special">&lt;|end|&gt;</span>' in page
    assert page.count("<section>") == 5
    assert ("<small>" in page) == show_ids
    assert "tokens of a document" in page


def test_facts_add_up(datamodule: ChatDataModule) -> None:
    preview = look(datamodule)
    assert preview.facts["rows read"] == "32"
    assert preview.facts["documents in train"] == "31"
    assert preview.facts["trained turns"] == "31"
    assert sum(count for _, count in preview.histogram) == 31
