"""The order of batches, which seed, epoch, rank and position alone determine."""

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from phi3_lightning.data.collate import Document
from phi3_lightning.data.encode import fork_safe_tokenizers
from phi3_lightning.data.packing import Ints, Plan
from phi3_lightning.data.tokenized import TokenizedDataset

FILLER: Final = -1
"""The index of a batch without documents, which evens out ranks."""


@dataclass(frozen=True)
class ElasticResume:
    """Where an epoch was resumed with other ranks, or other accumulation windows, than it had begun with."""

    epoch: int
    position: int
    """Batches of each rank before, as they are counted now."""
    seen: int
    """Batches that all ranks together had seen."""


@dataclass(frozen=True)
class RankAssignment:
    """Which rank takes which batch of an epoch's order."""

    count: int
    """Batches of an epoch."""
    ranks: int
    resumed: ElasticResume | None = None
    """Where this epoch was resumed otherwise than it had begun; None: nowhere."""

    @property
    def length(self) -> int:
        """Batches of each rank, fillers included."""
        return -(-self.count // self.ranks)

    def seen(self, position: int) -> int:
        """Return how many different batches all ranks together have seen when each has seen ``position``."""
        if self.resumed is None:
            return min(position * self.ranks, self.count)
        rest, steps = self.count - self.resumed.seen, self.length - self.resumed.position
        return self.resumed.seen + (position - self.resumed.position) * rest // max(steps, 1)

    def of(self, rank: int, order: Ints, position: int) -> list[int]:
        """Return the batches, and fillers, that a rank has yet to see.

        After a change of ranks there may be too few batches for all steps: the fillers are spread, so that no step is
        without a batch. ``order`` is the epoch's batches, shape (count,); ``position`` of each rank's are done.
        """
        if self.resumed is None:
            own = order[rank :: self.ranks].tolist()
            return [*own, *[FILLER] * (self.length - len(own))][position:]
        bounds = [self.seen(step) for step in range(position, self.length + 1)]
        own = [start + rank if start + rank < end else None for start, end in pairwise(bounds)]
        return [FILLER if index is None else int(order[index]) for index in own]

    def go_on(self, ranks: int, epoch: int, position: int, window: int) -> "RankAssignment":
        """Share the rest of an epoch among another number of ranks.

        Args:
            epoch: The epoch that is resumed.
            position: Batches of each rank that are done, at the end of an accumulation window.
            window: Batches of an accumulation window now; no window is ever cut.

        Returns:
            The new assignment; this one where nothing changes.
        """
        if ranks == self.ranks and (position % window == 0 or position == self.length):
            return self
        seen = self.seen(position)
        if seen == self.count:
            return RankAssignment(self.count, ranks)  # the next epoch is assigned as any other
        return RankAssignment(self.count, ranks, ElasticResume(epoch, seen // ranks // window * window, seen))

    @property
    def begin(self) -> int:
        """The position at which the rest of an epoch begins; its length where nothing is left."""
        return self.length if self.resumed is None else self.resumed.position


class BatchOrder(DistributedSampler[int]):
    """Yields indices of whole batches. Every batch comes once an epoch, on one rank; ranks take them in turn.

    Args:
        batches: What the indices point into.
        shuffle: Whether each epoch has an order of its own, by the seed.
        position: Returns, when an epoch begins to be read, how many of its batches this rank has already seen.
        resumed: Returns at that moment where an epoch was resumed with another number of ranks.
    """

    def __init__(
        self,
        batches: Sized,
        *,
        seed: int,
        shuffle: bool,
        num_replicas: int = 1,
        rank: int = 0,
        position: Callable[[], int] = lambda: 0,
        resumed: Callable[[], ElasticResume | None] = lambda: None,
    ) -> None:
        super().__init__(batches, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self._count = len(batches)
        self._position = position
        self._resumed = resumed

    def __len__(self) -> int:
        return RankAssignment(self._count, self.num_replicas).length

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self._count)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self._count)
        position, resume = self._position(), self._resumed()
        here = resume if resume is not None and resume.epoch == self.epoch else None
        yield from RankAssignment(self._count, self.num_replicas, here).of(self.rank, order, position)


class BatchLoader(DataLoader[Any]):
    """A DataLoader that reads its place in the epoch when its first batch is taken.

    Lightning calls ``iter`` before it knows where a resumed epoch continues, and workers begin to read at once.
    The place is the trainer's progress, so that the loader has no state; its two methods tell Lightning that it can
    resume.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        with fork_safe_tokenizers():
            batches = super().__iter__()  # which starts the workers
        yield from batches

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


@dataclass(eq=False)
class PlannedBatches(Dataset[Any]):
    """The batches of a plan, by index. Its length is in rows, up to which Lightning's ``BatchSizeFinder`` searches."""

    prepared: TokenizedDataset
    plan: Plan
    collate: Callable[[list[list[Document]]], Any]
    """Makes a batch from the documents of its rows; no rows make a filler."""

    def __len__(self) -> int:
        return len(self.plan.rows) - 1

    @property
    def indices(self) -> range:
        """The index of each batch."""
        return range(len(self.plan))

    def __getitem__(self, index: int) -> Any:
        rows = [] if index == FILLER else self.plan[index]
        documents = iter(self.prepared.documents([document for row in rows for document in row]))
        return self.collate([[next(documents) for _ in row] for row in rows])
