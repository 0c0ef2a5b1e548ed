"""What a checkpoint holds of callbacks: their progress comes back, their options are those of this start.

Lightning restores whatever a callback has put into its state, options too: ``EarlyStopping`` its ``patience``. Here an
option is an argument of the constructor that is kept under its own name, with or without an underscore before it.
"""

import inspect
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

OPTIONS = "callback_options"
"""Key under which a checkpoint says with which options its callbacks were made."""


def options(callback: pl.Callback) -> dict[str, Any]:
    """Return the attributes of a callback that are named as arguments of its constructor.

    Args:
        callback: Any callback.
    """
    constructors = [vars(cls)["__init__"] for cls in type(callback).__mro__ if "__init__" in vars(cls)]
    arguments = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
    return {name: value for name, value in vars(callback).items() if name.removeprefix("_") in arguments}


def plain_options(trainer: pl.Trainer) -> dict[str, dict[str, Any]]:
    """Return the options of a Trainer's callbacks that a checkpoint can hold, by ``state_key``.

    Args:
        trainer: The Trainer, before any callback has changed anything.
    """
    return {
        callback.state_key: {name: _copied(value) for name, value in options(callback).items() if _is_plain(value)}
        for callback in trainer.callbacks  # type: ignore[attr-defined]  # set in a place that type checkers do not see
    }


def _copied(value: Any) -> Any:
    return deepcopy(value) if _is_plain(value) else value  # a callback may change its list while it loads


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return _is_plain([*value.keys(), *value.values()])
    return value is None or type(value) in (bool, int, float, str)


def keep_options(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Let the callbacks' options of this start decide over those of a checkpoint that is about to be loaded.

    An option that is as it was when the checkpoint's run was started is left to the callback, which may have changed
    it by itself. A ``Timer`` begins anew, since its time is that of one start, and ``EarlyStopping`` has not stopped
    a run that goes on.

    Args:
        trainer: The Trainer that loads it.
        checkpoint: The checkpoint, before the callbacks have seen it; their states are changed in place.
    """
    states, former = checkpoint.get("callbacks", {}), checkpoint.get(OPTIONS, {})
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        state = states.get(callback.state_key)
        if state and isinstance(callback, Timer):
            state.pop("time_elapsed", None)
        if state and isinstance(callback, EarlyStopping):
            state |= {"stopping_reason": EarlyStoppingReason.NOT_STOPPED.value, "stopping_reason_message": None}
        if state:
            _load_all_but(callback, former.get(callback.state_key, {}))


def _load_all_but(callback: pl.Callback, former: dict[str, Any]) -> None:
    """Put changed options back right after the next ``load_state_dict``: the first hook may need them."""

    def load_and_put_back(state: dict[str, Any]) -> None:
        del vars(callback)["load_state_dict"]  # the method of the class again
        mine = {name: _copied(value) for name, value in options(callback).items()}
        callback.load_state_dict(state)
        vars(callback).update(
            {name: value for name, value in mine.items() if name not in former or former[name] != value}
        )

    vars(callback)["load_state_dict"] = load_and_put_back
