"""Rows of Arrow tables, Parquet among them, as JSON lines would hold them.

A struct column has the keys of all rows in every row, null where a row has no such key; a column of JSON holds texts.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa

Convert = Callable[[Any], Any]


def plain_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[dict[str, Any]]:
    """Yield each row without the keys that it does not have; elements of lists stay as they are, null or not."""
    for batch in batches:
        columns = zip(batch.schema.names, batch.columns, strict=True)
        converts = {name: convert for name, column in columns if (convert := _convert(column))}
        for row in batch.to_pylist():
            yield row | {name: convert(row[name]) for name, convert in converts.items()}


def _convert(array: pa.Array) -> Convert | None:
    """Return the function that makes a column's values plain; None where they are plain already, as most are."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _from_json if kind.extension_name == "arrow.json" else None
    if pa.types.is_struct(kind):
        fields = [array.field(index) for index in range(kind.num_fields)]
        inner = {kind.field(index).name: convert for index, field in enumerate(fields) if (convert := _convert(field))}
        return partial(_plain_struct, inner) if inner or any(field.null_count for field in fields) else None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        convert = _convert(array.values)
        return partial(_plain_list, convert) if convert else None
    return None


def _from_json(value: str | None) -> Any:
    return None if value is None else json.loads(value)


def _plain_struct(inner: dict[str, Convert], value: dict[str, Any] | None) -> dict[str, Any] | None:
    if value is None:
        return None
    return {key: inner[key](item) if key in inner else item for key, item in value.items() if item is not None}


def _plain_list(inner: Convert, values: list[Any] | None) -> list[Any] | None:
    return None if values is None else [inner(value) for value in values]
