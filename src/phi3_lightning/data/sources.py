"""Where rows come from: files, folders and hub data sets."""

import hashlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from phi3_lightning.config.data import Split
from phi3_lightning.data.arrow import plain_rows
from phi3_lightning.data.decoding import BOM
from phi3_lightning.data.files import Selection, select_by_pattern, select_in_folder
from phi3_lightning.data.readers import SUFFIXES, Row, data_suffix, kind_of_file, open_file, read_rows
from phi3_lightning.errors import DataError
from phi3_lightning.files import local_path, remedy

if TYPE_CHECKING:  # importing it takes half a second, for which `--help` need not wait
    import datasets

_SLICE = r"\[-?\d*%?:-?\d*%?\]"
_HUB = re.compile(rf"(?P<name>[\w-][\w.-]*(/[\w.-]+)?)(:(?P<split>[^:/*?\[]+({_SLICE})?))?")
_FINER = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(/(?P<configuration>[\w.-]+))?(@(?P<revision>[\w./-]+))?(:[^/]+)?")
_HUB_SPLITS: Final[dict[Split, str]] = {"train": "train", "val": "validation", "test": "test", "predict": "train"}
"""The split of a hub set where none is named; a set without splits has all of its rows in ``train``."""


@dataclass(frozen=True)
class FileSource:
    """A file of rows: JSON lines, one JSON array, CSV, Parquet or Arrow, packed with gzip or not."""

    path: Path
    item: int = 0
    """The index of the user's entry that it belongs to."""

    def check(self) -> None:
        """Check quickly whether the file can be read at all.

        Raises:
            DataError: If it is missing, empty, or not readable.
        """
        if not self.path.exists():
            raise DataError(f"{self.path}: no such file; give a path, or a data set on the hub as 'owner/name:split'")
        try:
            with open_file(self.path) as file:
                if not file.read(4).removeprefix(BOM).strip() and not file.read().strip():
                    raise DataError(f"{self.path}: the file is empty; write one chat per line into it")
            kind_of_file(self.path)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self.path}: cannot be read ({error}); check it and its permissions") from error

    def fingerprint(self) -> str:
        """Return a hash of the file's content, with its place among the user's data."""
        with self.path.open("rb") as file:
            return f"{self.item}:{data_suffix(self.path)}:{hashlib.file_digest(file, 'blake2b').hexdigest()}"

    def name(self) -> str:
        """Return the path, as the user calls the file."""
        return str(self.path)

    def place(self, row: int) -> str:
        """Return ``path:line`` for a row, or the row's number in files without lines."""
        return f"{self.path}:{row}" if kind_of_file(self.path) == "lines" else f"{self.path} row {row}"

    def rows(self) -> Iterator[Row]:
        """Read the file from its beginning; lines are bytes, for ``decode_line``."""
        return read_rows(self.path)


@dataclass(frozen=True)
class HubSource:
    """A split of a data set on the Hugging Face hub."""

    id: str
    """Its name on the hub, ``owner/name``."""
    split: str
    item: int = 0
    """The index of the user's entry that it is."""
    streaming: bool = False
    """Whether rows are fetched as they are read, instead of downloaded first."""

    def fingerprint(self) -> str:
        """Return the hash that ``datasets`` has of the set's content, with its place among the user's data."""
        return f"{self.item}:{self.name()}:{self._load()._fingerprint}"

    def name(self) -> str:
        """Return id and split, as the user calls the set."""
        return f"{self.id}:{self.split}"

    def place(self, row: int) -> str:
        """Return the set's name and a row's number."""
        return f"{self.name()} row {row}"

    def rows(self) -> Iterator[Row]:
        """Read the split from its beginning."""
        tables = self._load().with_format("arrow").iter(batch_size=1024)
        return enumerate(plain_rows(batch for table in tables for batch in table.to_batches()), start=1)

    def _load(self) -> "datasets.Dataset | datasets.IterableDataset":
        import datasets

        try:
            return datasets.load_dataset(self.id, split=self.split, streaming=self.streaming)
        except Exception as error:  # load_dataset passes on whatever its many back ends raise
            why, cure = " ".join(str(error).split()), f"Check the spelling, or name the split: '{self.id}:SPLIT'"
            if remedy(error) is not None:
                raise DataError(
                    f"{self.id}: cannot be stored ({why}); set HF_HOME to a folder that can be written and has room"
                ) from error
            if "config" in why.lower():  # with the names that the hub offers
                cure = _save_first(self.id, "CONFIGURATION")
            raise DataError(
                f"{self.id}: neither a file nor a data set with a split {self.split!r} that can be loaded from the "
                f"hub ({why}). {cure}"
            ) from error


Source = FileSource | HubSource


class Sources(NamedTuple):
    """What a user's data are read from."""

    sources: list[Source]
    """Files and hub data sets, in order."""
    left_out: list[str]
    """Names of what else is in the folders and patterns."""


def select_sources(files: str | list[str], split: Split = "train", *, streaming: bool = False) -> Sources:
    """Find the sources of a user's data, in the user's order, files of a folder or a pattern by name.

    Args:
        files: A file, a folder, a glob pattern, a hub id (``owner/name``, ``owner/name:split`` or, with a part of a
            split, ``owner/name:train[:100]``), or several of them.
        split: The split of the option: folders, patterns and hub ids may hold several.
        streaming: Whether rows of hub data sets are fetched as they are read.

    Raises:
        DataError: If a path leads nowhere, a file cannot be read, or it is not clear which files are meant.
    """
    items = [files] if isinstance(files, str) else files
    selections = [_select(item, split, index, streaming) for index, item in enumerate(items)]
    sources = [source for selection in selections for source in selection.sources]
    for source in sources:
        if isinstance(source, FileSource):  # a hub data set is looked for when it is read
            source.check()
    return Sources(sources, [name for selection in selections for name in selection.left_out])


def find_sources(files: str | list[str], split: Split = "train", *, streaming: bool = False) -> list[Source]:
    """Return the sources of :func:`select_sources` alone."""
    return select_sources(files, split, streaming=streaming).sources


def _select(text: str, split: Split, item: int, streaming: bool) -> Sources:
    path = local_path(f"data.{split}", text)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # no permission, or a byte that no name has
        raise DataError(f"{text}: cannot be looked up ({error}); check the path and its permissions") from error
    hub, finer = _HUB.fullmatch(text), _FINER.fullmatch(text)
    if is_folder:
        return _files(select_in_folder(text, split), item)
    if exists or (hub and data_suffix(path) in SUFFIXES):
        return Sources([FileSource(path, item)], [])
    if hub is not None:
        return Sources([HubSource(hub["name"], hub["split"] or _HUB_SPLITS[split], item, streaming)], [])
    if finer is not None and data_suffix(path) not in SUFFIXES:
        raise DataError(
            f"{text}: no such file or folder. If it is a configuration or a revision of a data set on the hub: "
            f"neither can be named here. {_save_first(finer['name'], finer['configuration'], finer['revision'])}"
        )
    if has_magic(text):
        return _files(select_by_pattern(text, split), item)
    return Sources([FileSource(path, item)], [])


def _files(selection: Selection, item: int) -> Sources:
    return Sources([FileSource(path, item) for path in selection.files], selection.left_out)


def _save_first(name: str, configuration: str | None, revision: str | None = None) -> str:
    """Return the advice on how a configuration or a revision becomes a file."""
    arguments = [repr(name), *([repr(configuration)] if configuration else []), "split='train'"]
    arguments += [f"revision={revision!r}"] if revision else []
    code = f"from datasets import load_dataset; load_dataset({', '.join(arguments)}).to_parquet('train.parquet')"
    return f'Save it first, and give that file: python -c "{code}"'
