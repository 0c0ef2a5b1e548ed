"""Sources become a tokenised Arrow file in a cache: built once, found again by what went into it."""

import hashlib
import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from phi3_lightning.config.data import RowOptions
from phi3_lightning.contracts import Origin
from phi3_lightning.data.collate import Document
from phi3_lightning.data.encode import Chunk, Encoder, Job, encode_all
from phi3_lightning.data.packing import Ints
from phi3_lightning.data.sources import NOT_WRITTEN, Source
from phi3_lightning.data.tables import source_rows
from phi3_lightning.errors import ConfigError, DataError
from phi3_lightning.progress import count_progress

if TYPE_CHECKING:  # importing it takes half a second, for which `--help` need not wait
    import datasets

log = logging.getLogger(__name__)

_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "spans": pa.list_(pa.int32()),
        "length": pa.int32(),
        "source": pa.int32(),
        "row": pa.int64(),
        "id": pa.string(),
        "group": pa.int64(),
        "hash": pa.int64(),
    }
)
_CHUNK = 512  # rows that are tokenised, and written, together
_SHOWN = 10  # bad rows, or files, that are named one by one


@dataclass(frozen=True)
class Statistics:
    """What became of the rows of one split.

    Args:
        read: Rows found.
        kept: Documents that can be used; of a row that is split, several.
        cut: Rows of which something was cut off, because they are too long.
        dropped: Rows left out, by reason.
        tokens: Tokens of the kept documents.
        supervised_tokens: Those of them that are trained.
        unused: Rows with each field that nothing reads, by the field's name.
        by_source: Rows found in each source.
    """

    read: int
    kept: int
    cut: int
    dropped: dict[str, int]
    tokens: int
    supervised_tokens: int
    unused: dict[str, int]
    by_source: list[int]

    def __str__(self) -> str:
        dropped = "".join(f", {count} dropped ({reason})" for reason, count in self.dropped.items())
        trained = f", {self.supervised_tokens / self.tokens:.1%} of them trained" if self.supervised_tokens else ""
        cut = f", {self.cut} cut" if self.cut else ""
        return f"{self.read} rows read, {self.kept} kept{cut}{dropped}; {self.tokens} tokens{trained}"


@dataclass(frozen=True)
class TokenizedDataset:
    """A tokenised set, mapped from the disk.

    Args:
        table: One row a document: ``input_ids``, ``spans``, ``length``, ``source``, ``row``, ``id``, ``group`` and
            ``hash``.
        statistics: What became of the rows.
        sources: Where they came from.
        left_out: Names of what else is in the folders that were given.
    """

    table: "datasets.Dataset"
    statistics: Statistics
    sources: list[Source]
    left_out: list[str] = field(default_factory=list)

    def column(self, name: str) -> Ints:
        """Read a column of one number a document.

        Args:
            name: ``length``, ``source``, ``row``, ``group`` or ``hash``.

        Returns:
            Shape (documents,), int64.
        """
        return np.asarray(self.table.data.column(name), dtype=np.int64)

    def lengths(self) -> Ints:
        """Tokens of each document.

        Returns:
            Shape (documents,), int64.
        """
        return self.column("length")

    def documents(self, indices: list[int]) -> list[Document]:
        """Read documents.

        Args:
            indices: Which ones.

        Returns:
            Their tokens and supervised ranges, in the order asked for.
        """
        found = self.table[indices]
        arrays = zip(indices, found["input_ids"], found["spans"], strict=True)
        return [Document(index, np.asarray(ids, np.int32), np.asarray(spans, np.int32)) for index, ids, spans in arrays]

    def items(self) -> Ints:
        """Which of the things that the user gave each document belongs to.

        Returns:
            Shape (documents,), int64.
        """
        items: Ints = np.array([source.item for source in self.sources], dtype=np.int64)
        return items[self.column("source")]

    def origins(self, indices: list[int]) -> list[Origin]:
        """Say where documents came from.

        Args:
            indices: Which ones.

        Returns:
            Place and own id of the row of each.
        """
        rows = self.table.with_format("arrow", columns=["source", "row", "id"])[indices].to_pylist()
        return [
            Origin(self.sources[row["source"]].place(row["row"]), None if row["id"] is None else json.loads(row["id"]))
            for row in rows
        ]

    def describe(self, indices: list[int]) -> list[str]:
        """Say at which places documents are.

        Args:
            indices: Which ones.

        Returns:
            A place a document, such as ``chats.jsonl:12``.
        """
        return [origin.place for origin in self.origins(indices)]

    def files(self) -> dict[str, str]:
        """Say what was read, and what was left out.

        Returns:
            Names with their rows, as text.
        """
        counted = zip(self.sources, self.statistics.by_source, strict=True)
        files = {"read": _listing([f"{source.name()} ({rows:,} rows)" for source, rows in counted])}
        return files | ({"left out": _listing(self.left_out)} if self.left_out else {})


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def prepare(
    sources: list[Source],
    encoder: Encoder,
    *,
    on_bad_row: Literal["raise", "skip"],
    cache_dir: str | None = None,
    num_proc: int = 1,
) -> TokenizedDataset:
    """Tokenise rows, or find them tokenised in the cache.

    Args:
        sources: Where the rows are.
        encoder: Turns rows into tokens.
        on_bad_row: Whether rows that cannot be used are an error, or left out and counted.
        cache_dir: Where tokenised rows are kept; None: where ``datasets`` keeps its own.
        num_proc: Processes that tokenise; rows and their order do not depend on it.

    Returns:
        The tokenised rows.

    Raises:
        DataError: Rows cannot be used, or none is left.
        ConfigError: The cache cannot be written.
    """
    import datasets

    parts = [encoder.fingerprint(), on_bad_row, *(source.fingerprint() for source in sources)]
    name = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    cache = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "phi3_lightning"
    with _writing(cache, given=cache_dir is not None):
        if not (cache / name).is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=cache))
            try:
                _build(folder, sources, encoder, on_bad_row, num_proc)
                _publish(folder, cache / name)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    try:
        table = datasets.Dataset.from_file(str(cache / name / "data.arrow"))
        statistics = Statistics(**json.loads((cache / name / "statistics.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{cache / name}: tokenised rows that cannot be read ({error}). Delete this folder.") from error
    return TokenizedDataset(table.with_format("numpy", columns=["input_ids", "spans"]), statistics, sources)


@contextmanager
def _writing(cache: Path, *, given: bool) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_WRITTEN:
            raise
        option = f"data.cache_dir: {cache}" if given else f"data.cache_dir: not given, and {cache}"
        raise ConfigError(
            f"{option} cannot be written ({error}). Name a folder that can be written and has room, such as "
            "--data.cache_dir FOLDER"
        ) from error


def _publish(folder: Path, final: Path) -> None:
    try:
        folder.rename(final)  # in one step, so that nobody ever sees half a cache
    except OSError:
        if not final.is_dir():  # another process was faster otherwise, with the same content
            raise


def _build(folder: Path, sources: list[Source], encoder: Encoder, on_bad_row: str, num_proc: int) -> None:
    cut = tokens = supervised = kept = bad_count = 0
    by_source = [0] * len(sources)
    dropped: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    bad: list[str] = []
    with (
        count_progress("tokenising", "rows") as advance,
        pa.OSFile(str(folder / "data.arrow"), "wb") as file,
        pa.ipc.new_stream(file, _SCHEMA) as writer,
    ):
        for chunk in encode_all(_jobs(sources, encoder.options), encoder, num_proc):
            by_source[chunk.source] += chunk.read
            cut += chunk.cut
            dropped.update(chunk.dropped)
            unused.update(chunk.unused)
            bad_count += len(chunk.bad)
            bad += [f"{sources[chunk.source].place(row)}: {why}" for row, why in chunk.bad[: _SHOWN - len(bad)]]
            if len(chunk.lengths):
                writer.write_batch(_record_batch(chunk))
                kept += len(chunk.lengths)
                tokens += int(chunk.lengths.sum())
                supervised += int(
                    (chunk.spans[1::2] - np.maximum(chunk.spans[0::2], 1)).sum()
                )  # a first token never is
            advance(chunk.read)
    _report_bad_rows(bad, bad_count, sum(by_source), on_bad_row)
    statistics = Statistics(
        sum(by_source), kept, cut, dict(dropped), tokens, supervised, dict(unused), by_source=by_source
    )
    if not kept:
        names = ", ".join(sorted({source.name() for source in sources}))
        raise DataError(f"{names}: no row is left to use: {statistics}. Check data.max_length and the rows.")
    (folder / "statistics.json").write_text(json.dumps(asdict(statistics)), encoding="utf-8")


def _report_bad_rows(bad: list[str], count: int, read: int, on_bad_row: str) -> None:
    listing = "\n".join(f"  {line}" for line in bad)
    if count > len(bad):
        listing += f"\n  and {count - len(bad)} more"
    if bad and on_bad_row == "raise":
        raise DataError(
            f"{count} of {read} rows cannot be used:\n{listing}\n"
            "Mend them, or set data.on_bad_row: skip to leave such rows out."
        )
    if bad:
        log.warning("%d of %d rows are left out:\n%s", count, read, listing)


def _jobs(sources: list[Source], options: RowOptions) -> Iterator[Job]:
    for index, source in enumerate(sources):
        rows = source_rows(source, options)
        while part := list(islice(rows, _CHUNK)):
            yield Job(index, part)


def _record_batch(chunk: Chunk) -> pa.RecordBatch:
    def lists(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
        return pa.ListArray.from_arrays(np.cumsum([0, *lengths], dtype=np.int32), pa.array(values))

    count = len(chunk.lengths)
    return pa.record_batch(
        [
            lists(chunk.input_ids, chunk.lengths),
            lists(chunk.spans, chunk.span_lengths),
            pa.array(chunk.lengths),
            pa.array(np.full(count, chunk.source, dtype=np.int32)),
            pa.array(chunk.rows),
            pa.array(chunk.ids, type=pa.string()),
            pa.array(chunk.groups),
            pa.array(chunk.hashes),
        ],
        schema=_SCHEMA,
    )
