"""A tokenised data set, mapped from the disk, and the statistics of its rows."""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from phi3_lightning.contracts import Origin
from phi3_lightning.data.bad_rows import name_places
from phi3_lightning.data.collate import Document
from phi3_lightning.data.conversation import Kind
from phi3_lightning.data.files import listing
from phi3_lightning.data.packing import Ints
from phi3_lightning.data.sources import Source

if TYPE_CHECKING:  # importing it takes half a second, for which `--help` need not wait
    import datasets


@dataclass(frozen=True)
class Statistics:
    """What became of the rows of one split."""

    read: int
    """Rows of the sources."""
    kept: int
    """Documents that can be used; a row that is split gives several."""
    cut: int
    """Rows of which something was cut off, because they are too long."""
    dropped: dict[str, int]
    """Rows left out, by reason."""
    tokens: int
    """Tokens of the kept documents."""
    supervised_tokens: int
    """Those that are trained."""
    unused: dict[str, int]
    """Rows with each field that nothing reads, by the field's name."""
    by_source: list[int]
    """Rows of each source."""
    kind: Kind = "chat"
    """The kind of all rows. A pair is one document."""
    empty: int = 0
    """Rows of which an empty answer is trained."""
    dropped_rows: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Source and number of the first rows left out, by reason."""

    def __str__(self) -> str:
        dropped = "".join(f", {count} dropped ({reason})" for reason, count in self.dropped.items())
        trained = f", {self.supervised_tokens / self.tokens:.1%} of them trained" if self.supervised_tokens else ""
        cut = f", {self.cut} cut" if self.cut else ""
        empty = f", {self.empty} of them with an empty answer" if self.empty else ""
        return f"{self.read} rows read, {self.kept} kept{empty}{cut}{dropped}; {self.tokens} tokens{trained}"


@dataclass(frozen=True)
class TokenizedDataset:
    """The documents of one split."""

    table: "datasets.Dataset"
    """One row a document: ``input_ids``, ``spans``, ``length``, ``source``, ``row``, ``id``, ``group``, ``hash``, and
    for preferences ``chosen_length`` (0: not a pair), ``shared_length`` and ``preferred`` (the label, or true)."""
    statistics: Statistics
    sources: list[Source]
    left_out: list[str] = field(default_factory=list)
    """Names of what else is in the user's folders."""

    def column(self, name: str) -> Ints:
        """Return a column of whole numbers, such as ``length``, of shape (documents,)."""
        return np.asarray(self.table.data.column(name), dtype=np.int64)

    def lengths(self) -> Ints:
        """Return the number of tokens of each document, for a pair those of both sides, of shape (documents,)."""
        return self.column("length")

    def chosen_lengths(self) -> Ints | None:
        """Return the number of tokens of the chosen side of each pair, of shape (documents,); None without pairs."""
        return self.column("chosen_length") if self.statistics.kind == "pair" else None

    def documents(self, indices: list[int]) -> list[Document]:
        """Read documents, in the order of their indices."""
        rows = self.table[indices]
        columns = zip(indices, rows["input_ids"], rows["spans"], self._preferences(indices), strict=True)
        return [
            Document(index, np.asarray(ids, np.int32), np.asarray(spans, np.int32), *preference)
            for index, ids, spans, preference in columns
        ]

    def _preferences(self, indices: list[int]) -> list[tuple[int, int, bool | None]]:
        """The fields of documents that only preferences have."""
        if self.statistics.kind == "chat":
            return [(0, 0, None)] * len(indices)
        rows = self.table.with_format(None, columns=["chosen_length", "shared_length", "preferred"])[indices]
        labels = rows["preferred"] if self.statistics.kind == "labelled" else [None] * len(indices)
        return list(zip(rows["chosen_length"], rows["shared_length"], labels, strict=True))

    def items(self) -> Ints:
        """Return the index of the user's entry that each document belongs to, of shape (documents,)."""
        items: Ints = np.array([source.item for source in self.sources], dtype=np.int64)
        return items[self.column("source")]

    def origins(self, indices: list[int]) -> list[Origin]:
        """Return place and own id of the row of each document."""
        rows = self.table.with_format("arrow", columns=["source", "row", "id"])[indices].to_pylist()
        return [
            Origin(self.sources[row["source"]].place(row["row"]), None if row["id"] is None else json.loads(row["id"]))
            for row in rows
        ]

    def describe(self, indices: list[int]) -> list[str]:
        """Return the place of each document, such as ``chats.jsonl:12``."""
        return [origin.place for origin in self.origins(indices)]

    def dropped_places(self) -> dict[str, str]:
        """Return the first rows that were left out, by reason."""
        statistics = self.statistics
        return {
            reason: name_places([self.sources[source].place(row) for source, row in rows], statistics.dropped[reason])
            for reason, rows in statistics.dropped_rows.items()
        }

    def files(self) -> dict[str, str]:
        """Return what was read, with its rows, and what was left out, as text."""
        counts = zip(self.sources, self.statistics.by_source, strict=True)
        files = {"read": listing([f"{source.name()} ({rows:,} rows)" for source, rows in counts], 10)}
        return files | ({"left out": listing(self.left_out, 10)} if self.left_out else {})
