"""Tables in CSV and TSV, row by row."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from phi3_lightning.data.decoding import convert, decode_text
from phi3_lightning.errors import DataError

_FAULTS: Final = {  # how Python's reader begins to say it, and what is meant
    "unexpected end of data": 'a quote (") is opened and never closed',
    "new-line character seen": "a line ends with a carriage return alone; mend it with: tr '\\r' '\\n' < FILE > NEW",
}
_SIGNS: Final = {"\t": "tabs", ";": "semicolons", "|": "bars (|)", ",": "commas"}


def read_csv(file: BinaryIO, path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Read a table whose first line names its columns.

    Args:
        file: Its bytes.
        path: Its name, for errors.
        delimiter: What separates its columns.

    Yields:
        The number of each row and its cells by column.

    Raises:
        DataError: It is not UTF-8, or no such table.
    """
    csv.field_size_limit(2**31 - 1)  # the default refuses long chats
    lines = (decode_text(line, path, number) for number, line in enumerate(file, start=1))
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    begin = 1  # the line with which the row that is read begins
    try:
        if fault := _fault(list(reader.fieldnames or []), path, delimiter):
            raise DataError(f"{path}:1: the head {fault}")
        begin = reader.line_num + 1
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                raise DataError(f"{path}:{reader.line_num}: the row has not as many fields as the head; mend it.")
            yield number, row
            begin = reader.line_num + 1
    except csv.Error as error:
        fault = next((meant for said, meant in _FAULTS.items() if str(error).startswith(said)), str(error))
        raise DataError(f"{path}:{begin}: in this row {fault}.") from None


def _fault(names: list[str], path: Path, delimiter: str) -> str | None:
    """What is wrong with the names of columns, and what to do."""
    if not names:
        return "is blank, and should name the columns."
    if names[0].lower().startswith("sep="):
        return "is Excel's note on the separator; remove that line."
    if twice := [name for name in names if name and names.count(name) > 1]:
        return f"has the column {twice[0]!r} twice; rename one."
    if blank := [name for name in names if name != name.strip()]:
        return f"has blanks around the name {blank[0]!r}; remove them, and those around the cells."
    found = next((sign for sign in _SIGNS if sign in names[0]), None)
    if found is None or len(names) > 1:
        return None
    fault = f"separates columns by {_SIGNS[found]}, not by {_SIGNS[delimiter]};"
    if found in "\t,":
        return f"{fault} rename the file to end in {'.tsv' if found == chr(9) else '.csv'}."
    program = f"import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter='{found}'))"
    command = convert(path, f'python -c "{program}"', ".csv")
    return f"{fault} convert the file: {command}"
