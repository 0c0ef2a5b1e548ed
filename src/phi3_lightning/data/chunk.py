"""Rows to tokenise, and tokenised rows as flat arrays, which pass between processes and to the disk."""

from collections.abc import Iterable
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_lightning.data.collate import Document
from phi3_lightning.data.conversation import KIND_NAMES, Kind, TokenizedDocument
from phi3_lightning.data.keys import token_hashes
from phi3_lightning.data.readers import Row
from phi3_lightning.data.sources import Source
from phi3_lightning.errors import DataError


class Job(NamedTuple):
    """Rows to tokenise."""

    source: int
    """The index of their source."""
    rows: list[Row]
    """The number and content of each."""


class Chunk(NamedTuple):
    """Tokenised rows, as flat arrays."""

    source: int
    """The index of their source."""
    read: int
    """The number of rows of the job."""
    rows: NDArray[np.int64]
    """The number of the row of each document, shape (documents,)."""
    input_ids: NDArray[np.int32]
    """Tokens, document by document, shape (tokens,)."""
    lengths: NDArray[np.int32]
    """Tokens of each document, shape (documents,)."""
    spans: NDArray[np.int32]
    """Supervised ranges, document by document, shape (2 * ranges,)."""
    span_lengths: NDArray[np.int32]
    """Entries of ``spans`` of each document, shape (documents,)."""
    chosen_lengths: NDArray[np.int32]
    """Tokens of the chosen conversation of each pair, 0 for other documents, shape (documents,)."""
    shared_lengths: NDArray[np.int32]
    """Leading tokens that both conversations of a pair share, 0 for other documents, shape (documents,)."""
    preferred: NDArray[np.bool_]
    """The label of each document, true if it has none, shape (documents,)."""
    kinds: dict[Kind, int]
    """The number of the first row of each kind."""
    dropped_rows: dict[str, list[int]]
    """The numbers of the rows that are left out, by reason."""
    bad: list[tuple[int, str]]
    """Number and error of each row that cannot be used."""
    cut: int
    """Rows that were truncated."""
    empty: int
    """Rows of which an empty answer is trained."""
    unused: dict[str, int]
    """Rows with each field that nothing reads, by the field's name."""
    ids: list[str | None]
    """The own id of each document's row as JSON, if it has one."""
    groups: NDArray[np.int64]
    """A number for the group of each document's row, shape (documents,)."""
    hashes: NDArray[np.int64]
    """A hash of the tokens of each document, shape (documents,)."""

    @property
    def dropped(self) -> dict[str, int]:
        """How many rows are left out, by reason."""
        return {reason: len(rows) for reason, rows in self.dropped_rows.items()}

    def documents(self, document_ids: Iterable[int]) -> list[Document]:
        """Return the documents, all of one kind, with these ids."""
        [kind] = self.kinds or ["chat"]
        labels = self.preferred.tolist() if kind == "labelled" else [None] * len(self.lengths)
        return list(
            map(
                Document,
                document_ids,
                _split(self.input_ids, self.lengths),
                _split(self.spans, self.span_lengths),
                self.chosen_lengths.tolist(),
                self.shared_lengths.tolist(),
                labels,
            )
        )


def flat_arrays(documents: list[TokenizedDocument], rows: list[int]) -> dict[str, Any]:
    """Return the fields of a chunk that follow from its documents, which come from the rows of these numbers."""
    input_ids, lengths = _flatten([document.input_ids for document in documents])
    spans, span_lengths = _flatten([list(chain.from_iterable(document.spans)) for document in documents])
    kinds: dict[Kind, int] = {}
    for row, document in zip(rows, documents, strict=True):
        kinds.setdefault(document.kind, row)
    return {
        "rows": np.array(rows, dtype=np.int64),
        "input_ids": input_ids,
        "lengths": lengths,
        "spans": spans,
        "span_lengths": span_lengths,
        "chosen_lengths": np.array([document.chosen_length for document in documents], dtype=np.int32),
        "shared_lengths": np.array([document.shared_length for document in documents], dtype=np.int32),
        "preferred": np.array([document.preferred is not False for document in documents], dtype=np.bool_),
        "kinds": kinds,
        "hashes": token_hashes(input_ids, lengths),
    }


def note_kinds(kinds: dict[Kind, str], chunk: Chunk, source: Source) -> None:
    """Note the place of the first row of each kind.

    Raises:
        DataError: If a data set has rows of two kinds.
    """
    for kind, row in chunk.kinds.items():
        kinds.setdefault(kind, source.place(row))
    if len(kinds) > 1:
        (one, place), (other, other_place), *_ = kinds.items()
        raise DataError(
            f"{place} is {KIND_NAMES[one]}, and {other_place} is {KIND_NAMES[other]}; a data set has rows of one kind: "
            "separate them, or name the format of all rows with data.format"
        )


def _flatten(lists: list[list[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    lengths = np.array([len(item) for item in lists], dtype=np.int32)
    return np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=int(lengths.sum())), lengths


def _split(values: NDArray[np.int32], lengths: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    return [values[start:end] for start, end in pairwise(np.cumsum([0, *lengths]).tolist())]
