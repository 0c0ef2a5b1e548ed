"""Folders and patterns: only the files of a split, no hidden ones, and every file left out is listed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.data_files import DataFilesDict, get_data_patterns

from phi3_lightning.config.data import Split
from phi3_lightning.data.sources import select_sources
from phi3_lightning.errors import DataError

CASES = Path(__file__).parents[1] / "cases"
ROW = '{"prompt": "a", "completion": "b"}\n'
ROWS = [{"prompt": "a", "completion": "b"}] * 5
README = """---
configs:
- config_name: {first}
  data_files:
  - split: train
    path: en/fit-*
  - split: test
    path: [en/held.jsonl]
{more}---
# Chats
"""

Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    def tree(*names: str, readme: str = "") -> Path:
        folder = tmp_path / "chats"
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(ROW)
        if readme:
            (folder / "README.md").write_text(readme)
        return folder

    return tree


def files_of(given: Path | str, split: Split = "train") -> list[str]:
    folder = str(given).partition("*")[0].rstrip("/")
    return [source.name().removeprefix(f"{folder}/") for source in select_sources(str(given), split).sources]


SPLIT_TREES: list[tuple[list[str], dict[Split, list[str]]]] = [
    (["train.jsonl", "test.jsonl"], {"train": ["train.jsonl"], "test": ["test.jsonl"]}),
    (["Train.csv", "VALID.csv"], {"train": ["Train.csv"], "val": ["VALID.csv"]}),
    (
        ["chats-train-1.jsonl.gz", "chats-train-2.jsonl.gz", "chats_dev.jsonl.gz", "my eval.jsonl"],
        {
            "train": ["chats-train-1.jsonl.gz", "chats-train-2.jsonl.gz"],
            "val": ["chats_dev.jsonl.gz"],
            "test": ["my eval.jsonl"],
        },
    ),
    (
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
        {
            "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            "test": ["data/test-00000-of-00001.parquet"],
        },
    ),
    (["training/a.csv", "validation/a.csv"], {"train": ["training/a.csv"], "val": ["validation/a.csv"]}),
    (["train/test_of_wits.jsonl", "test/a.jsonl"], {"train": ["train/test_of_wits.jsonl"], "test": ["test/a.jsonl"]}),
    (["en/train.jsonl", "de/train.jsonl", "de/test.jsonl"], {"train": ["de/train.jsonl", "en/train.jsonl"]}),
    (
        ["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"],
        {"train": ["data/train_sft-00000-of-00001.parquet"], "test": ["data/test_sft-00000-of-00001.parquet"]},
    ),
    (["train.jsonl", "test.jsonl", "notes.jsonl"], {"train": ["train.jsonl"]}),
]


@pytest.mark.parametrize(("names", "expected"), SPLIT_TREES)
def test_an_option_takes_the_files_of_its_split(tree: Tree, names: list[str], expected: dict[Split, list[str]]) -> None:
    folder = tree(*names)
    for split, files in expected.items():
        assert files_of(folder, split) == files
        assert files_of(f"{folder}/**/*", split) == files
        assert set(select_sources(str(folder), split).left_out) == set(names) - set(files)


@pytest.mark.parametrize("names", [names for names, _ in SPLIT_TREES[:5] if names[0][0].islower()])
def test_splits_are_those_that_datasets_sees(tree: Tree, names: list[str]) -> None:
    folder = tree(*names)
    seen = DataFilesDict.from_patterns(get_data_patterns(str(folder)), str(folder))
    assert len(seen) > 1
    for split, files in seen.items():
        option: Any = {"train": "train", "validation": "val", "test": "test"}[str(split)]
        assert {str(folder / name) for name in files_of(folder, option)} == set(files)


@pytest.mark.parametrize("names", [["a.jsonl", "b.csv"], ["2024-train_test.jsonl", "contest.jsonl", "latest.jsonl"],
                                   ["chats-00000-of-00002.parquet", "chats-00001-of-00002.parquet"]])  # fmt: skip
def test_all_files_are_taken_where_no_name_says_a_split(tree: Tree, names: list[str]) -> None:
    for split in ("train", "val", "test", "predict"):
        assert files_of(tree(*names), split) == names  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["train.jsonl", "test.jsonl"], "val"),
        (["test.jsonl", "eval/a.jsonl"], "train"),
        (["chats.jsonl", "test.jsonl"], "train"),
        (["train.jsonl", "test.jsonl"], "predict"),
        (["chats.jsonl", "test.jsonl"], "predict"),
        (["train_sft-00000-of-00001.parquet", "train_gen-00000-of-00001.parquet"], "train"),
    ],
)
def test_files_are_listed_where_their_split_is_ambiguous(tree: Tree, names: list[str], split: Split) -> None:
    folder = tree(*names)
    for given in (folder, f"{folder}/**/*"):
        with pytest.raises(DataError, match=f"no single split in it is for data.{split}") as caught:
            select_sources(str(given), split)
        assert all(name in str(caught.value) for name in names)
        assert "Name the file, folder or pattern to take" in str(caught.value)


def test_a_file_given_by_name_is_taken_whatever_its_split(tree: Tree) -> None:
    folder = tree("data/train-a.jsonl", "data/test-a.jsonl", "data/test-b.jsonl")
    assert [source.name() for source in select_sources(f"{folder}/data/test-*").sources] == [
        f"{folder}/data/test-a.jsonl", f"{folder}/data/test-b.jsonl"
    ]  # fmt: skip
    assert len(select_sources(str(folder / "data/test-a.jsonl")).sources) == 1


def test_the_given_folders_own_name_is_no_split(tree: Tree) -> None:
    folder = tree("train/train.jsonl", "train/test.jsonl") / "train"
    assert files_of(folder) == ["train.jsonl"]
    assert files_of(f"{folder}/*.jsonl") == ["train.jsonl"]


@pytest.mark.parametrize(
    "hidden",
    [
        ".ipynb_checkpoints/a-checkpoint.jsonl", "__MACOSX/a.jsonl", "__MACOSX/._a.jsonl", "._a.jsonl",
        ".cache/h/a.jsonl", ".git/a.json", "_delta_log/00000.json", "deep/.hidden/a.csv", "_old.jsonl",
        ".a.jsonl.swp.json",
    ],
)  # fmt: skip
def test_hidden_files_are_left_out_and_listed(tree: Tree, hidden: str) -> None:
    folder = tree("a.jsonl", "deep/b.jsonl", hidden)
    assert files_of(folder) == ["a.jsonl", "deep/b.jsonl"]
    assert files_of(f"{folder}/**/*.json*") == ["a.jsonl", "deep/b.jsonl"]
    [left_out] = select_sources(str(folder)).left_out
    assert f"{hidden}/".startswith(left_out.rstrip("/") + "/")
    assert [source.name() for source in select_sources(str(folder / hidden)).sources] == [str(folder / hidden)]


def test_a_hidden_folder_or_pattern_that_is_named_is_read(tree: Tree) -> None:
    folder = tree(".kept/a.jsonl", "__b/c.jsonl", "_d.jsonl")
    assert files_of(folder / ".kept") == ["a.jsonl"]
    for pattern, file in ((".kept/*", ".kept/a.jsonl"), ("__*/*", "__b/c.jsonl"), ("_*.jsonl", "_d.jsonl")):
        assert [source.name() for source in select_sources(f"{folder}/{pattern}").sources] == [f"{folder}/{file}"]
    with pytest.raises(DataError, match=r"no data files in it.*Left out: .*_d\.jsonl"):
        select_sources(str(folder))


def test_the_reported_folders_give_their_training_files(tmp_path: Path) -> None:
    assert files_of(CASES / "f03.d") == ["train.jsonl"]
    folder = tmp_path / "f04.e"
    shutil.copytree(CASES / "f04.e", folder)
    (folder / ".ipynb_checkpoints").mkdir(exist_ok=True)
    shutil.copy(folder / "a.jsonl", folder / ".ipynb_checkpoints/a-checkpoint.jsonl")
    assert files_of(folder) == ["a.jsonl"]
    assert select_sources(str(folder)).left_out == [".ipynb_checkpoints/"]


def test_files_other_than_data_are_listed_as_left_out(tree: Tree) -> None:
    folder = tree("a.jsonl", "notes.txt", "dataset_info.json", "old.jsonl.bak")
    assert files_of(folder) == ["a.jsonl"]
    assert select_sources(str(folder)).left_out == ["dataset_info.json", "notes.txt", "old.jsonl.bak"]


def test_symbolic_links_are_followed_once(tree: Tree) -> None:
    folder = tree("2024.jsonl", "deep/b.jsonl")
    (folder / "latest.jsonl").symlink_to(folder / "2024.jsonl")
    (folder / "deep/round").symlink_to(folder)
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere/c.jsonl").write_text(ROW)
    (folder / "linked").symlink_to(folder.parent / "elsewhere")
    assert files_of(folder) == ["2024.jsonl", "deep/b.jsonl", "linked/c.jsonl"]
    assert "latest.jsonl" in select_sources(str(folder)).left_out


def test_a_saved_dataset_dict_has_its_splits_and_no_caches_of_map(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).train_test_split(0.4, shuffle=False).save_to_disk(folder)
    datasets.load_from_disk(str(folder / "train")).map(lambda row: {"prompt": "other"})
    assert list((folder / "train").glob("cache-*.arrow"))
    for given in (folder, f"{folder}/*/*.arrow"):
        assert [source.name() for source in select_sources(str(given)).sources] == [
            f"{folder}/train/data-00000-of-00001.arrow"
        ]
    assert files_of(folder / "train") == ["data-00000-of-00001.arrow"]
    assert files_of(folder, "test") == ["test/data-00000-of-00001.arrow"]
    with pytest.raises(DataError, match=r"no single split in it is for data\.val: train: .*; test: "):
        select_sources(str(folder), "val")


def test_splits_of_a_saved_dict_may_have_any_name(tmp_path: Path) -> None:
    parts = {"sft": datasets.Dataset.from_list(ROWS), "rl": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"sft: sft/data-.*; rl: rl/data-"):
        select_sources(str(tmp_path / "saved"))
    assert files_of(tmp_path / "saved/sft") == ["data-00000-of-00001.arrow"]


def test_a_cloned_hub_set_has_the_splits_of_its_readme(tree: Tree) -> None:
    names = ("en/fit-0.jsonl", "en/fit-1.jsonl", "en/held.jsonl", "train.jsonl", "de/fit-0.jsonl")
    folder = tree(*names, readme=README.format(first="en", more=""))
    assert files_of(folder) == ["en/fit-0.jsonl", "en/fit-1.jsonl"]
    assert files_of(folder, "test") == ["en/held.jsonl"]
    second = "- config_name: de\n  data_files: de/*\n"
    (folder / "README.md").write_text(README.format(first="en", more=second))
    with pytest.raises(DataError, match=r"configurations en, de, and none is the default.*en/fit-0\.jsonl"):
        select_sources(str(folder))
    (folder / "README.md").write_text(README.format(first="en", more=second + "  default: true\n"))
    assert files_of(folder) == ["de/fit-0.jsonl"]
    (folder / "README.md").write_text(README.format(first="default", more=second))
    assert files_of(folder) == ["en/fit-0.jsonl", "en/fit-1.jsonl"]
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: en\n  data_dir: en\n---\n")
    assert files_of(folder) == ["en/fit-0.jsonl", "en/fit-1.jsonl", "en/held.jsonl"]


@pytest.mark.parametrize(
    "readme", ["# Notes", "---\nconfigs: [\n---\n", "---\nconfigs: 5\n---\n", "---\n[1, 2]\n---\n"]
)
def test_a_readme_without_data_files_is_ignored(tree: Tree, readme: str) -> None:
    assert files_of(tree("a.jsonl", readme=readme)) == ["a.jsonl"]
