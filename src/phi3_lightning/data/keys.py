"""Ids, groups and token hashes, which identify rows and connect them."""

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.conversation import BadRowError

ID: Final = "id"
"""The field of a row's own id."""


def key_columns(options: RowOptions) -> set[str]:
    """Return the fields of a row that are read besides those of its format."""
    return {ID} if options.group_by is None else {ID, options.group_by}


def row_id(fields: Mapping[str, Any]) -> str | None:
    """Return a row's own id as JSON; None unless it is a text or a number."""
    value = _key(fields.get(ID))
    return None if value is None else json.dumps(value)


def group_hash(fields: Mapping[str, Any], column: str | None) -> int:
    """Return a number for the group of a row, the same for 3, 3.0 and "3"; 0 without a column.

    Raises:
        BadRowError: If the row has no group.
    """
    if column is None:
        return 0
    value = _key(fields.get(column))
    if value is None:
        fault = f"not {fields[column]!r:.80}" if column in fields else "and this row has no such field"
        raise BadRowError("no group", f"data.group_by needs a text or a number in {column!r}, {fault}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return int(np.uint64(xxh3_64_intdigest(str(value).encode(errors="surrogatepass"))).astype(np.int64))


def token_hashes(input_ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return a hash of each document, shape (documents,), from the tokens of all, one after the other."""
    content = input_ids.tobytes()
    ends = np.cumsum(np.concatenate([[0], lengths * input_ids.itemsize])).tolist()
    hashes = [xxh3_64_intdigest(content[start:end]) for start, end in pairwise(ends)]
    return np.array(hashes, dtype=np.uint64).view(np.int64)


def _key(value: object) -> str | int | float | None:
    """Return the value where it can identify a row."""
    if isinstance(value, bool) or value == "" or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value if isinstance(value, str | int | float) else None
