"""The position that a checkpoint of Lightning holds, corrected so that a resumed run ends in the same bits.

Lightning saves from hooks in the middle of its loops. Resumed there, it skips a validation, takes half a window for a
full one, or counts an epoch twice. These functions change the saved position (the ``loops`` of a checkpoint, in place)
and not the loops.
"""

import os
from collections.abc import Mapping
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch

from phi3_lightning.contracts import PlannedData, data_module


def reshard_progress(trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Convert the position of a checkpoint that is being loaded to the ranks and windows of this run."""
    data = data_module(trainer)
    state = checkpoint.get(type(data).__qualname__)
    if not state or not isinstance(data, PlannedData):
        return
    loops = checkpoint["loops"]["fit_loop"]
    progress = loops["epoch_loop.batch_progress"]
    position = progress["current"]["ready"]
    epoch = loops["epoch_progress"]["current"]["processed"]
    shift = data.reshard_progress(state, epoch, position, trainer.accumulate_grad_batches) - position
    for scope in ("current", "total"):
        for name in progress[scope]:
            progress[scope][name] += shift


def align_loops(trainer: pl.Trainer, loops: dict[str, Any]) -> None:
    """Move the position of a checkpoint that is being written to where a run resumes exactly."""
    if trainer.fit_loop._combined_loader is None:  # Lightning's tuners save before there is a position
        return
    loop = trainer.fit_loop.epoch_loop
    validates = loop._should_check_val_fx(cast("Any", trainer.fit_loop._data_fetcher))
    if trainer.training:
        complete_batch(loops, stepped=not loop._should_accumulate(), validates=validates)
    if loop.batch_progress.current.ready > 0 and not loop._num_ready_batches_reached():
        reopen_epoch(loops)
    elif loop.batch_progress.current.ready > 0 and not validates:
        close_epoch(loops)
    rewind_to_window_start(loops, trainer.accumulate_grad_batches)


def align_steps(trainer: pl.Trainer) -> None:
    """Set the step of loggers to the one that was reached; Lightning's count is one ahead at a validation."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.lightning_module.automatic_optimization:  # a batch that steps is a step
        # Lightning takes such a batch for one that steps once more, after the validation or without repeating it
        again = loop.restarting and loop._should_check_val_fx(cast("Any", trainer.fit_loop._data_fetcher))
        loop._batches_that_stepped = trainer.global_step - again


def seed_by_position(epoch: int, batch: int, rank: int) -> None:
    """Seed torch by the position in the run, so that a resumed run needs no random state."""
    seed = [int(os.environ.get("PL_GLOBAL_SEED", "0")), epoch, batch, rank]
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))


def complete_batch(loops: dict[str, Any], stepped: bool, validates: bool) -> None:
    """Move a position that was saved in ``on_train_batch_end`` to the end of the batch.

    Resumed within that hook, Lightning skips the validation that would have followed, and miscounts the epochs where
    the batch was the last one.
    """
    epoch_loop = {key.removeprefix("epoch_loop."): value for key, value in loops["fit_loop"].items()}
    progress = epoch_loop["batch_progress"]
    if progress["current"]["completed"] == progress["current"]["processed"]:
        return  # not in that hook
    for scope in ("current", "total"):
        progress[scope]["completed"] = progress[scope]["processed"]
    epoch_loop["state_dict"]["_batches_that_stepped"] += stepped
    if validates:
        repeat_validation(loops)


def reopen_epoch(loops: dict[str, Any]) -> None:
    """Undo that Lightning counts an epoch that ``max_steps`` or early stopping has cut as a complete one."""
    progress = loops["fit_loop"]["epoch_progress"]
    for scope in ("current", "total"):
        ready = progress[scope]["ready"]
        progress[scope] |= {"started": ready, "processed": ready - 1, "completed": ready - 1}


def close_epoch(loops: dict[str, Any]) -> None:
    """Move a position at the end of an epoch without a validation to the next start, which Lightning would miss."""
    epochs, batches = loops["fit_loop"]["epoch_progress"], loops["fit_loop"]["epoch_loop.batch_progress"]
    for scope in ("current", "total"):
        epochs[scope] = dict.fromkeys(epochs[scope], epochs[scope]["ready"])
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False


def rewind_to_window_start(loops: dict[str, Any], accumulate_grad_batches: int) -> None:
    """Move a saved position back to the start of the window that it cuts, whose gradients are not saved."""
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]
    cut = progress["current"]["ready"] % accumulate_grad_batches
    if cut == 0 or progress["is_last_batch"]:
        return
    for scope in ("current", "total"):
        progress[scope] |= dict.fromkeys(("ready", "started", "processed", "completed"), progress[scope]["ready"] - cut)


def repeat_validation(loops: dict[str, Any]) -> None:
    """Make a resumed run begin with the validation after the last batch, which Lightning would skip or cut."""
    progress = loops["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    progress["current"] = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    # the state in which Lightning sees a validation that has begun and not ended
    progress["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
