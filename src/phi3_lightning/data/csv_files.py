"""Tables in CSV and TSV, row by row."""

import csv
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Final

from phi3_lightning.data.decoding import convert, decode_text
from phi3_lightning.errors import DataError

_FAULTS: Final = {  # how the messages of Python's reader begin, and what they mean
    "unexpected end of data": 'a quote (") is opened and never closed',
    "new-line character seen": "a line ends with a carriage return alone; fix it with: tr '\\r' '\\n' < FILE > NEW",
}
_SEPARATORS: Final = {"\t": "tabs", ";": "semicolons", "|": "bars (|)", ",": "commas"}
_FIELD_LIMIT: Final = 2**31 - 1  # characters of a cell; the module's own limit refuses long chats
_LOCK = Lock()


def read_csv(file: BinaryIO, path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number of each row of a table and its cells by column; the first line names the columns.

    Rows are numbered as spreadsheets do: the header is row 1, and blank lines count.

    Raises:
        DataError: If it is not UTF-8, or not such a table.
    """
    lines = (decode_text(line, path, number) for number, line in enumerate(file, start=1))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    number, begin = 1, 1  # of the current row: its number, and the line on which it begins
    try:
        names = _next_row(reader) or []
        if fault := _fault(names, path, delimiter):
            raise DataError(f"{path}:1: the header {fault}")
        begin = reader.line_num + 1
        while (cells := _next_row(reader)) is not None:
            if len(cells) not in (0, len(names)):
                raise DataError(f"{path}:{reader.line_num}: the row does not have as many fields as the header; fix it")
            number += 1
            if cells:  # a blank line has none
                yield number, dict(zip(names, cells, strict=True))
            begin = reader.line_num + 1
    except csv.Error as error:
        fault = next((fault for start, fault in _FAULTS.items() if str(error).startswith(start)), str(error))
        raise DataError(f"{path}:{begin}: in this row {fault}") from None


def _next_row(reader: Iterator[list[str]]) -> list[str] | None:
    """Read a row with cells of any length; None at the end. The limit is the whole process's, so it is restored."""
    with _LOCK:
        limit = csv.field_size_limit(_FIELD_LIMIT)
        try:
            return next(reader, None)
        finally:
            csv.field_size_limit(limit)


def _fault(names: list[str], path: Path, delimiter: str) -> str | None:
    """Return what is wrong with the names of columns, and what to do; None if they are valid."""
    if not names:
        return "is blank, and should name the columns"
    if names[0].lower().startswith("sep="):
        return "is Excel's note on the separator; remove that line"
    if duplicates := [name for name in names if name and names.count(name) > 1]:
        return f"has the column {duplicates[0]!r} twice; rename one"
    if with_blanks := [name for name in names if name != name.strip()]:
        return f"has blanks around the name {with_blanks[0]!r}; remove them, and those around the cells"
    separator = next((sign for sign in _SEPARATORS if sign in names[0]), None)
    if separator is None or len(names) > 1:
        return None
    fault = f"separates columns by {_SEPARATORS[separator]}, not by {_SEPARATORS[delimiter]};"
    if separator in "\t,":
        return f"{fault} rename the file to end in {'.tsv' if separator == chr(9) else '.csv'}"
    program = f"import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter='{separator}'))"
    command = convert(path, f'python -c "{program}"', ".csv")
    return f"{fault} convert the file: {command}"
