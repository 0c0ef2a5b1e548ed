"""A request to stop that reaches one rank ends all of them after the same batch."""

import signal
import threading
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override


class AgreedStop(pl.Callback):
    """Ends a fit on several ranks after the same batch when one of them gets SIGTERM; on one rank it does nothing.

    Lightning's own handler starts a collective wherever the signal interrupts the program, which hangs inside another
    collective, and each rank would leave its loop after a batch of its own. Where the fit does not run in the main
    thread, as under Ray Train, Python allows no handler: there :meth:`request` takes the place of the signal.
    """

    def __init__(self) -> None:
        self._requested = False

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._install_handler(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._install_handler(trainer)

    def _install_handler(self, trainer: pl.Trainer) -> None:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if trainer.world_size > 1 and in_main_thread:
            # replaces the handler that the Trainer has just set; at its end the Trainer restores the one before
            signal.signal(signal.SIGTERM, self.request)

    def request(self, *_: Any) -> None:
        """Request the end of the fit, from a signal handler or from another thread."""
        self._requested = True

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._agree(trainer)

    @override
    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if trainer.state.fn == "fit":
            self._agree(trainer)

    def _agree(self, trainer: pl.Trainer) -> None:
        if trainer.world_size == 1:
            return
        requested = torch.tensor(int(self._requested or trainer.received_sigterm), device=trainer.strategy.root_device)
        if trainer.strategy.reduce(requested, reduce_op="max").item():
            trainer._signal_connector.received_sigterm = True  # which the loops check next
