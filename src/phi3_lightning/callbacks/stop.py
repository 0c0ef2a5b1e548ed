"""A request to stop, heard by one rank and kept by all."""

import signal
import threading
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override


class AgreedStop(pl.Callback):
    """Ends a fit on several ranks after the same batch when one of them gets SIGTERM; on one rank it does nothing.

    Lightning's own handler starts a collective wherever the signal finds the program, which hangs when it meets
    another, and each rank would leave its loop after a batch of its own. Where the fit runs in another thread than the
    main one, as under Ray Train, Python allows no handler: there :meth:`request` is what a signal would be.
    """

    def __init__(self) -> None:
        self._asked = False

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen(trainer)

    def _listen(self, trainer: pl.Trainer) -> None:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if trainer.world_size > 1 and in_main_thread:
            # in place of the Trainer's handler, which it set just now; at the end it puts back what was there before
            signal.signal(signal.SIGTERM, self.request)

    def request(self, *_: Any) -> None:
        """Ask for the end of the fit, from a signal handler or from another thread."""
        self._asked = True

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
        asked = torch.tensor(int(self._asked or trainer.received_sigterm), device=trainer.strategy.root_device)
        if trainer.strategy.reduce(asked, reduce_op="max").item():
            trainer._signal_connector.received_sigterm = True  # what the loops look at next
