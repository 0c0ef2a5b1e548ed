"""The order of batches: seed, epoch, rank and position decide it, nothing else."""

from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any, Final

import numpy as np
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from phi3_lightning.data.collate import Document
from phi3_lightning.data.packing import Plan
from phi3_lightning.data.prepare import Prepared
from phi3_lightning.errors import CheckpointError

FILLER: Final = -1
"""The index of a batch without documents, which evens out ranks."""


class BatchOrder(DistributedSampler[int]):
    """Yields indices of whole batches. Every batch comes once an epoch, on one rank.

    Args:
        batches: What the indices point into.
        seed: With the epoch, decides the order.
        shuffle: Whether each epoch has an order of its own.
        num_replicas: Number of ranks; they take batches in turn.
        rank: This rank.
        position: Says, when an epoch begins to be read, how many batches of it this rank has already seen.
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
    ) -> None:
        super().__init__(batches, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self._count = len(batches)
        self._position = position

    def __len__(self) -> int:
        return -(-self._count // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self._count)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self._count)
        own = order[self.rank :: self.num_replicas]
        padded = np.pad(own, (0, len(self) - len(own)), constant_values=FILLER)
        yield from padded[self._position() :].tolist()


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
    """The batches of a plan, by index.

    Args:
        prepared: The tokenised documents.
        plan: Which of them make a batch.
        collate: Makes a batch from the documents of its rows; no rows make a filler.
    """

    def __init__(self, prepared: Prepared, plan: Plan, collate: Callable[[list[list[Document]]], Any]) -> None:
        self._prepared = prepared
        self._plan = plan
        self._collate = collate

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> Any:
        rows = [] if index == FILLER else self._plan[index]
        documents = iter(self._prepared.documents([document for row in rows for document in row]))
        return self._collate([[next(documents) for _ in row] for row in rows])


def compare_orders(saved: Mapping[str, Any], now: Mapping[str, Any], *, within_epoch: bool) -> str:
    """See whether a resumed run takes its batches in the order of the run before.

    Args:
        saved: Seed, ranks and plan of the run before.
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
