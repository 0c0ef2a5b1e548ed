"""Which files of a folder or a pattern an option takes: those of its split, and none that is hidden."""

import glob
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

import yaml
from huggingface_hub import metadata_load

from phi3_lightning.config.data import Split
from phi3_lightning.data.readers import SUFFIXES, data_suffix
from phi3_lightning.errors import DataError

_SPLITS: Final = {"train": "train", "val": "validation", "test": "test"}
"""What ``datasets`` calls the split of each option; ``predict`` has none of its own."""
_SHARD = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}")
_LISTED = 12  # files that an error lists

Splits = dict[str | None, list[str]]
"""Files by the split that they are of, relative to their folder; None: no name says one."""


class Selection(NamedTuple):
    """The files of a folder or a pattern.

    Args:
        taken: Those that are read, by name.
        left_out: Names of the others; a hidden folder is one name.
    """

    taken: list[Path]
    left_out: list[str]


def select_in_folder(given: str, split: Split) -> Selection:
    """Choose the files of a folder that an option takes.

    Splits are those that ``datasets`` sees: of a set that it saved, of a hub set's README, or by the names of files and
    folders (``train.jsonl``, ``data/test-00000-of-00001.parquet``, ``dev/a.csv``).

    Args:
        given: The folder, as the user wrote it.
        split: Which option it was given to.

    Returns:
        The files of that split; all of them where no name says a split.

    Raises:
        DataError: There are no data files, or no single split of them is the option's.
    """
    folder = Path(given).expanduser()
    found, other = _walk(folder)
    if not found:
        raise _nothing_in(given, other)
    splits = _saved_splits(folder, found) or _described_splits(given, folder, found) or _named_splits(found)
    return _choose(given, folder, splits, split, found, other)


def select_by_pattern(given: str, split: Split) -> Selection:
    """Choose the files of a pattern that an option takes.

    Args:
        given: The pattern, as the user wrote it. Where it spells a split, as ``data/train-*`` does, it is followed.
        split: Which option it was given to.

    Returns:
        Its files of that split; all of them where no name says a split.

    Raises:
        DataError: There are no data files, or no single split of them is the option's.
    """
    pattern = os.path.expanduser(given)  # noqa: PTH111, a pattern is no path
    parts = Path(pattern).parts
    fixed = next(at for at, part in enumerate(parts) if glob.has_magic(part))
    folder, rest = Path(*parts[:fixed]), str(Path(*parts[fixed:]))
    files = sorted(name for name in _glob(rest, folder) if (folder / name).is_file())
    found = [name for name in files if _hidden(name) == _hidden(rest) and _is_data(folder / name)]
    other = [name for name in files if name not in set(found)]
    if not found:
        raise _nothing_in(given, other)
    splits: Splits = {None: found} if _split_of(Path(rest).as_posix()) else _named_splits(found)
    return _choose(given, folder, splits, split, found, other)


def _walk(folder: Path) -> tuple[list[str], list[str]]:
    """Data files below a folder, and what else is there; links are followed, and no folder twice."""
    found: list[str] = []
    other: list[str] = []
    seen = {os.path.realpath(folder)}
    for root, folders, files in os.walk(folder, followlinks=True):
        here = Path(root)
        hidden = [name for name in folders if _hidden(name) or os.path.realpath(here / name) in seen]
        folders[:] = sorted(set(folders) - set(hidden))
        seen |= {os.path.realpath(here / name) for name in folders}
        for name in files:
            kind = found if not _hidden(name) and _is_data(here / name) else other
            kind.append((here / name).relative_to(folder).as_posix())
        other += [f"{(here / name).relative_to(folder).as_posix()}/" for name in hidden]
    return sorted(found, key=PurePosixPath), sorted(other)


def _hidden(name: str) -> int:
    """Parts of a relative path that Jupyter, git, macOS, Spark and others keep for themselves."""
    return sum(part.startswith((".", "_")) for part in PurePosixPath(name).parts)


def _is_data(path: Path) -> bool:
    from datasets.data_files import FILES_TO_IGNORE  # importing it takes half a second

    if data_suffix(path) not in SUFFIXES or path.name in FILES_TO_IGNORE:
        return False
    saved = _read_json(path.with_name("state.json")).get("_data_files")  # beside it may lie caches of `map`
    return not isinstance(saved, list) or path.name in {entry["filename"] for entry in saved}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _saved_splits(folder: Path, found: list[str]) -> Splits:
    """The splits of a ``DatasetDict`` that was saved to disk."""
    names = _read_json(folder / "dataset_dict.json").get("splits", [])
    return {name: files for name in names if (files := [file for file in found if file.startswith(f"{name}/")])}


def _described_splits(given: str, folder: Path, found: list[str]) -> Splits:
    """The splits that the README of a hub set describes, of its one or its default configuration."""
    configurations = _configurations(folder / "README.md")
    if not configurations:
        return {}
    default = [each for each in configurations if each.get("default") or each.get("config_name") == "default"]
    chosen = configurations if len(configurations) == 1 else default
    if len(chosen) != 1:
        names = ", ".join(str(each.get("config_name")) for each in configurations)
        raise DataError(
            f"{given}: its README.md describes the configurations {names}, and none is the default. Name the folder, "
            f"files or pattern of one; here are {_listing(found)}."
        )
    files = chosen[0].get("data_files")
    if files is None:
        return _named_splits(_matched(folder, f"{chosen[0]['data_dir']}/**", found))
    named = isinstance(files, list) and all(isinstance(entry, dict) for entry in files)
    entries = {entry["split"]: entry["path"] for entry in files} if named else {None: files}
    return {split: matched for split, patterns in entries.items() if (matched := _matched(folder, patterns, found))}


def _configurations(readme: Path) -> list[dict[str, Any]]:
    try:
        described = (metadata_load(readme) or {}).get("configs") if readme.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):  # any README: it describes nothing
        return []
    entries = described if isinstance(described, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and entry.keys() & {"data_files", "data_dir"}]


def _matched(folder: Path, patterns: str | list[str], found: list[str]) -> list[str]:
    each = [patterns] if isinstance(patterns, str) else patterns
    names = {name for pattern in each for name in _glob(pattern, folder)}
    return [name for name in found if name in names]


def _glob(pattern: str, folder: Path) -> set[str]:
    names = glob.glob(pattern, root_dir=folder, recursive=True)  # noqa: PTH207, Path.glob knows no `**` for files
    return {Path(name).as_posix() for name in names}


def _named_splits(found: list[str]) -> Splits:
    splits: Splits = {}
    for name in found:
        splits.setdefault(_split_of(name), []).append(name)
    return splits


def _split_of(name: str) -> str | None:
    """The split that a path says: by a shard's name, the folder of the file, those above it, or the file's name."""
    *folders, file = PurePosixPath(name).parts
    shard = _SHARD.match(file)
    if shard is not None and _keyword(shard["split"]):
        return shard["split"]  # `train_sft` and `train_gen` are two
    return next((split for part in [*reversed(folders), file] if (split := _keyword(part))), None)


def _keyword(text: str) -> str | None:
    """The split of which alone a name holds a word, by the words of ``datasets``."""
    from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS

    words = set(re.split(f"[{NON_WORDS_CHARS}]", text.lower()))
    splits = [str(split) for split, keywords in SPLIT_KEYWORDS.items() if words & set(keywords)]
    return splits[0] if len(splits) == 1 else None


def _choose(given: str, folder: Path, splits: Splits, split: Split, found: list[str], other: list[str]) -> Selection:
    fitting = _fitting(splits, split)
    if len(fitting) != 1:
        kinds = "; ".join(f"{name or 'no split in the name'}: {_listing(files)}" for name, files in splits.items())
        raise DataError(
            f"{given}: no single split in it is for data.{split}: {kinds}. "
            f"Name the file, folder or pattern to take, such as data.{split}: {folder / found[0]}"
        )
    names = splits[fitting[0]]
    taken = sorted({os.path.realpath(folder / name): name for name in reversed(names)}.values(), key=PurePosixPath)
    return Selection([folder / name for name in taken], [name for name in found if name not in set(taken)] + other)


def _fitting(splits: Splits, split: Split) -> list[str | None]:
    """The splits that may be meant; one is needed."""
    wanted = _SPLITS.get(split)
    if split == "predict":
        return list(splits)
    if len(splits) == 1:
        return [name for name in splits if name is None or _keyword(name) in {None, wanted}]
    exact: list[str | None] = [name for name in splits if name == wanted]  # `train` beside `train_extra`
    return exact or [name for name in splits if name is not None and _keyword(name) == wanted]


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _nothing_in(given: str, other: Iterable[str]) -> DataError:
    left_out = f" Left out: {_listing(list(other))}; name a file to take it." if other else ""
    return DataError(
        f"{given}: no data files in it; known are {', '.join(sorted(SUFFIXES))}, and these with .gz.{left_out}"
    )
