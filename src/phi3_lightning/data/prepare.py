"""Tokenises sources into an Arrow file in a cache, whose key is a hash of all that decides its content."""

import hashlib
import json
import logging
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Literal
from uuid import uuid4

import numpy as np
import pyarrow as pa

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.bad_rows import LISTED_PLACES, BadRows
from phi3_lightning.data.chunk import Chunk, Job, note_kinds
from phi3_lightning.data.code_fingerprint import code_fingerprint
from phi3_lightning.data.conversation import Kind
from phi3_lightning.data.encode import Encoder, encode_all
from phi3_lightning.data.sources import Source
from phi3_lightning.data.tables import source_rows
from phi3_lightning.data.tokenized import Statistics, TokenizedDataset
from phi3_lightning.errors import ConfigError, DataError
from phi3_lightning.files import remedy
from phi3_lightning.progress import count_progress

log = logging.getLogger(__name__)

_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "spans": pa.list_(pa.int32()),
        "length": pa.int32(),
        "chosen_length": pa.int32(),
        "shared_length": pa.int32(),
        "preferred": pa.bool_(),
        "source": pa.int32(),
        "row": pa.int64(),
        "id": pa.string(),
        "group": pa.int64(),
        "hash": pa.int64(),
    }
)
_CHUNK_ROWS = 512  # tokenised and written together


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
        on_bad_row: Whether rows that cannot be used are an error, or left out and counted.
        cache_dir: Folder of tokenised rows; None: the cache of ``datasets``.
        num_proc: Processes that tokenise; rows and their order do not depend on it.

    Raises:
        DataError: If rows cannot be used, none is left, or they are of two kinds.
        ConfigError: If the cache cannot be written.
    """
    import datasets

    inputs = [code_fingerprint(__name__), encoder.fingerprint(), on_bad_row]
    inputs += [source.fingerprint() for source in sources]
    cache = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "phi3_lightning"
    final = cache / hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16).hexdigest()
    with _writing(cache, "" if cache_dir else "not given, and "):
        if not final.is_dir():
            folder = cache / f"{final.name}-{uuid4().hex}"  # by mkdir: only its maker could read one of tempfile's
            folder.mkdir(parents=True)
            try:
                _build(folder, sources, encoder, on_bad_row, num_proc)
                _publish(folder, final)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    try:
        table = datasets.Dataset.from_file(str(final / "data.arrow"))
        statistics = Statistics(**json.loads((final / "statistics.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{final}: the tokenised rows cannot be read ({error}); delete this folder") from error
    return TokenizedDataset(table.with_format("numpy", columns=["input_ids", "spans"]), statistics, sources)


@contextmanager
def _writing(cache: Path, not_given: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if remedy(error) is None:
            raise
        raise ConfigError(
            f"data.cache_dir: {not_given}{cache} cannot be written ({error}); name a folder that can be written and "
            "has room, such as --data.cache_dir FOLDER"
        ) from error


def _publish(folder: Path, final: Path) -> None:
    try:
        folder.rename(final)  # in one step, so that nobody ever sees half a cache
    except OSError:
        if not final.is_dir():  # another process may have made it meanwhile, with the same content
            raise


def _build(folder: Path, sources: list[Source], encoder: Encoder, on_bad_row: str, num_proc: int) -> None:
    """Write the rows of all sources, and their statistics, into a folder."""
    totals = Counter(kept=0, cut=0, empty=0, tokens=0, supervised_tokens=0)
    by_source = [0] * len(sources)
    dropped: Counter[str] = Counter()
    dropped_rows: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    unused: Counter[str] = Counter()
    kinds: dict[Kind, str] = {}
    bad = BadRows()
    with (
        count_progress("tokenising", "rows") as advance,
        pa.OSFile(str(folder / "data.arrow"), "wb") as file,
        pa.ipc.new_stream(file, _SCHEMA) as writer,
    ):
        for chunk in encode_all(_jobs(sources, encoder.options), encoder, num_proc):
            note_kinds(kinds, chunk, sources[chunk.source])
            by_source[chunk.source] += chunk.read
            dropped.update(chunk.dropped)
            for reason, rows in chunk.dropped_rows.items():
                first = dropped_rows[reason]
                first += [(chunk.source, row) for row in rows[: LISTED_PLACES - len(first)]]
            unused.update(chunk.unused)
            for row, why in chunk.bad:
                bad.add(sources[chunk.source].place(row), why)
            supervised = chunk.spans[1::2] - np.maximum(chunk.spans[0::2], 1)  # a first token never is
            totals.update(kept=len(chunk.lengths), cut=chunk.cut, empty=chunk.empty)
            totals.update(tokens=int(chunk.lengths.sum()), supervised_tokens=int(supervised.sum()))
            if len(chunk.lengths):
                writer.write_batch(_record_batch(chunk))
            advance(chunk.read)
    if bad.count and on_bad_row == "raise":
        raise DataError(bad.error(sum(by_source)))
    if bad.count:
        log.warning("%d of %d rows are left out:\n%s", bad.count, sum(by_source), bad)
    statistics = Statistics(
        read=sum(by_source),
        dropped=dict(dropped),
        dropped_rows=dict(dropped_rows),
        unused=dict(unused),
        by_source=by_source,
        kind=next(iter(kinds), "chat"),
        **totals,
    )
    if not statistics.kept:
        names = ", ".join(sorted({source.name() for source in sources}))
        raise DataError(f"{names}: no row is left to use: {statistics}; check data.max_length and the rows")
    (folder / "statistics.json").write_text(json.dumps(asdict(statistics)), encoding="utf-8")


def _jobs(sources: list[Source], options: RowOptions) -> Iterator[Job]:
    for index, source in enumerate(sources):
        rows = source_rows(source, options)
        while chunk := list(islice(rows, _CHUNK_ROWS)):
            yield Job(index, chunk)


def _record_batch(chunk: Chunk) -> pa.RecordBatch:
    def lists(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
        return pa.ListArray.from_arrays(np.cumsum([0, *lengths], dtype=np.int32), pa.array(values))

    count = len(chunk.lengths)
    return pa.record_batch(
        [
            lists(chunk.input_ids, chunk.lengths),
            lists(chunk.spans, chunk.span_lengths),
            pa.array(chunk.lengths),
            pa.array(chunk.chosen_lengths),
            pa.array(chunk.shared_lengths),
            pa.array(chunk.preferred),
            pa.array(np.full(count, chunk.source, dtype=np.int32)),
            pa.array(chunk.rows),
            pa.array(chunk.ids, type=pa.string()),
            pa.array(chunk.groups),
            pa.array(chunk.hashes),
        ],
        schema=_SCHEMA,
    )
