"""Only one fit writes into a run's folder at a time."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from phi3_lightning.errors import ConfigError
from phi3_lightning.run_lock import RunLock


class SingleWriter(pl.Callback):
    """Ends a fit, on all ranks, while another fit writes into its folder; processes that only read are not affected.

    The first rank holds a :class:`RunLock` from the start of the fit to its end.
    """

    def __init__(self, folder: str | Path) -> None:
        self._lock = RunLock(folder)
        self._refusal: ConfigError | OSError | None = None

    def claim(self, trainer: pl.Trainer) -> None:
        """Lock the folder before ``trainer.fit``, whose loggers write before a callback's first hook.

        Raises:
            ConfigError: If another fit writes there, and no other rank waits for this one.
            OSError: If nothing can be written there.
        """
        self._acquire(trainer)
        if self._refusal is not None:
            if _alone(trainer):
                raise self._refusal
            trainer.loggers = []

    def _acquire(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and not self._lock.held:
            try:
                self._lock.acquire()
            except (ConfigError, OSError) as error:
                self._refusal = error

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set where mypy does not see it
            return
        if self._refusal is None:
            self._acquire(trainer)
        refusal, self._refusal = trainer.strategy.broadcast(self._refusal), None
        if refusal is not None:
            raise refusal

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._lock.release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, SIGTERMException):  # after it the checkpoint is still written
            self._lock.release()


def _alone(trainer: pl.Trainer) -> bool:
    """Whether this is the only process of the run before the fit, which may start others."""
    strategy = trainer.strategy
    if trainer.world_size == 1 or not isinstance(strategy, ParallelStrategy):
        return True
    environment = strategy.cluster_environment
    return trainer.num_nodes == 1 and environment is not None and not environment.creates_processes_externally
