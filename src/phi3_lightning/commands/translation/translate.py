"""From the dictionaries of a TRL script to settings of this package, every key accounted for."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phi3_lightning.commands.translation import lora, training, training_notes
from phi3_lightning.commands.translation.dictionaries import Dictionaries, Expression
from phi3_lightning.commands.translation.rules import Equal, Rule
from phi3_lightning.config import LoRA, Optimizer, Schedule, section
from phi3_lightning.errors import ConfigError


@dataclass(frozen=True)
class Translation:
    """Settings, and what did not go into them."""

    settings: dict[str, Any]
    """Key paths and values."""
    notes: dict[str, str]
    """Keys of the script that have no equal, or not quite, and what to do."""


def translate(given: Dictionaries) -> Translation:
    """Translate both dictionaries.

    Args:
        given: The dictionaries.

    Returns:
        The settings that they come to, and a note for each key that has no equal.

    Raises:
        ConfigError: If a value cannot be what its key means, or is out of the range that its equal has here.
    """
    settings: dict[str, Any] = {}
    notes = dict(given.unread)
    for name, values, rules, without in (
        ("training_config", given.training, training.RULES, training_notes.NOTES),
        ("peft_config", given.peft, lora.RULES, lora.NOTES),
    ):
        for key, value in values.items():
            try:
                found = _equal(key, value, values, rules, without)
            except (TypeError, ValueError, OverflowError) as error:
                raise ConfigError(f"{name}.{key}: {value!r} cannot be used ({error})") from error
            settings |= found.settings
            if found.note is not None:
                notes[f"{name}.{key}"] = found.note
    for kind, prefix in ((LoRA, "model.lora."), (Optimizer, "model.optimizer."), (Schedule, "model.schedule.")):
        section(kind, {path.removeprefix(prefix): v for path, v in settings.items() if path.startswith(prefix)})
    return Translation(settings, notes)


def _equal(
    key: str, value: Any, given: Mapping[str, Any], rules: Mapping[str, Rule], without: Mapping[str, str]
) -> Equal:
    if key in without:
        return Equal(note=without[key])
    if key not in rules:
        near = difflib.get_close_matches(key, [*rules, *without], n=1)
        return Equal(note=f"not known; did you mean {near[0]}?" if near else "not known; `fit --help` has all of ours")
    rule = rules[key]
    if isinstance(value, Expression):
        by_hand = f"set {rule.path} by hand" if rule.path else "nothing here is set by it"
        return Equal(note=f"{value.source} would have to be run; {by_hand}")
    if value is None:
        return Equal(note="not set there, and as the recipe has it here")
    found = rule.convert(value, {name: other for name, other in given.items() if not isinstance(other, Expression)})
    return found if isinstance(found, Equal) else Equal({rule.path: found})
