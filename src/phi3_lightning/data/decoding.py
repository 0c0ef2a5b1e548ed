"""Decodes bytes and JSON, or raises an error that names what they are and the command that converts them."""

import json
import re
from pathlib import Path
from shlex import quote
from typing import Final

from phi3_lightning.data.conversation import BadRowError
from phi3_lightning.errors import DataError

BOM: Final = b"\xef\xbb\xbf"
_MARKS: Final = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_REPR: Final = re.compile(r"\s*(?:\[?\s*array\(|[\[{(][\s\[{(]*')")  # JSON has no single quotes


def wide_encoding(start: bytes) -> str | None:
    """Return iconv's name of an encoding of two or four bytes a character, by the beginning of a file; else None."""
    for mark, name in _MARKS.items():
        if start.startswith(mark):
            return name
    even, odd = start[::2].count(0) * 2, start[1::2].count(0) * 2
    if max(even, odd) > len(start) / 2 > 5 * min(even, odd):  # every other byte of Latin text, and no other
        return "UTF-16LE" if odd > even else "UTF-16BE"
    return None


def convert(path: Path, command: str, suffix: str = "") -> str:
    """Return the command line that makes a new file of one, packed or not, by a command that filters standard input.

    Args:
        suffix: The suffix of the new file; empty: that of the old one.
    """
    is_packed = path.suffix.lower() == ".gz"
    plain = path.with_suffix("") if is_packed else path
    new = quote(str(plain.with_suffix(f".new{suffix or plain.suffix}")))
    old = quote(str(path))
    return f"gunzip -c {old} | {command} > {new}" if is_packed else f"{command} < {old} > {new}"


def decode_text(data: bytes, path: Path, line: int = 1) -> str:
    """Decode the UTF-8 of a file from a line on, without its byte order mark, or raise ``DataError``."""
    try:
        return data.removeprefix(BOM).decode() if line == 1 else data.decode()
    except UnicodeDecodeError as error:
        data = error.object
        at = line + data.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{at}: not UTF-8 (byte 0x{data[error.start]:02x}). What Excel and older Windows programs write is "
            f"mostly cp1252: {convert(path, 'iconv -f CP1252 -t UTF-8')}"
        ) from None


def is_repr(text: str) -> bool:
    """Whether a text is Python's ``str`` of a list, a dictionary or an array: ``[{'role': 'user'}]`` is not JSON."""
    return _REPR.match(text) is not None


def decode_json(text: str, where: str) -> object:
    """Decode JSON from some place within a row, or raise ``BadRowError``."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if is_repr(text):
            raise python_repr(where) from None
        raise BadRowError("not JSON", f"{where} is not JSON ({error})") from None


def python_repr(where: str) -> BadRowError:
    """Return the error for a Python repr at some place in a row, with the code that makes it JSON."""
    return BadRowError(
        "not JSON",
        f"{where} is Python's repr (single quotes), not JSON; write values with json.dumps, in pandas "
        "df[c] = df[c].map(ast.literal_eval).map(json.dumps), or the table with df.to_json(NEW, orient='records', "
        "lines=True)",
    )
