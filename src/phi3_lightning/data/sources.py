"""Where rows come from: files, folders and hub data sets."""

import glob
import hashlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_lightning.data.readers import BOM, SUFFIXES, Row, data_suffix, kind_of_file, open_file, read_rows
from phi3_lightning.errors import DataError

if TYPE_CHECKING:  # importing it takes half a second, for which `--help` need not wait
    import datasets

_SLICE = r"\[-?\d*%?:-?\d*%?\]"
_HUB = re.compile(rf"(?P<name>[\w-][\w.-]*(/[\w.-]+)?)(:(?P<split>[^:/*?\[]+({_SLICE})?))?")


@dataclass(frozen=True)
class FileSource:
    """A file of rows: JSON lines, one JSON array, CSV, Parquet or Arrow, packed with gzip or not.

    Args:
        path: The file.
        item: Which of the things that the user gave it belongs to.
    """

    path: Path
    item: int = 0

    def check(self) -> None:
        """Look whether the file can be read at all, in no time.

        Raises:
            DataError: It is missing, empty, or not readable.
        """
        if not self.path.exists():
            raise DataError(f"{self.path}: no such file. Give a path, or a data set on the hub as 'owner/name:split'.")
        try:
            with open_file(self.path) as file:
                if not file.read(4).removeprefix(BOM).strip() and not file.read().strip():
                    raise DataError(f"{self.path}: the file is empty. Write one chat per line into it.")
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self.path}: cannot be read ({error}). Check it and its permissions.") from error

    def fingerprint(self) -> str:
        """A name for the file's content, and for its place among what the user gave.

        Returns:
            Hexadecimal digits.
        """
        with self.path.open("rb") as file:
            return f"{self.item}:{data_suffix(self.path)}:{hashlib.file_digest(file, 'blake2b').hexdigest()}"

    def name(self) -> str:
        """What the user calls it.

        Returns:
            Its path.
        """
        return str(self.path)

    def place(self, row: int) -> str:
        """Say where a row is.

        Args:
            row: Its number.

        Returns:
            ``path:line``, or the row's number in files without lines.
        """
        return f"{self.path}:{row}" if kind_of_file(self.path) == "lines" else f"{self.path} row {row}"

    def rows(self) -> Iterator[Row]:
        """Read the file from its beginning.

        Returns:
            Its rows; lines as bytes, for ``decode_line``.
        """
        return read_rows(self.path)


@dataclass(frozen=True)
class HubSource:
    """A split of a data set on the Hugging Face hub.

    Args:
        id: Its name on the hub, ``owner/name``.
        split: The split.
        item: Which of the things that the user gave it is.
        streaming: Whether rows are fetched as they are read, instead of downloaded first.
    """

    id: str
    split: str
    item: int = 0
    streaming: bool = False

    def check(self) -> None:
        """Nothing can be said without the network; the set is looked for when it is read."""

    def fingerprint(self) -> str:
        """A name for the set's content, and for its place among what the user gave.

        Returns:
            The fingerprint that ``datasets`` gives it.
        """
        return f"{self.item}:{self.id}:{self.split}:{self._load()._fingerprint}"

    def name(self) -> str:
        """What the user calls it.

        Returns:
            Its id and split.
        """
        return f"{self.id}:{self.split}"

    def place(self, row: int) -> str:
        """Say where a row is.

        Args:
            row: Its number.

        Returns:
            Name, split and number.
        """
        return f"{self.id}:{self.split} row {row}"

    def rows(self) -> Iterator[Row]:
        """Read the split from its beginning.

        Returns:
            Its rows.

        Raises:
            DataError: There is no such set or split, or the hub cannot be reached.
        """
        return enumerate(self._load(), start=1)

    def _load(self) -> "datasets.Dataset | datasets.IterableDataset":
        import datasets

        try:
            return datasets.load_dataset(self.id, split=self.split, streaming=self.streaming)
        except Exception as error:  # load_dataset lets through whatever its many back ends raise
            raise DataError(
                f"{self.id}: neither a file nor a data set with a split {self.split!r} that can be loaded from the "
                f"hub ({error}). Check the spelling, or name the split: '{self.id}:SPLIT'."
            ) from error


Source = FileSource | HubSource


def find_sources(given: str | list[str], *, streaming: bool = False) -> list[Source]:
    """Understand what a user gave as data.

    Args:
        given: A file, a folder, a glob pattern, a hub id (``owner/name``, ``owner/name:split`` or, with a part of a
            split, ``owner/name:train[:100]``), or several of them.
        streaming: Whether hub data sets are fetched as they are read.

    Returns:
        The sources, in the order given; files of a folder or a pattern by name.

    Raises:
        DataError: A path leads nowhere, or a file cannot be read.
    """
    items = [given] if isinstance(given, str) else given
    sources = [source for index, item in enumerate(items) for source in _find(item, index, streaming)]
    for source in sources:
        source.check()
    return sources


def _find(given: str, item: int, streaming: bool) -> list[Source]:
    path = Path(given).expanduser()
    hub = _HUB.fullmatch(given)
    if path.is_dir():
        return _files(given, item, [str(file) for file in path.rglob("*")])
    if path.exists() or (hub and data_suffix(path) in SUFFIXES):
        return [FileSource(path, item)]
    if hub is None and any(sign in given for sign in "*?["):
        return _files(given, item, glob.glob(str(path), recursive=True))  # noqa: PTH207, a pattern may be absolute
    if hub is None:
        return [FileSource(path, item)]
    return [HubSource(hub["name"], hub["split"] or "train", item, streaming)]


def _files(given: str, item: int, found: list[str]) -> list[Source]:
    files = sorted(path for path in map(Path, found) if data_suffix(path) in SUFFIXES and path.is_file())
    if any(path.suffix == ".arrow" for path in files):  # a saved data set, whose JSON files describe it
        files = [path for path in files if path.suffix == ".arrow"]
    if not files:
        raise DataError(f"{given}: no data files in it; known are {', '.join(sorted(SUFFIXES))}, and these with .gz.")
    return [FileSource(path, item) for path in files]
