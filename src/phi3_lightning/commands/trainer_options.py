"""What Lightning refuses of the Trainer's options, in one line that names the option."""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from phi3_lightning.config.checks import require
from phi3_lightning.errors import ConfigError, Phi3LightningError

_LEAST = {
    "accumulate_grad_batches": (1, "1 steps after each micro-batch"),
    "gradient_clip_val": (0, "1.0 is usual, null does not clip"),
    "check_val_every_n_epoch": (1, "1 validates in each epoch"),
    "log_every_n_steps": (0, "0 logs nothing"),
    "num_sanity_val_steps": (-1, "0 checks nothing, -1 all validation data"),
    "min_epochs": (0, "null is no minimum"),
    "min_steps": (0, "null is no minimum"),
}
"""Numbers that Lightning takes below the least that means something, and fails on them later or not at all."""


def check_ranges(section: Mapping[str, Any]) -> None:
    """Refuse numbers with which Lightning begins and cannot go on.

    Args:
        section: The section ``trainer`` of a configuration.

    Raises:
        ConfigError: If one of them is too small.
    """
    for name, (least, remedy) in _LEAST.items():
        value = section.get(name)
        if value is not None:
            require(value >= least, f"trainer.{name}", value, f"it is {least} or more; {remedy}")
    every = section.get("val_check_interval")
    if isinstance(every, int | float):
        require(every > 0, "trainer.val_check_interval", every, "it is above 0; limit_val_batches: 0 never validates")


def without_extras(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that ``barebones`` switches off, and that a configuration for other runs may have switched on.

    Args:
        section: The section ``trainer`` of a configuration.
    """
    return {name: None for name in ("log_every_n_steps", "num_sanity_val_steps") if section.get(name) is not None}


@contextmanager
def refused_by_name(section: Mapping[str, Any], *, building: bool) -> Iterator[None]:
    """Turn what Lightning refuses of its options into a ConfigError that names the option.

    Args:
        section: The section ``trainer`` of a configuration, as it was typed.
        building: Whether no more than the Trainer and its parts are being made, so that whatever Lightning refuses is
            an option; else the message has to name one. Exceptions of other origin stay what they are.

    Raises:
        ConfigError: For an option that cannot be used.
    """
    try:
        yield
    except Phi3LightningError:
        raise
    except Exception as error:
        origin = _origin(error)
        words = _words(section)
        message = " ".join(str(origin).split())
        made = type(_frame(origin).f_locals.get("self")).__name__
        if made not in message and any(made in own for own in words.values()):
            message = f"{made}: {message}"
        name = _first(message, words)
        if name is None and building:
            name = _first(message.lower(), {option: _texts(value) for option, value in section.items()})
        if not _of_lightning(origin) or (name is None and not building):
            raise
        value = None if name is None else section.get(name)
        given = f"{value!r} cannot be used: " if isinstance(value, str | int | float) else ""
        raise ConfigError(f"trainer{'' if name is None else f'.{name}'}: {given}{message}") from error


def _origin(error: BaseException) -> BaseException:
    """The exception that the parser wrapped, where it was making an object from ``class_path``."""
    while _module(error).startswith("jsonargparse") and (cause := error.__cause__ or error.__context__):
        error = cause
    return error


def _frame(error: BaseException) -> FrameType:
    """Where an exception was raised."""
    trace = error.__traceback__
    assert trace is not None  # it was caught
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame


def _module(error: BaseException) -> str:
    return str(_frame(error).f_globals.get("__name__"))


def _of_lightning(error: BaseException) -> bool:
    """Whether Lightning itself refused something, and no line of anybody else's failed."""
    by_lightning = _module(error).startswith(("lightning.", "lightning_utilities."))
    return isinstance(error, MisconfigurationException) or (by_lightning and not isinstance(error, AssertionError))


def _words(section: Mapping[str, Any]) -> dict[str, list[str]]:
    """By which words a message speaks of an option: its name, or a class that was given for it."""
    words = {name: [name] for name in inspect.signature(pl.Trainer).parameters}
    for name, value in section.items():
        words[name] = [name, *re.findall(r"'class_path': '[\w.]*?(\w+)'", repr(value))]
    return words


def _texts(value: Any) -> list[str]:
    """What of a value a message may repeat: text, and the keys of a mapping."""
    found = list(value) if isinstance(value, Mapping) else [value] if isinstance(value, str) else []
    return [text for text in found if text.isidentifier()]


def _first(message: str, words: Mapping[str, list[str]]) -> str | None:
    """Whose word comes first in a message."""
    places = {
        match.start(): name
        for name, own in words.items()
        for word in own
        if (match := re.search(rf"(?<![a-zA-Z]){re.escape(word)}(?![a-zA-Z])", message))
    }
    return places[min(places)] if places else None
