"""Files of every kind, read row by row."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO, Final, cast

import pyarrow as pa
import pyarrow.parquet

from phi3_lightning.data.arrow import plain_rows
from phi3_lightning.data.conversation import BadRowError
from phi3_lightning.data.csv_files import read_csv
from phi3_lightning.data.decoding import BOM, convert, decode_json, decode_text, is_repr, wide_encoding
from phi3_lightning.errors import DataError

Row = tuple[int, object]
"""A row's number in its source, from 1 (its line, where there are lines), and its values, the bytes of its line, or the
error that makes it a bad row."""

SUFFIXES: Final = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow"}
_SHEET: Final = "save the sheet as 'CSV UTF-8 (comma delimited)'"
_NOT_DATA: Final = {  # the beginnings of files that hold no rows, what these are, and what to do
    rb"PK\x03\x04": ("an Excel workbook or another zip archive", f"{_SHEET}, or unpack the archive"),
    rb"\xd0\xcf\x11\xe0": ("an old Excel workbook", _SHEET),
    rb"\x28\xb5\x2f\xfd": ("packed with zstd", "unpack it: zstd -d FILE"),
    rb"\xfd7zXZ": ("packed with xz", "unpack it: unxz FILE"),
    rb"BZh[1-9]1AY&SY": ("packed with bzip2", "unpack it: bunzip2 FILE"),
    rb"SQLite format 3": ("an SQLite database", "export the table as CSV: sqlite3 -header -csv FILE 'select * from T'"),
    rb"%PDF-": ("a PDF document", "give the chats as JSON lines"),
    rb"version https://git-lfs": ("a pointer of Git LFS instead of the data", "fetch them: git lfs pull"),
    rb"\s*<(?i:!doctype html|html)": ("a web page", "download the file itself"),
}


def kind_of_file(path: Path) -> str:
    """Return ``lines``, ``array``, ``csv``, ``parquet`` or ``arrow``.

    All but CSV, which looks like any text, are recognised by their content.

    Raises:
        DataError: If the file holds none of these, or text that is not UTF-8.
    """
    with open_file(path) as file:
        start = file.read(4096)
    for pattern, (kind, remedy) in _NOT_DATA.items():
        if re.match(pattern, start):
            raise DataError(f"{path}: the file is {kind}; {remedy.replace('FILE', quote(str(path)))}")
    is_csv = data_suffix(path) in {".csv", ".tsv"}
    if start.startswith(b"PAR1") and not is_csv:
        return "parquet"
    if start.startswith((b"ARROW1", b"\xff\xff\xff\xff")) and not is_csv:
        return "arrow"
    if encoding := wide_encoding(start):
        suffix = ".tsv" if is_csv and re.search(rb"\t\0|\0\t", start.partition(b"\n")[0]) else ""
        raise DataError(
            f"{path}: the file is {encoding}, not UTF-8: {convert(path, f'iconv -f {encoding} -t UTF-8', suffix)}"
        )
    if b"\0" in start:
        raise DataError(f"{path}: the file is neither text nor Parquet nor Arrow by its name and content; convert it")
    if is_csv:
        return "csv"
    return "array" if start.removeprefix(BOM).lstrip().startswith(b"[") else "lines"


def data_suffix(path: Path) -> str:
    """Return the suffix of a file's name that tells its kind: in lower case, without ``.gz``."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def open_file(path: Path) -> BinaryIO:
    """Open a file, decompressed where it is packed with gzip."""
    with path.open("rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    return cast("BinaryIO", gzip.open(path)) if is_packed else path.open("rb")


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file from its beginning; lines as bytes, for :func:`decode_line`.

    Raises:
        DataError: If the file as a whole cannot be decoded.
    """
    readers: dict[str, tuple[str, Callable[[BinaryIO], Iterable[Row]]]] = {
        "lines": ("JSON lines", _lines),
        "array": ("a JSON array", partial(_array, path=path)),
        "csv": ("CSV", partial(read_csv, path=path, delimiter="\t" if data_suffix(path) == ".tsv" else ",")),
        "parquet": ("Parquet", _parquet),
        "arrow": ("Arrow", _arrow),
    }
    name, read = readers[kind_of_file(path)]
    try:
        with open_file(path) as file:
            yield from read(file)
    except DataError:
        raise
    except (ValueError, RecursionError, csv.Error, pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not {name} that can be read ({error}); fix or remove the file") from error


def decode_line(line: bytes) -> object:
    """Decode one line of JSON lines, or raise ``BadRowError``."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise BadRowError(
            "not UTF-8",
            f"byte 0x{line[error.start]:02x}; where all such bytes are cp1252, as older Windows programs write it: "
            "iconv -f CP1252 -t UTF-8 FILE > NEW",
        ) from None
    return decode_json(text, "the line")


def _lines(file: BinaryIO) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):  # bytes: only line feeds end a line, as JSON lines has it
        text = line.removeprefix(BOM) if number == 1 else line
        if text.strip():
            yield number, text


def _array(file: BinaryIO, path: Path) -> Iterator[Row]:
    text = decode_text(file.read(), path)
    if is_repr(text):
        raise ValueError("it is Python's repr, with single quotes; write it with json.dump")
    return enumerate(json.loads(text), start=1)


def _parquet(file: Any) -> Iterator[Row]:
    return _tables(pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024))


def _arrow(file: Any) -> Iterator[Row]:
    if file.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(file)
        return _tables(reader.get_batch(index) for index in range(reader.num_record_batches))
    file.seek(0)
    return _tables(pa.ipc.open_stream(file))


def _tables(batches: Iterable[pa.RecordBatch]) -> Iterator[Row]:
    return enumerate(plain_rows(batches), start=1)
