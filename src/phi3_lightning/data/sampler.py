"""The order of batches: seed, epoch, rank and position decide it, nothing else."""

from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from phi3_lightning.data.collate import Document
from phi3_lightning.data.packing import Ints, Plan
from phi3_lightning.data.prepare import TokenizedDataset
from phi3_lightning.errors import CheckpointError

FILLER: Final = -1
"""The index of a batch without documents, which evens out ranks."""


@dataclass(frozen=True)
class ElasticResume:
    """Where an epoch went on with another number of ranks, or other windows, than it had begun with.

    Args:
        epoch: Which epoch.
        position: Batches of each rank before, as they are counted now.
        seen: Batches that all ranks together had seen.
    """

    epoch: int
    position: int
    seen: int


@dataclass(frozen=True)
class RankAssignment:
    """Which rank takes which batch of an epoch's order.

    Args:
        count: Batches of an epoch.
        ranks: How many ranks take them.
        resumed: Where this epoch went on otherwise than it had begun; None: it did not.
    """

    count: int
    ranks: int
    resumed: ElasticResume | None = None

    @property
    def length(self) -> int:
        """Batches of each rank, fillers included."""
        return -(-self.count // self.ranks)

    def seen(self, position: int) -> int:
        """Say how many batches all ranks together have seen.

        Args:
            position: Batches of each rank.

        Returns:
            A number of different batches.
        """
        if self.resumed is None:
            return min(position * self.ranks, self.count)
        rest, steps = self.count - self.resumed.seen, self.length - self.resumed.position
        return self.resumed.seen + (position - self.resumed.position) * rest // max(steps, 1)

    def of(self, rank: int, order: Ints, position: int) -> list[int]:
        """Say what a rank has still to see.

        Args:
            rank: Which rank.
            order: The epoch's batches, shape (count,).
            position: Batches of each rank that are over.

        Returns:
            Batches of ``order``, and fillers. After a change of ranks there may be too few batches for all steps: the
            fillers are spread, so that no step is without a batch.
        """
        if self.resumed is None:
            own = order[rank :: self.ranks].tolist()
            return [*own, *[FILLER] * (self.length - len(own))][position:]
        bounds = [self.seen(step) for step in range(position, self.length + 1)]
        own = [start + rank if start + rank < end else None for start, end in pairwise(bounds)]
        return [FILLER if index is None else int(order[index]) for index in own]

    def go_on(self, ranks: int, epoch: int, position: int, window: int) -> "RankAssignment":
        """Let another number of ranks take what is left of an epoch.

        Args:
            ranks: How many there are now.
            epoch: Which epoch.
            position: Batches of each rank that are over, at the end of a window.
            window: Batches of an accumulation window now; a window is never cut.

        Returns:
            The new shares; the same where nothing changes.
        """
        if ranks == self.ranks and (position % window == 0 or position == self.length):
            return self
        seen = self.seen(position)
        if seen == self.count:
            return RankAssignment(self.count, ranks)  # the next epoch is shared out as any other
        return RankAssignment(self.count, ranks, ElasticResume(epoch, seen // ranks // window * window, seen))

    @property
    def begin(self) -> int:
        """The position at which what is left of an epoch begins; its length where nothing is left."""
        return self.length if self.resumed is None else self.resumed.position


class BatchOrder(DistributedSampler[int]):
    """Yields indices of whole batches. Every batch comes once an epoch, on one rank.

    Args:
        batches: What the indices point into.
        seed: With the epoch, decides the order.
        shuffle: Whether each epoch has an order of its own.
        num_replicas: Number of ranks; they take batches in turn.
        rank: This rank.
        position: Says, when an epoch begins to be read, how many batches of it this rank has already seen.
        resumed: Says then where an epoch went on with another number of ranks.
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
        position, resumed = self._position(), self._resumed()
        here = resumed if resumed is not None and resumed.epoch == self.epoch else None
        yield from RankAssignment(self._count, self.num_replicas, here).of(self.rank, order, position)


class BatchLoader(DataLoader[Any]):
    """A DataLoader that reads its place in the epoch when the first batch is asked for.

    Lightning calls ``iter`` before it has worked out where a resumed epoch goes on, and workers begin to read at once.
    Its state is the trainer's progress, so there is none to save; the two methods tell Lightning that it can resume.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept here.

        Returns:
            An empty dict.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing is kept here.

        Args:
            state_dict: What ``state_dict`` returned.
        """


class PlannedBatches(Dataset[Any]):
    """The batches of a plan, by index. Its length is in rows: Lightning's ``BatchSizeFinder`` goes up to it.

    Args:
        prepared: The tokenised documents.
        plan: Which of them make a batch.
        collate: Makes a batch from the documents of its rows; no rows make a filler.
    """

    def __init__(self, prepared: TokenizedDataset, plan: Plan, collate: Callable[[list[list[Document]]], Any]) -> None:
        self._prepared = prepared
        self._plan = plan
        self._collate = collate

    def __len__(self) -> int:
        return len(self._plan.rows) - 1

    @property
    def indices(self) -> range:
        """The index of each batch."""
        return range(len(self._plan))

    def __getitem__(self, index: int) -> Any:
        rows = [] if index == FILLER else self._plan[index]
        documents = iter(self._prepared.documents([document for row in rows for document in row]))
        return self._collate([[next(documents) for _ in row] for row in rows])


def compare_orders(saved: Mapping[str, Any], now: Mapping[str, Any], *, within_epoch: bool) -> str:
    """See whether a resumed run takes its batches in the order of the run before.

    Args:
        saved: Seed and plan of the run before.
        now: Those of this run.
        within_epoch: Whether the run before stopped within an epoch.

    Returns:
        What has changed, in words; empty where nothing has.

    Raises:
        CheckpointError: Something has changed within an epoch.
    """
    changed = "; ".join(f"{key} was {saved.get(key)}, now {now[key]}" for key in now if saved.get(key) != now[key])
    if changed and within_epoch:
        raise CheckpointError(
            f"The checkpoint stopped within an epoch whose order cannot be continued: {changed}. "
            "Give the same data, data options, seed and devices, or resume from the end of an epoch."
        )
    return changed
