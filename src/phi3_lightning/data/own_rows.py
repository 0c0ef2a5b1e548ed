"""Reads rows again, with all the fields that their files have; the cache holds their tokens alone."""

from typing import Any

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.readers import decode_line
from phi3_lightning.data.tables import source_rows
from phi3_lightning.data.tokenized import TokenizedDataset
from phi3_lightning.errors import DataError


def own_rows(prepared: TokenizedDataset, indices: list[int], options: RowOptions) -> list[dict[str, Any]]:
    """Return the rows that documents came from; of a table with one message a row, rows of one conversation.

    Each source is read from its beginning to the last of its rows.

    Raises:
        DataError: If a row is gone.
    """
    places = prepared.table.with_format("arrow", columns=["source", "row"])[indices].to_pylist()
    keys = [(place["source"], place["row"]) for place in places]
    rows: dict[tuple[int, int], Any] = {}
    for index in {source for source, _ in keys}:
        missing = {row for source, row in keys if source == index}
        for number, row in source_rows(prepared.sources[index], options):
            if number in missing:
                rows[index, number] = decode_line(row) if isinstance(row, bytes) else row
                missing.remove(number)
            if not missing:
                break
        if missing:
            place = prepared.sources[index].place(min(missing))
            raise DataError(f"{place}: the row is gone since the data were prepared; leave files alone during a run")
    return [rows[key] for key in keys]
