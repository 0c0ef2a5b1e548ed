"""Rows that are tokenised during training, for sets larger than the disk.

A stream has no length, so a run needs ``max_steps``. It repeats its sources for ever, each time in another order.
Documents are packed and shuffled within a buffer only, and a run that resumes reads and tokenises again what it has
seen, to find its place.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from phi3_lightning.batch import Batch
from phi3_lightning.data.chunk import Job, note_kinds
from phi3_lightning.data.collate import Document
from phi3_lightning.data.conversation import Kind
from phi3_lightning.data.encode import Encoder
from phi3_lightning.data.packing import Plan
from phi3_lightning.data.sampler import BatchLoader
from phi3_lightning.data.sources import Source
from phi3_lightning.data.tables import source_rows
from phi3_lightning.errors import DataError

log = logging.getLogger(__name__)

_BUFFER_SIZE = 2048  # documents that are packed and shuffled together
_CHUNK_ROWS = 32  # neighbouring rows that go to the same rank and worker
_SOURCE = 2**40  # document ids are this times the source, plus the row


@dataclass(eq=False)
class StreamedBatches(IterableDataset[Batch]):
    """Batches without an end."""

    sources: list[Source]
    encoder: Encoder
    plan: Callable[..., Plan]
    """Plans the batches of a buffer, from the ``lengths`` and ``chosen_lengths`` of its documents and a ``seed``."""
    collate: Callable[[list[list[Document]]], Batch]
    """Makes a batch from the documents of its rows."""
    seed: int
    """Decides the order within a buffer."""
    skip_bad_rows: bool
    """Whether rows that cannot be used are left out instead of stopping the run."""
    num_replicas: int = 1
    rank: int = 0
    position: int = 0
    """Batches that this rank has already seen."""
    logged: set[str] = field(init=False, default_factory=set)
    """Unused fields and reasons of dropped rows that the log has named."""
    kinds: dict[Kind, str] = field(init=False, default_factory=dict)
    """The kind of the rows, with the place of the first."""

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        workers, own = (1, 0) if worker is None else (worker.num_workers, worker.id)
        # Workers deliver in turn: the first one takes the place of the worker whose turn was next when the run stopped.
        own = (own + self.position) % workers
        seen = (self.position - own + workers - 1) // workers
        yield from islice(self._batches(self.rank * workers + own, self.num_replicas * workers), seen, None)

    def describe(self, document_ids: list[int]) -> list[str]:
        """Return the place of each document, such as ``chats.jsonl:12``."""
        return [self.sources[document_id // _SOURCE].place(document_id % _SOURCE) for document_id in document_ids]

    def kind(self) -> Kind:
        """Return the kind of the first row."""
        for index, source in enumerate(self.sources):
            rows = source_rows(source, self.encoder.options)
            while chunk := list(islice(rows, _CHUNK_ROWS)):
                for kind in self.encoder.encode(Job(index, chunk)).kinds:
                    return kind
        return "chat"

    def _batches(self, share: int, shares: int) -> Iterator[Batch]:
        buffers = 0
        while True:
            documents = self._documents(share, shares)
            before = buffers
            while buffer := list(islice(documents, _BUFFER_SIZE)):
                lengths = np.array([len(document.input_ids) for document in buffer], dtype=np.int64)
                chosen = np.array([document.chosen_length for document in buffer], dtype=np.int64)
                rng = np.random.default_rng((self.seed, share, buffers))
                plan = self.plan(
                    lengths=lengths, seed=int(rng.integers(2**63)), chosen_lengths=chosen if chosen.any() else None
                )
                for index in rng.permutation(len(plan)).tolist():
                    yield self.collate([[buffer[document] for document in row] for row in plan[index]])
                buffers += 1
            if buffers == before:
                names = ", ".join(source.name() for source in self.sources)
                raise DataError(
                    f"{names}: too few rows to stream to {shares} readers; set data.streaming: false, or fewer workers"
                )

    def _documents(self, share: int, shares: int) -> Iterator[Document]:
        for index, source in enumerate(self.sources):
            rows = source_rows(source, self.encoder.options)
            for number in count():
                chunk = list(islice(rows, _CHUNK_ROWS))
                if not chunk:
                    break
                if number % shares == share:
                    yield from self._encode(Job(index, chunk), is_first_reader=share == 0)

    def _encode(self, job: Job, *, is_first_reader: bool) -> Iterable[Document]:
        chunk = self.encoder.encode(job)
        note_kinds(self.kinds, chunk, self.sources[job.source])
        faults = [f"{self.sources[job.source].place(row)}: {why}" for row, why in chunk.bad]
        if faults and not self.skip_bad_rows:
            remedy = "Fix the row, or set data.on_bad_row: skip to leave such rows out."
            raise DataError("\n".join([*faults, remedy]))
        if faults:
            log.warning("left out:\n%s", "\n".join(faults))
        if is_first_reader:
            for title, names in (("fields that are not used", chunk.unused), ("rows are dropped", chunk.dropped)):
                if new := sorted(names.keys() - self.logged):
                    self.logged.update(new)
                    log.warning("train: %s: %s", title, ", ".join(new))
        return chunk.documents((chunk.source * _SOURCE + chunk.rows).tolist())


class StreamLoader(BatchLoader):
    """Sets the position of a stream at the moment when the first batch is taken."""

    dataset: StreamedBatches
    position: Callable[[], int]
    """Returns how many batches this rank has already seen."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.dataset.position = self.position()
        yield from super().__iter__()
