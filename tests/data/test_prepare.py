"""Files are tokenised once; odd files give the rows of clean ones, and every fault is named with file and line."""

import json
import os
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.encode import Encoder
from phi3_lightning.data.prepare import prepare
from phi3_lightning.data.sources import find_sources
from phi3_lightning.data.template import ChatTemplate
from phi3_lightning.data.tokenized import Statistics, TokenizedDataset
from phi3_lightning.errors import ConfigError, DataError

from .conftest import chat

Write = Callable[..., str]


@pytest.fixture
def tokenise(tokenizer: Any, tmp_path: Path) -> Callable[..., TokenizedDataset]:
    template = ChatTemplate(tokenizer)

    def tokenise(
        files: str | list[str], *, num_proc: int = 1, on_bad_row: Any = "raise", **options: Any
    ) -> TokenizedDataset:
        encoder = Encoder(template, RowOptions(**({"max_length": 256} | options)))
        cache = str(tmp_path / f"cache{num_proc}")
        return prepare(find_sources(files), encoder, on_bad_row=on_bad_row, cache_dir=cache, num_proc=num_proc)

    return tokenise


def tokens(prepared: TokenizedDataset) -> list[list[int]]:
    return [document.input_ids.tolist() for document in prepared.documents(list(range(len(prepared.table))))]


CHATS = [chat("one\u2028two"), chat("a", "😀"), chat("b", "the end")]


def test_odd_bytes_give_the_rows_of_the_clean_file(tokenise: Callable[..., TokenizedDataset], tmp_path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in CHATS]
    (tmp_path / "clean.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "odd.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([*lines[:2], b"", lines[2], b"", b"  ", b""]))
    clean, odd = (tokenise(str(tmp_path / name)) for name in ("clean.jsonl", "odd.jsonl"))
    assert tokens(clean) == tokens(odd)
    assert clean.statistics == odd.statistics
    assert odd.describe([2]) == [f"{tmp_path / 'odd.jsonl'}:4"]


def test_json_lines_arrays_and_parquet_give_the_same_rows(
    tokenise: Callable[..., TokenizedDataset], write: Write, tmp_path: Path
) -> None:
    lines = write(CHATS)
    array = write([json.dumps(CHATS, indent=2)], "chats.json")
    pyarrow.parquet.write_table(pa.Table.from_pylist(CHATS), tmp_path / "chats.parquet")
    prepared = [tokenise(files) for files in (lines, array, str(tmp_path / "chats.parquet"))]
    assert tokens(prepared[0]) == tokens(prepared[1]) == tokens(prepared[2])
    assert prepared[1].describe([1]) == [f"{array} row 2"]


def test_rows_of_several_files_keep_file_and_line(tokenise: Callable[..., TokenizedDataset], write: Write) -> None:
    first, second = write(CHATS[:2], "first.jsonl"), write(CHATS[2:], "second.jsonl")
    prepared = tokenise([first, second])
    assert prepared.describe([2, 0]) == [f"{second}:1", f"{first}:1"]
    assert prepared.statistics.kept == 3


@pytest.mark.parametrize("truncation", ["drop", "split"])
def test_documents_know_the_line_and_id_of_their_row(
    tokenise: Callable[..., TokenizedDataset], write: Write, truncation: str
) -> None:
    ids = [7, "a7", 1.5, None, True, ["x"], "", "\ud800", 2**70]
    rows = [chat("q", "long " * 30) | ({} if value is None else {"id": value}) for value in ids]
    prepared = tokenise(write(rows), truncation=truncation, max_length=256 if truncation == "drop" else 60)
    origins = dict(prepared.origins(list(range(len(prepared.table)))))
    assert [place.rpartition(":")[2] for place in origins] == [str(line) for line in range(1, len(ids) + 1)]
    assert list(origins.values()) == [7, "a7", 1.5, None, None, None, None, "\ud800", 2**70]


def test_files_read_are_listed_with_their_rows(
    tokenise: Callable[..., TokenizedDataset], write: Write, tmp_path: Path
) -> None:
    first, second = write([*CHATS, "", '{"x": 1}'], "first.jsonl"), write(CHATS[:1], "second.jsonl")
    prepared = tokenise([first, second], on_bad_row="skip")
    assert prepared.files() == {"read": f"{first} (4 rows), {second} (1 rows)"}
    assert prepared.statistics.by_source == [4, 1]
    many = [write(CHATS[:1], f"{index:02}.jsonl") for index in range(13)]
    assert tokenise(many).files()["read"].endswith(f"{many[9]} (1 rows) and 3 more")
    with_rest = replace(prepared, left_out=["notes.txt", ".git/"])
    assert with_rest.files()["left out"] == "notes.txt, .git/"


def test_bad_rows_are_reported_together_by_line(tokenise: Callable[..., TokenizedDataset], write: Write) -> None:
    path = write([chat(), *(['{"messages": '] * 12), chat(), {"messages": [{"role": "human", "content": "x"}]}])
    with pytest.raises(DataError) as caught:
        tokenise(path)
    first, same, other, last = str(caught.value).splitlines()
    assert first == "13 of 15 rows cannot be used:"
    assert same.startswith(f"  {path}:2, {path}:3, {path}:4 and 9 more: not JSON")
    assert other.startswith(f"  {path}:15: unknown role")
    assert "data.on_bad_row: skip" in last


def test_ten_causes_are_listed_and_the_rest_counted(tokenise: Callable[..., TokenizedDataset], write: Write) -> None:
    path = write([{"messages": [{"role": f"r{number}", "content": "x"}]} for number in range(13)])
    with pytest.raises(DataError) as caught:
        tokenise(path)
    message = str(caught.value)
    assert message.count(f"{path}:") == 10
    assert "\n  and 3 more\n" in message
    assert "on_bad_row" not in message  # which would leave nothing to train


def test_empty_answers_are_counted_and_left_out_on_request(
    tokenise: Callable[..., TokenizedDataset], write: Write
) -> None:
    path = write([chat("hello", " \n"), chat()])
    kept, dropped = tokenise(path).statistics, tokenise(path, empty_answer="drop").statistics
    assert (kept.empty, kept.kept) == (1, 2)
    assert "2 kept, 1 of them with an empty answer" in str(kept)
    assert (dropped.empty, dropped.kept, dropped.dropped) == (0, 1, {"empty answer": 1})


def test_statistics_of_an_older_cache_are_read() -> None:
    former = {"read": 1, "kept": 1, "cut": 0, "dropped": {"x": 1}, "tokens": 2, "supervised_tokens": 1}
    assert Statistics(**former, unused={}, by_source=[1]).empty == 0


def test_skipped_rows_are_counted_and_change_no_other(
    tokenise: Callable[..., TokenizedDataset], write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    odd = {"messages": [{"role": "User", "content": None}]}
    surrogate = '{"prompt": "\\ud800", "completion": "x"}'
    mixed = write([CHATS[0], odd, CHATS[1], surrogate, CHATS[2]], "mixed.jsonl")
    prepared = tokenise(mixed, on_bad_row="skip")
    assert tokens(prepared) == tokens(tokenise(write(CHATS)))
    assert prepared.statistics.dropped == {"unknown role": 1, "lone surrogate": 1}
    assert f"{mixed}:2: unknown role" in caplog.text
    assert f"{mixed}:4: lone surrogate" in caplog.text


def test_a_line_that_is_not_utf8_is_named(tokenise: Callable[..., TokenizedDataset], tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(json.dumps(chat()).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"chats\.jsonl:2: not UTF-8"):
        tokenise(str(path))


def test_deep_nesting_is_a_bad_row_not_a_crash(tokenise: Callable[..., TokenizedDataset], write: Write) -> None:
    with pytest.raises(DataError, match=r":1: not JSON"):
        tokenise(write(['{"a": ' + "[" * 100_000]))


def test_rows_too_long_are_dropped_and_counted(tokenise: Callable[..., TokenizedDataset], write: Write) -> None:
    path = write([*[chat("a question " * 99, "ok")] * 4, chat()])
    prepared = tokenise(path, max_length=32)
    assert prepared.statistics.dropped == {"longer than max_length 32": 4}
    assert prepared.dropped_places() == {"longer than max_length 32": f"{path}:1, {path}:2, {path}:3 and 1 more"}
    assert prepared.statistics.kept == 1


def test_a_row_of_exactly_max_length_is_unchanged(tokenise: Callable[..., TokenizedDataset], write: Write) -> None:
    path = write([chat()])
    [ids] = tokens(tokenise(path))
    assert tokens(tokenise(path, max_length=len(ids))) == [ids]
    with pytest.raises(DataError, match="max_length"):
        tokenise(path, max_length=len(ids) - 1)


def test_the_cache_is_built_once_and_follows_content_and_options(
    tokenise: Callable[..., TokenizedDataset], write: Write, tmp_path: Path
) -> None:
    def built() -> int:
        return len(list((tmp_path / "cache1" / "phi3_lightning").iterdir()))

    path = write(CHATS)
    tokenise(path)
    tokenise(path)
    assert built() == 1
    tokenise(write(CHATS, "renamed.jsonl"))
    assert built() == 1
    write(CHATS[:2])
    assert tokenise(path).statistics.kept == 2
    tokenise(path, max_length=200)
    assert built() == 3


def test_others_can_read_a_shared_cache(
    tokenise: Callable[..., TokenizedDataset], write: Write, tmp_path: Path
) -> None:
    umask = os.umask(0o022)
    try:
        tokenise(write(CHATS))
    finally:
        os.umask(umask)
    [folder] = (tmp_path / "cache1/phi3_lightning").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}


def test_processes_that_start_together_share_one_cache(
    tokenise: Callable[..., TokenizedDataset], write: Write, tmp_path: Path
) -> None:
    path = write(CHATS * 50)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: tokens(tokenise(path)), range(4)))
    assert all(other == found[0] for other in found)
    assert len(list((tmp_path / "cache1" / "phi3_lightning").iterdir())) == 1


def file_in_the_way(tmp_path: Path) -> str:
    (tmp_path / "file").write_text("")
    return str(tmp_path / "file")


def below_a_file(tmp_path: Path) -> str:
    return file_in_the_way(tmp_path) + "/deeper"


def read_only(tmp_path: Path) -> str:
    return "/proc/cache"  # where not even root can make a folder


def too_long(tmp_path: Path) -> str:
    return str(tmp_path / ("x" * 300))


@pytest.mark.parametrize("place", [file_in_the_way, below_a_file, read_only, too_long])
@pytest.mark.parametrize("given", [True, False])
def test_a_cache_that_cannot_be_written_is_named(
    tokenizer: Any,
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: Callable[[Path], str],
    given: bool,
) -> None:
    import datasets

    cache = place(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    encoder = Encoder(ChatTemplate(tokenizer), RowOptions(max_length=256))
    with pytest.raises(ConfigError) as caught:
        prepare(find_sources(write(CHATS)), encoder, on_bad_row="raise", cache_dir=cache if given else None)
    assert str(caught.value).startswith("data.cache_dir: " + ("" if given else "not given, and ") + cache)
    assert "--data.cache_dir" in str(caught.value)


def test_a_disk_that_fills_up_leaves_nothing_behind(
    tokenise: Callable[..., TokenizedDataset], write: Write, tmp_path: Path
) -> None:
    """A file-size limit stands in for a full disk: the same call fails in the same way."""
    path = write([chat(f"question {index}", "the answer " * 20) for index in range(3000)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"data\.cache_dir: .*cannot be written"):
            tokenise(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "cache1/phi3_lightning").iterdir()) == []
    assert tokenise(path).statistics.kept == 3000


@pytest.mark.parametrize(
    ("name", "content"), [("data.arrow", b""), ("data.arrow", b"x" * 99), ("statistics.json", b"{")]
)
def test_a_cache_that_was_damaged_is_named(
    tokenise: Callable[..., TokenizedDataset], write: Write, tmp_path: Path, name: str, content: bytes
) -> None:
    path = write(CHATS)
    tokenise(path)
    [folder] = (tmp_path / "cache1/phi3_lightning").iterdir()
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match="delete this folder") as caught:
        tokenise(path)
    assert str(folder) in str(caught.value)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("rows", [3, 1500])
def test_several_processes_give_the_same_rows_in_the_same_order(
    tokenise: Callable[..., TokenizedDataset], write: Write, tmp_path: Path, rows: int
) -> None:
    path = write([chat(f"question {index}", "the answer " * (index % 7)) for index in range(rows)])
    alone = tokenise(path)  # this has also started the tokenizer's threads
    several = tokenise(path, num_proc=4)
    assert tokens(several) == tokens(alone)
    assert several.describe([rows - 1]) == [f"{path}:{rows}"]
    assert "TOKENIZERS_PARALLELISM" not in os.environ


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("\n  \n", "empty"),
        ("\ufeff\n", "empty"),
        ('[{"prompt": "a"', "not a JSON array"),
        ("PAR1x", "Parquet"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    tokenise: Callable[..., TokenizedDataset], tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "chats.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        tokenise(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/file", "missing.parquet"])
def test_a_missing_file_is_named(name: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        find_sources(name)


def test_a_hub_set_is_read_by_datasets(
    tokenise: Callable[..., TokenizedDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    requests = []

    def load_dataset(name: str, configuration: None, *, split: str, **options: Any) -> datasets.Dataset:
        requests.append((name, split))
        return datasets.Dataset.from_list(CHATS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepared = tokenise("someone/chats:train_sft")
    assert set(requests) == {("someone/chats", "train_sft")}
    assert prepared.describe([1]) == ["someone/chats:train_sft row 2"]
    assert prepared.statistics.kept == 3


def test_a_hub_set_that_is_not_there_is_named(
    tokenise: Callable[..., TokenizedDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def load_dataset(name: str, *args: Any, **options: Any) -> datasets.Dataset:
        raise datasets.exceptions.DatasetNotFoundError(name)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="neither a file nor a data set"):
        tokenise("someone/chats")
