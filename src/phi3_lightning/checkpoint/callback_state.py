"""Callbacks in a checkpoint: their progress is restored, their options are those of the present command.

Lightning restores whatever a callback has put into its state, including options, such as ``patience`` of
``EarlyStopping``. An option is an argument of the constructor that is stored under its name, with or without a leading
underscore.
"""

import inspect
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

OPTIONS = "callback_options"
"""Key of the options of a checkpoint's callbacks."""


def options(callback: pl.Callback) -> dict[str, Any]:
    """Return the attributes of a callback that are named as arguments of its constructor."""
    constructors = [vars(cls)["__init__"] for cls in type(callback).__mro__ if "__init__" in vars(cls)]
    arguments = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
    return {name: value for name, value in vars(callback).items() if name.removeprefix("_") in arguments}


def plain_options(trainer: pl.Trainer) -> dict[str, dict[str, Any]]:
    """Return the options of a Trainer's callbacks that a checkpoint can hold, by ``state_key``."""
    return {
        callback.state_key: {name: _copied(value) for name, value in options(callback).items() if _is_plain(value)}
        for callback in trainer.callbacks  # type: ignore[attr-defined]
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
    """Make the present options of callbacks win over those of a checkpoint that is about to be loaded, in place.

    An option that is as it was when the checkpoint's run was started is left to the callback, which may have changed
    it by itself. A ``Timer`` starts again, since it measures one start, and ``EarlyStopping`` has not stopped a run
    that is resumed.
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
        present = {name: _copied(value) for name, value in options(callback).items()}
        callback.load_state_dict(state)
        vars(callback).update(
            {name: value for name, value in present.items() if name not in former or former[name] != value}
        )

    vars(callback)["load_state_dict"] = load_and_put_back
