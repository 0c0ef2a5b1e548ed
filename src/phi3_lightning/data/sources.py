"""Where rows come from: files and hub data sets, one decoded row at a time, each with its place."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import datasets
import pyarrow
import pyarrow.parquet

from phi3_lightning.data.formats import BadRowError
from phi3_lightning.errors import DataError

Row = tuple[int, object]
"""A row's number in its source, from 1 (its line, where there are lines), and its values, or the bytes of its line."""

_BOM = b"\xef\xbb\xbf"
_HUB = re.compile(r"(?P<name>[\w-][\w.-]*(/[\w.-]+)?)(:(?P<split>[^:/]+))?")
_SUFFIXES = {".jsonl", ".json", ".ndjson", ".parquet"}


@dataclass(frozen=True)
class FileSource:
    """A file of rows: JSON lines, one JSON array, or Parquet. The content tells which.

    Args:
        path: The file.
    """

    path: Path

    def check(self) -> None:
        """Look whether the file can be read at all, in no time.

        Raises:
            DataError: It is missing, empty, or not readable.
        """
        if not self.path.exists():
            raise DataError(f"{self.path}: no such file. Give a path, or a data set on the hub as 'owner/name:split'.")
        if not self.path.is_file():
            raise DataError(f"{self.path}: not a file. Give JSON, JSON lines or Parquet files.")
        try:
            with self.path.open("rb") as file:
                if not file.read(4).removeprefix(_BOM).strip() and not file.read().strip():
                    raise DataError(f"{self.path}: the file is empty. Write one chat per line into it.")
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}). Check its permissions.") from error

    def fingerprint(self) -> str:
        """A name for the file's content.

        Returns:
            Hexadecimal digits.
        """
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()

    def place(self, row: int) -> str:
        """Say where a row is.

        Args:
            row: Its number.

        Returns:
            ``path:line``, or the row's number in files without lines.
        """
        with self.path.open("rb") as file:
            return f"{self.path}:{row}" if _content_kind(file) == "lines" else f"{self.path} row {row}"

    def rows(self) -> Iterator[Row]:
        """Read the file from its beginning.

        Yields:
            Each row; lines as bytes, for ``decode_line``.

        Raises:
            DataError: The file as a whole cannot be decoded.
        """
        with self.path.open("rb") as file:
            kind = _content_kind(file)
            if kind == "parquet":
                yield from self._parquet_rows(file)
            elif kind == "array":
                yield from enumerate(self._array(file), start=1)
            else:
                yield from _line_rows(file)

    def _parquet_rows(self, file: BinaryIO) -> Iterator[Row]:
        try:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024)
            yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), start=1)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: not a Parquet file that can be read ({error}).") from error

    def _array(self, file: BinaryIO) -> list[object]:
        try:
            return list(json.loads(file.read().removeprefix(_BOM)))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: not a JSON array ({error}). Mend it, or write one row per line.") from error


@dataclass(frozen=True)
class HubSource:
    """A split of a data set on the Hugging Face hub.

    Args:
        name: Its id, ``owner/name``.
        split: The split.
    """

    name: str
    split: str

    def check(self) -> None:
        """Nothing can be said without the network; the set is looked for when it is read."""

    def fingerprint(self) -> str:
        """A name for the set's content.

        Returns:
            The fingerprint that ``datasets`` gives it.
        """
        return f"{self.name}:{self.split}:{self._load()._fingerprint}"

    def place(self, row: int) -> str:
        """Say where a row is.

        Args:
            row: Its number.

        Returns:
            Name, split and number.
        """
        return f"{self.name}:{self.split} row {row}"

    def rows(self) -> Iterator[Row]:
        """Read the split from its beginning.

        Yields:
            Each row.

        Raises:
            DataError: There is no such set or split, or the hub cannot be reached.
        """
        yield from enumerate(self._load(), start=1)

    def _load(self) -> datasets.Dataset:
        try:
            return datasets.load_dataset(self.name, split=self.split)
        except Exception as error:  # load_dataset lets through whatever its many back ends raise
            raise DataError(
                f"{self.name}: neither a file nor a data set with a split {self.split!r} that can be loaded from the "
                f"hub ({error}). Check the spelling, or name the split: '{self.name}:SPLIT'."
            ) from error


Source = FileSource | HubSource


def find_sources(given: str | list[str]) -> list[Source]:
    """Understand what a user gave as data.

    Args:
        given: A path, a hub id (``owner/name`` or ``owner/name:split``), or several of them.

    Returns:
        The sources, in the order given.

    Raises:
        DataError: A path leads nowhere, or a file cannot be read.
    """
    sources = [_find(item) for item in ([given] if isinstance(given, str) else given)]
    for source in sources:
        source.check()
    return sources


def _find(given: str) -> Source:
    path = Path(given).expanduser()
    hub = _HUB.fullmatch(given)
    if path.exists() or hub is None or path.suffix.lower() in _SUFFIXES:
        return FileSource(path)
    return HubSource(hub["name"], hub["split"] or "train")


def _content_kind(file: BinaryIO) -> str:
    start = file.read(4096)
    file.seek(0)
    if start.startswith(b"PAR1"):
        return "parquet"
    return "array" if start.removeprefix(_BOM).lstrip().startswith(b"[") else "lines"


def _line_rows(file: BinaryIO) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):  # bytes: only line feeds end a line, as JSON lines has it
        text = line.removeprefix(_BOM) if number == 1 else line
        if text.strip():
            yield number, text


def decode_line(line: bytes) -> object:
    """Decode one line of JSON lines.

    Args:
        line: Its bytes.

    Returns:
        The row.

    Raises:
        BadRowError: It is not UTF-8, or not JSON.
    """
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise BadRowError("not JSON", f"{error}") from None
