"""The position that a checkpoint of Lightning holds, put where a restart goes on to the same bits.

Lightning saves from hooks in the middle of its loops, and restarted there it leaves out a validation, takes half a
window for a whole one, or counts an epoch twice. What follows are mends of the saved position, not of the loops.
"""

from collections.abc import Mapping
from typing import Any, cast

import lightning.pytorch as pl

from phi3_lightning.contracts import PlannedData


def reshard_progress(trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Move the position of a checkpoint that is being loaded to where it is for the ranks and windows of this run.

    Args:
        trainer: The trainer that loads it.
        checkpoint: The checkpoint; its ``loops`` entry is changed in place.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]  # Lightning types it as None
    state = checkpoint.get(type(data).__qualname__)
    if not state or not isinstance(data, PlannedData):
        return
    loops = checkpoint["loops"]["fit_loop"]
    progress = loops["epoch_loop.batch_progress"]
    position = progress["current"]["ready"]
    epoch = loops["epoch_progress"]["current"]["processed"]
    moved = data.reshard_progress(state, epoch, position, trainer.accumulate_grad_batches) - position
    for scope in ("current", "total"):
        for name in progress[scope]:
            progress[scope][name] += moved


def align_loops(trainer: pl.Trainer, loops: dict[str, Any]) -> None:
    """Put the position of a checkpoint that is being written where a restart goes on exactly.

    Args:
        trainer: The trainer that writes it, from whichever hook.
        loops: The ``loops`` entry of the checkpoint; changed in place.
    """
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
    """Let loggers go on at the step that was reached; Lightning's own count is one ahead beside a validation.

    Args:
        trainer: The Trainer that is about to train.
    """
    loop = trainer.fit_loop.epoch_loop
    if trainer.lightning_module.automatic_optimization:  # a batch that steps is a step
        # Lightning takes such a batch for one that steps once more, after the validation or without repeating it
        again = loop.restarting and loop._should_check_val_fx(cast("Any", trainer.fit_loop._data_fetcher))
        loop._batches_that_stepped = trainer.global_step - again


def complete_batch(loops: dict[str, Any], stepped: bool, validates: bool) -> None:
    """Move a position that was saved in ``on_train_batch_end`` to where the batch is over.

    Restarted from within that hook, Lightning leaves out the validation that would have followed, and miscounts the
    epochs where the batch was the last one.

    Args:
        loops: The ``loops`` entry of a checkpoint; changed in place.
        stepped: Whether the batch ended in an optimiser step.
        validates: Whether a validation follows the batch.
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
    """Undo that Lightning counts an epoch that ``max_steps`` or early stopping cut as a whole one.

    Args:
        loops: The ``loops`` entry of a checkpoint that was written before the last batch; changed in place.
    """
    progress = loops["fit_loop"]["epoch_progress"]
    for scope in ("current", "total"):
        ready = progress[scope]["ready"]
        progress[scope] |= {"started": ready, "processed": ready - 1, "completed": ready - 1}


def close_epoch(loops: dict[str, Any]) -> None:
    """Move a position at the end of an epoch without a validation to the start of the next.

    Lightning would take one more batch for the epoch that is over.

    Args:
        loops: The ``loops`` entry of a checkpoint; changed in place.
    """
    epochs, batches = loops["fit_loop"]["epoch_progress"], loops["fit_loop"]["epoch_loop.batch_progress"]
    for scope in ("current", "total"):
        epochs[scope] = dict.fromkeys(epochs[scope], epochs[scope]["ready"])
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False


def rewind_to_window_start(loops: dict[str, Any], accumulate_grad_batches: int) -> None:
    """Move a saved position back to the start of the accumulation window that it cuts.

    The gradients of a half-full window are not saved, so its micro-batches have to be seen again.

    Args:
        loops: The ``loops`` entry of a checkpoint; changed in place.
        accumulate_grad_batches: Micro-batches of a window.
    """
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]
    cut = progress["current"]["ready"] % accumulate_grad_batches
    if cut == 0 or progress["is_last_batch"]:
        return
    for scope in ("current", "total"):
        position = progress[scope]["ready"] - cut
        for state in ("ready", "started", "processed", "completed"):
            progress[scope][state] = position


def repeat_validation(loops: dict[str, Any]) -> None:
    """Make a restart begin with the validation that follows the last batch, from its start.

    Lightning would skip it, or take the part that is left for the whole.

    Args:
        loops: The ``loops`` entry of a checkpoint; changed in place.
    """
    progress = loops["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    progress["current"] = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    # the state in which Lightning sees a validation that has begun and not ended
    progress["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
