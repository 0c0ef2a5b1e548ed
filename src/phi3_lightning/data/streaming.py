"""Rows that are tokenised while training goes on, for sets larger than the disk.

A stream has no length, so a run needs ``max_steps``. It repeats its sources for ever, each time in another order. What
it cannot do as well as prepared data: documents are packed and mixed within a window only, and a run that goes on reads
and tokenises again what it has seen, to find its place.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from phi3_lightning.batch import Batch
from phi3_lightning.data.collate import Document
from phi3_lightning.data.encode import Chunk, Encoder, Job
from phi3_lightning.data.packing import Plan
from phi3_lightning.data.sampler import BatchLoader
from phi3_lightning.data.sources import Source
from phi3_lightning.data.tables import source_rows
from phi3_lightning.errors import ConfigError, DataError

log = logging.getLogger(__name__)

_WINDOW = 2048  # documents that are packed and mixed together
_CHUNK = 32  # neighbouring rows that go to the same rank and worker
_SOURCE = 2**40  # row ids hold the source above this, and the row below


class StreamedBatches(IterableDataset[Batch]):
    """Batches without an end.

    Args:
        sources: Where rows are.
        encoder: Turns rows into tokens.
        plan: Says which documents of a window make a batch, from their ``lengths`` and a ``seed``.
        collate: Makes a batch from the documents of its rows.
        seed: Decides the order within a window.
        skip_bad_rows: Whether rows that cannot be used are left out instead of stopping the run.
        num_replicas: Number of ranks, which divide the rows between them.
        rank: This rank.
    """

    def __init__(
        self,
        sources: list[Source],
        encoder: Encoder,
        plan: Callable[..., Plan],
        collate: Callable[[list[list[Document]]], Batch],
        *,
        seed: int,
        skip_bad_rows: bool,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.sources = sources
        self.position = 0
        self._encoder = encoder
        self._plan = plan
        self._collate = collate
        self._seed = seed
        self._skip_bad_rows = skip_bad_rows
        self._num_replicas = num_replicas
        self._rank = rank
        self._unused: set[str] = set()  # fields that the log has named

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        workers, own = (1, 0) if worker is None else (worker.num_workers, worker.id)
        # Workers deliver in turn: the first one goes on as the worker whose turn it was when the run stopped.
        own = (own + self.position) % workers
        seen = (self.position - own + workers - 1) // workers
        yield from islice(self._batches(self._rank * workers + own, self._num_replicas * workers), seen, None)

    def describe(self, document_ids: list[int]) -> list[str]:
        """Say where documents came from.

        Args:
            document_ids: What batches carry as ``document_ids``.

        Returns:
            A place a document, such as ``chats.jsonl:12``.
        """
        return [self.sources[document_id // _SOURCE].place(document_id % _SOURCE) for document_id in document_ids]

    def _batches(self, share: int, shares: int) -> Iterator[Batch]:
        windows = 0
        while True:
            documents = self._documents(share, shares)
            before = windows
            while window := list(islice(documents, _WINDOW)):
                lengths = np.array([len(document.input_ids) for document in window], dtype=np.int64)
                rng = np.random.default_rng((self._seed, share, windows))
                plan = self._plan(lengths=lengths, seed=int(rng.integers(2**63)))
                for index in rng.permutation(len(plan)).tolist():
                    yield self._collate([[window[document] for document in row] for row in plan[index]])
                windows += 1
            if windows == before:
                names = ", ".join(source.name() for source in self.sources)
                raise DataError(
                    f"{names}: too few rows to stream to {shares} readers; set data.streaming: false, or fewer workers."
                )

    def _documents(self, share: int, shares: int) -> Iterator[Document]:
        for source, given in enumerate(self.sources):
            rows = source_rows(given, self._encoder.options)
            for index in count():
                chunk = list(islice(rows, _CHUNK))
                if not chunk:
                    break
                if index % shares == share:
                    yield from self._encode(Job(source, chunk), log_unused=share == 0)

    def _encode(self, job: Job, *, log_unused: bool) -> Iterable[Document]:
        chunk = self._encoder.encode(job)
        if log_unused and (unused := sorted(chunk.unused.keys() - self._unused)):
            self._unused.update(unused)
            log.warning("train: fields that are not used: %s", ", ".join(unused))
        faults = [f"{self.sources[job.source].place(row)}: {why}" for row, why in chunk.bad]
        if faults and not self._skip_bad_rows:
            remedy = "Mend the row, or set data.on_bad_row: skip to leave such rows out."
            raise DataError("\n".join([*faults, remedy]))
        if faults:
            log.warning("left out:\n%s", "\n".join(faults))
        return _documents_of(chunk)


class StreamLoader(BatchLoader):
    """Tells a stream where to go on, at the moment when the first batch is asked for.

    Attributes:
        dataset: The stream.
        position: Says how many batches this rank has already seen.
    """

    dataset: StreamedBatches
    position: Callable[[], int]

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.dataset.position = self.position()
        yield from super().__iter__()


def _documents_of(chunk: Chunk) -> Iterator[Document]:
    ids = np.split(chunk.input_ids, np.cumsum(chunk.lengths)[:-1])
    spans = np.split(chunk.spans, np.cumsum(chunk.span_lengths)[:-1])
    for row, document, span in zip(chunk.rows.tolist(), ids, spans, strict=False):
        yield Document(chunk.source * _SOURCE + row, document, span)


def check_trainer(max_steps: int, val_check_interval: float, *, validates: bool) -> None:
    """See that a run on a stream comes to its end, and to its validation.

    Args:
        max_steps: What the Trainer was given.
        val_check_interval: What the Trainer was given.
        validates: Whether there are validation data.

    Raises:
        ConfigError: One of them would never happen.
    """
    if max_steps == -1:
        raise ConfigError("trainer.max_steps: not given; data.streaming has no end, so say after how many steps.")
    if validates and val_check_interval == 1.0:
        raise ConfigError(
            "trainer.val_check_interval: data.streaming has no epochs to validate after; give a number of batches."
        )
