"""Files of every kind, read row by row."""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import pyarrow as pa
import pyarrow.parquet

from phi3_lightning.data.conversation import BadRowError
from phi3_lightning.errors import DataError

Row = tuple[int, object]
"""A row's number in its source, from 1 (its line, where there are lines), and its values, or the bytes of its line."""

BOM: Final = b"\xef\xbb\xbf"
SUFFIXES: Final = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow"}


def kind_of_file(path: Path) -> str:
    """See what a file holds: by its content, but by its name for CSV, which looks like any text.

    Args:
        path: The file.

    Returns:
        ``lines``, ``array``, ``csv``, ``parquet`` or ``arrow``.
    """
    if data_suffix(path) in {".csv", ".tsv"}:
        return "csv"
    with open_file(path) as file:
        start = file.read(4096)
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    return "array" if start.removeprefix(BOM).lstrip().startswith(b"[") else "lines"


def data_suffix(path: Path) -> str:
    """The end of a file's name that tells its kind.

    Args:
        path: The file.

    Returns:
        Its suffix in small letters, without ``.gz``.
    """
    return Path(path.name.lower().removesuffix(".gz")).suffix


def open_file(path: Path) -> BinaryIO:
    """Open a file, unpacked where it is packed with gzip.

    Args:
        path: The file.

    Returns:
        Its bytes.
    """
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast("BinaryIO", gzip.open(path)) if packed else path.open("rb")


def read_rows(path: Path) -> Iterator[Row]:
    """Read a file from its beginning.

    Args:
        path: The file.

    Yields:
        Each row; lines as bytes, for ``decode_line``.

    Raises:
        DataError: The file as a whole cannot be decoded.
    """
    readers: dict[str, Callable[[BinaryIO], Iterable[Row]]] = {
        "lines": _lines,
        "array": _array,
        "csv": partial(_csv, delimiter="\t" if data_suffix(path) == ".tsv" else ","),
        "parquet": _parquet,
        "arrow": _arrow,
    }
    kind = kind_of_file(path)
    try:
        with open_file(path) as file:
            yield from readers[kind](file)
    except (ValueError, RecursionError, csv.Error, pa.ArrowException, OSError, EOFError, zlib.error) as error:
        names = {"lines": "JSON lines", "array": "a JSON array", "csv": "CSV", "parquet": "Parquet", "arrow": "Arrow"}
        raise DataError(f"{path}: not {names[kind]} that can be read ({error}). Mend or remove the file.") from error


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


def _lines(file: BinaryIO) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):  # bytes: only line feeds end a line, as JSON lines has it
        text = line.removeprefix(BOM) if number == 1 else line
        if text.strip():
            yield number, text


def _array(file: BinaryIO) -> Iterator[Row]:
    return enumerate(json.loads(file.read().removeprefix(BOM)), start=1)


def _csv(file: BinaryIO, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the default refuses long chats
    text = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(file))
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    for number, row in enumerate(reader, start=1):
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num} has not as many fields as the head")
        yield number, row


def _parquet(file: Any) -> Iterator[Row]:
    return _tables(pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024))


def _arrow(file: Any) -> Iterator[Row]:
    if file.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(file)
        return _tables(reader.get_batch(index) for index in range(reader.num_record_batches))
    file.seek(0)
    return _tables(pa.ipc.open_stream(file))


def _tables(batches: Iterable[pa.RecordBatch]) -> Iterator[Row]:
    return enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), start=1)
