"""Options of the Trainer and its callbacks that cannot work, in one line that names the option."""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from traceback import walk_tb
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from phi3_lightning.callbacks import RunCheckpoint
from phi3_lightning.config import Objective
from phi3_lightning.config.checks import require
from phi3_lightning.errors import ConfigError, Phi3LightningError
from phi3_lightning.metrics import PreferenceMetrics, TokenMetrics

_LEAST = {
    "accumulate_grad_batches": (1, "1 steps after each micro-batch"),
    "gradient_clip_val": (0, "1.0 is usual, null does not clip"),
    "check_val_every_n_epoch": (1, "1 validates in each epoch"),
    "log_every_n_steps": (0, "0 logs nothing"),
    "num_sanity_val_steps": (-1, "0 checks nothing, -1 all validation data"),
    "min_epochs": (0, "null is no minimum"),
    "min_steps": (0, "null is no minimum"),
}
"""Minimum useful values; Lightning accepts lower ones, and fails on them later or not at all."""


def check_ranges(section: Mapping[str, Any]) -> None:
    """Raise a ConfigError for a number of the section ``trainer`` that Lightning accepts and cannot train with."""
    for name, (least, remedy) in _LEAST.items():
        value = section.get(name)
        if value is not None:
            require(value >= least, f"trainer.{name}", value, f"it is {least} or more; {remedy}")
    every = section.get("val_check_interval")
    if isinstance(every, int | float):
        require(every > 0, "trainer.val_check_interval", every, "it is above 0; limit_val_batches: 0 never validates")


def without_extras(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the section ``trainer`` that ``barebones`` must switch off."""
    return {name: None for name in ("log_every_n_steps", "num_sanity_val_steps") if section.get(name) is not None}


@contextmanager
def refused_by_name(section: Mapping[str, Any], *, building: bool) -> Iterator[None]:
    """Turn Lightning's errors about its options into a ConfigError that names the option.

    Args:
        section: The section ``trainer`` of a configuration, as the user wrote it.
        building: Whether only the Trainer and its parts are being made, so that every error of Lightning's is about an
            option; else the message must name one. Exceptions of other origin stay what they are.
    """
    try:
        yield
    except Phi3LightningError:
        raise
    except Exception as error:
        origin = _origin(error)
        words = _words(section)
        message = " ".join(str(origin).split())
        refusing_class = type(_frame(origin).f_locals.get("self")).__name__
        if refusing_class not in message and any(refusing_class in own for own in words.values()):
            message = f"{refusing_class}: {message}"
        name = _first(message, words)
        if name is None and building:
            name = _first(message.lower(), {option: _texts(value) for option, value in section.items()})
        if not _of_lightning(origin) or (name is None and not building):
            raise
        value = None if name is None else section.get(name)
        refusal = f"{value!r} cannot be used: " if isinstance(value, str | int | float) else ""
        raise ConfigError(f"trainer{'' if name is None else f'.{name}'}: {refusal}{message}") from error


def _origin(error: BaseException) -> BaseException:
    """The exception that the parser wrapped, where it was making an object from ``class_path``."""
    while _module(error).startswith("jsonargparse") and (cause := error.__cause__ or error.__context__):
        error = cause
    return error


def _frame(error: BaseException) -> FrameType:
    """The frame in which an exception was raised."""
    return [frame for frame, _ in walk_tb(error.__traceback__)][-1]


def _module(error: BaseException) -> str:
    return str(_frame(error).f_globals.get("__name__"))


def _of_lightning(error: BaseException) -> bool:
    """Whether Lightning itself raised the error, and no other code."""
    by_lightning = _module(error).startswith(("lightning.", "lightning_utilities."))
    return isinstance(error, MisconfigurationException) or (by_lightning and not isinstance(error, AssertionError))


def _words(section: Mapping[str, Any]) -> dict[str, list[str]]:
    """The words by which a message refers to each option: its name, or a class that is its value."""
    words = {name: [name] for name in inspect.signature(pl.Trainer).parameters}
    for name, value in section.items():
        words[name] = [name, *re.findall(r"'class_path': '[\w.]*?(\w+)'", repr(value))]
    return words


def _texts(value: Any) -> list[str]:
    """The texts of a value that a message may repeat: itself, or the keys of a mapping."""
    texts = list(value) if isinstance(value, Mapping) else [value] if isinstance(value, str) else []
    return [text for text in texts if text.isidentifier()]


def _first(message: str, words: Mapping[str, list[str]]) -> str | None:
    """The option whose word comes first in a message."""
    places = {
        match.start(): name
        for name, own in words.items()
        for word in own
        if (match := re.search(rf"(?<![a-zA-Z]){re.escape(word)}(?![a-zA-Z])", message))
    }
    return places[min(places)] if places else None


def check_monitors(callbacks: Iterable[pl.Callback], objective: Objective) -> None:
    """Refuse to watch a metric of validation that the objective does not measure.

    Raises:
        ConfigError: It names the metrics that there are.
    """
    supervised, paired = TokenMetrics(), PreferenceMetrics(paired=objective.name != "kto")
    own, others = (supervised, paired) if objective.name == "supervised" else (paired, supervised)
    names, other_names = ([f"val/{name}" for name, _ in metrics.named_children()] for metrics in (own, others))
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint | EarlyStopping):
            key = "checkpoint.monitor" if isinstance(callback, RunCheckpoint) else f"{type(callback).__name__}.monitor"
            measured = callback.monitor in names or callback.monitor not in other_names
            remedy = f"model.objective.name {objective.name} measures {', '.join(names)}"
            require(measured, key, callback.monitor, remedy)
