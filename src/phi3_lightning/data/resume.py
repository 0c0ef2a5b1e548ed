"""The order of batches in a run that resumes: whether it is the checkpoint's, and which rank takes what is left."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from phi3_lightning.data.sampler import ElasticResume, RankAssignment
from phi3_lightning.errors import CheckpointError

State = Mapping[str, Any]


class ResumedOrder:
    """Compares the order of batches with that of a checkpoint, and lets another number of ranks continue it.

    An order is a mapping of what determines it: ``seed``, ``plan`` and, where memory decided it, ``batch_size``.
    """

    def __init__(self) -> None:
        self.elastic: ElasticResume | None = None
        """Where an epoch was resumed with another number of ranks; None: in no epoch of this run."""
        self._saved: State = {}
        self._resharded = False  # by a module that resumes exactly; under any other, the number of ranks must stay

    def state_dict(self, order: State, ranks: int) -> dict[str, Any]:
        """Return what a checkpoint stores of the order."""
        return {**order, "ranks": ranks, "resumed": None if self.elastic is None else asdict(self.elastic)}

    def load_state_dict(self, state: State) -> None:
        """Remember the order of a checkpoint until training resumes from it."""
        self._saved = state

    def reshard(self, state: State, order: State, now: RankAssignment, epoch: int, position: int, window: int) -> int:
        """Share the rest of an epoch among the ranks that there are now, each batch once.

        Args:
            epoch: The epoch that is resumed.
            position: Batches of each rank that are done, as the checkpoint counts them.
            window: Batches of an accumulation window now.

        Returns:
            Batches of each rank that are done, as they are counted now.
        """
        if any(state.get(key) != order[key] for key in order):
            return position  # another order, which is compared when the epoch begins to be read
        self._resharded = True
        elastic = None if state.get("resumed") is None else ElasticResume(**state["resumed"])
        before = RankAssignment(now.count, state["ranks"], elastic if elastic and elastic.epoch == epoch else None)
        after = before.go_on(now.ranks, epoch, position, window)
        self.elastic = after.resumed
        return position if after is before else after.begin

    def check(self, order: State, trainer: Trainer) -> None:
        """Compare the order now with that of the checkpoint, once, and log what is new from this epoch on.

        Raises:
            CheckpointError: If something has changed within an epoch.
        """
        saved, self._saved = self._saved, {}
        now = order if self._resharded else {**order, "ranks": ranks_of(trainer)["num_replicas"]}
        changes = "; ".join(f"{key} was {saved.get(key)}, now {now[key]}" for key in now if saved.get(key) != now[key])
        if not saved or not changes:
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if progress.current.ready > 0 and not progress.is_last_batch:
            raise CheckpointError(
                f"The checkpoint stopped within an epoch whose order cannot be continued: {changes}; "
                "give the same data, data options, seed and devices, or resume from the end of an epoch"
            )
        rank_zero_info(f"The order of batches is new from this epoch on: {changes}.")


def ranks_of(trainer: Trainer | None) -> dict[str, int]:
    """Return ``num_replicas`` and ``rank``, as samplers take them."""
    ranks = None if trainer is None else trainer.distributed_sampler_kwargs
    return {"num_replicas": 1, "rank": 0} if ranks is None else ranks


def position_of(trainer: Trainer | None) -> int:
    """Return how many batches of this epoch each rank has seen."""
    return 0 if trainer is None else trainer.fit_loop.epoch_loop.batch_progress.current.ready
