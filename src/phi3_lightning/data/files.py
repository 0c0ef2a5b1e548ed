"""Selects the files of a folder or a pattern for an option: those of its split, without hidden ones."""

import glob
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

import yaml
from huggingface_hub import metadata_load

from phi3_lightning.config.data import Split
from phi3_lightning.data.readers import SUFFIXES, data_suffix
from phi3_lightning.errors import DataError

_SPLITS: Final = {"train": "train", "val": "validation", "test": "test"}
"""The name of each option's split in ``datasets``; ``predict`` has no split of its own."""
_SHARD = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}")

Splits = dict[str | None, list[str]]
"""Files by their split, relative to their folder; None: files whose names have no split."""


class Selection(NamedTuple):
    """The files of a folder or a pattern."""

    files: list[Path]
    """Files to read, in order of their names."""
    left_out: list[str]
    """Names of the others; a hidden folder is one name."""


def select_in_folder(text: str, split: Split) -> Selection:
    """Choose the files of a folder for an option; all of them where no name has a split.

    Splits are those that ``datasets`` sees: of a set that it saved, of a hub set's README, or by the names of files and
    folders (``train.jsonl``, ``data/test-00000-of-00001.parquet``, ``dev/a.csv``).

    Raises:
        DataError: If there are no data files, or no single split of them is the option's.
    """
    folder = Path(text).expanduser()
    data, other = _walk(folder)
    if not data:
        raise _nothing_in(text, other)
    splits = _saved_splits(folder, data) or _described_splits(text, folder, data) or _named_splits(data)
    return _choose(text, folder, splits, split, data, other)


def select_by_pattern(text: str, split: Split) -> Selection:
    """Choose the files of a pattern for an option; all of them where no name has a split.

    A pattern that names a split, as ``data/train-*`` does, is followed whatever the split of the option.

    Raises:
        DataError: If there are no data files, or no single split of them is the option's.
    """
    pattern = os.path.expanduser(text)  # noqa: PTH111, a pattern is no path
    parts = Path(pattern).parts
    first_magic = next(at for at, part in enumerate(parts) if glob.has_magic(part))
    folder, rest = Path(*parts[:first_magic]), str(Path(*parts[first_magic:]))
    files = sorted(name for name in _glob(rest, folder) if (folder / name).is_file())
    data = [name for name in files if _hidden(name) == _hidden(rest) and _is_data(folder / name)]
    other = [name for name in files if name not in set(data)]
    if not data:
        raise _nothing_in(text, other)
    splits: Splits = {None: data} if _split_of(Path(rest).as_posix()) else _named_splits(data)
    return _choose(text, folder, splits, split, data, other)


def _walk(folder: Path) -> tuple[list[str], list[str]]:
    """Return the data files below a folder, and the others; links are followed, but no folder twice."""
    data: list[str] = []
    other: list[str] = []
    seen = {os.path.realpath(folder)}
    for root, folders, files in os.walk(folder, followlinks=True):
        here = Path(root)
        hidden = [name for name in folders if _hidden(name) or os.path.realpath(here / name) in seen]
        folders[:] = sorted(set(folders) - set(hidden))
        seen |= {os.path.realpath(here / name) for name in folders}
        for name in files:
            kind = data if not _hidden(name) and _is_data(here / name) else other
            kind.append((here / name).relative_to(folder).as_posix())
        other += [f"{(here / name).relative_to(folder).as_posix()}/" for name in hidden]
    return sorted(data, key=PurePosixPath), sorted(other)


def _hidden(name: str) -> int:
    """Count the parts of a relative path that Jupyter, git, macOS, Spark and others keep for themselves."""
    return sum(part.startswith((".", "_")) for part in PurePosixPath(name).parts)


def _is_data(path: Path) -> bool:
    from datasets.data_files import FILES_TO_IGNORE  # importing it takes half a second

    if data_suffix(path) not in SUFFIXES or path.name in FILES_TO_IGNORE:
        return False
    entries = _read_json(path.with_name("state.json")).get("_data_files")  # caches of `map` may lie beside them
    return not isinstance(entries, list) or path.name in {entry["filename"] for entry in entries}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _saved_splits(folder: Path, data: list[str]) -> Splits:
    """Return the splits of a ``DatasetDict`` that was saved to disk."""
    names = _read_json(folder / "dataset_dict.json").get("splits", [])
    return {name: files for name in names if (files := [file for file in data if file.startswith(f"{name}/")])}


def _described_splits(text: str, folder: Path, data: list[str]) -> Splits:
    """Return the splits that the README of a hub set describes for its only or its default configuration."""
    configurations = _configurations(folder / "README.md")
    if not configurations:
        return {}
    default = [each for each in configurations if each.get("default") or each.get("config_name") == "default"]
    candidates = configurations if len(configurations) == 1 else default
    if len(candidates) != 1:
        names = ", ".join(str(each.get("config_name")) for each in configurations)
        raise DataError(
            f"{text}: its README.md describes the configurations {names}, and none is the default; name the folder, "
            f"files or pattern of one; here are {listing(data)}"
        )
    files = candidates[0].get("data_files")
    if files is None:
        return _named_splits(_matching(folder, f"{candidates[0]['data_dir']}/**", data))
    has_splits = isinstance(files, list) and all(isinstance(entry, dict) for entry in files)
    patterns = {entry["split"]: entry["path"] for entry in files} if has_splits else {None: files}
    return {split: files for split, each in patterns.items() if (files := _matching(folder, each, data))}


def _configurations(readme: Path) -> list[dict[str, Any]]:
    try:
        configurations = (metadata_load(readme) or {}).get("configs") if readme.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):  # a README without such a description
        return []
    entries = configurations if isinstance(configurations, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and entry.keys() & {"data_files", "data_dir"}]


def _matching(folder: Path, patterns: str | list[str], data: list[str]) -> list[str]:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    names = {name for pattern in patterns for name in _glob(pattern, folder)}
    return [name for name in data if name in names]


def _glob(pattern: str, folder: Path) -> set[str]:
    names = glob.glob(pattern, root_dir=folder, recursive=True)  # noqa: PTH207, Path.glob has no `**` for files
    return {Path(name).as_posix() for name in names}


def _named_splits(data: list[str]) -> Splits:
    splits: Splits = {}
    for name in data:
        splits.setdefault(_split_of(name), []).append(name)
    return splits


def _split_of(name: str) -> str | None:
    """Return the split that a path names: by a shard's name, the file's folder, those above it, or its name."""
    *folders, file = PurePosixPath(name).parts
    shard = _SHARD.match(file)
    if shard is not None and _keyword(shard["split"]):
        return shard["split"]  # `train_sft` and `train_gen` are two
    return next((split for part in [*reversed(folders), file] if (split := _keyword(part))), None)


def _keyword(text: str) -> str | None:
    """Return the one split of which a name holds a keyword of ``datasets``; None if there are none or several."""
    from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS

    words = set(re.split(f"[{NON_WORDS_CHARS}]", text.lower()))
    splits = [str(split) for split, keywords in SPLIT_KEYWORDS.items() if words & set(keywords)]
    return splits[0] if len(splits) == 1 else None


def _choose(text: str, folder: Path, splits: Splits, split: Split, data: list[str], other: list[str]) -> Selection:
    fitting = _fitting(splits, split)
    if len(fitting) != 1:
        kinds = "; ".join(f"{name or 'no split in the name'}: {listing(names)}" for name, names in splits.items())
        raise DataError(
            f"{text}: no single split in it is for data.{split}: {kinds}. "
            f"Name the file, folder or pattern to take, such as data.{split}: {folder / data[0]}"
        )
    names = splits[fitting[0]]
    files = sorted({os.path.realpath(folder / name): name for name in reversed(names)}.values(), key=PurePosixPath)
    return Selection([folder / name for name in files], [name for name in data if name not in set(files)] + other)


def _fitting(splits: Splits, split: Split) -> list[str | None]:
    """Return the splits that the option may mean; its files are certain where there is one."""
    if split == "predict":
        return list(splits)
    own = _SPLITS[split]
    if len(splits) == 1:
        return [name for name in splits if name is None or _keyword(name) in {None, own}]
    exact: list[str | None] = [name for name in splits if name == own]  # `train` beside `train_extra`
    return exact or [name for name in splits if name is not None and _keyword(name) == own]


def listing(names: list[str], most: int = 12) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _nothing_in(text: str, other: list[str]) -> DataError:
    left_out = f". Left out: {listing(other)}; name a file to take it" if other else ""
    return DataError(
        f"{text}: no data files in it; known are {', '.join(sorted(SUFFIXES))}, and these with .gz{left_out}"
    )
