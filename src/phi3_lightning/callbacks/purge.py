"""A resumed run shows one curve: TensorBoard drops the values that were logged after the checkpoint."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from typing_extensions import override

from phi3_lightning.callbacks.tensorboard import boards
from phi3_lightning.event_files import event_files, read_events, tag_of


class PurgeOvertaken(pl.Callback):
    """Makes TensorBoard show one value for each step of a resumed run: the one that led to the model.

    It works on every ``TensorBoardLogger`` that writes into the same folder as before, and has to come before callbacks
    that log when training starts. Nothing is deleted: an event tells TensorBoard which values to drop.
    """

    def __init__(self) -> None:
        self._repeated: int | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        validation = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
        repeats = validation.ready > validation.completed  # it is logged at the step before
        start = trainer.global_step - repeats
        for writer in boards(trainer):
            writer.flush()
            if trainer.global_step or len(event_files(Path(writer.log_dir))) > 1:
                for _ in range(2):  # TensorBoard takes the very first such event only as a sign that they exist
                    writer.file_writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), start)
                self._repeated = start if repeats else None

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._log_unrepeated(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_unrepeated(trainer)

    def _log_unrepeated(self, trainer: pl.Trainer) -> None:
        """Log again the values of training at the step whose validation was repeated."""
        step, self._repeated = self._repeated, None
        if step is None:
            return
        for writer in boards(trainer):
            writer.flush()
            *before, own = event_files(Path(writer.log_dir))
            repeated = {tag_of(event) for event in read_events(own) if event.step == step}
            last = {tag_of(event): event for path in before for event in read_events(path) if event.step == step}
            for tag, event in last.items():
                if tag is not None and tag not in repeated:
                    writer.file_writer.add_event(event, step, event.wall_time)
