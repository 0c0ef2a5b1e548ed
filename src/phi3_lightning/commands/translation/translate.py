"""From the calls of a training script to settings; every argument that sets nothing is named."""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Final, NamedTuple

from phi3_lightning.commands.translation.keys import CALLS, Entry
from phi3_lightning.commands.translation.script import NOT_LITERAL, Argument, Call
from phi3_lightning.config import LoRA, Optimizer, Schedule
from phi3_lightning.config.checks import section
from phi3_lightning.config.lora import PHI3_FUSED_LAYERS
from phi3_lightning.errors import ConfigError

KNOWN: Final = (*(name for names, _ in CALLS for name in names), "load_dataset")
"""The calls and dictionaries that are read."""

_SECTIONS: Final = {"model.lora.": LoRA, "model.optimizer.": Optimizer, "model.schedule.": Schedule}
_DTYPES: Final = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}
_SPLITS: Final = {"train": "data.train", "val": "data.val", "dev": "data.val", "eval": "data.val", "test": "data.test"}
_LOADED: Final = {"argument 1", "path", "data_files", "split"}
_OTHERWISE_LOADED: Final = {"argument 2", "name", "data_dir", "revision"}  # data.train has no place for these
_EVALUATION: Final = "trainer.check_val_every_n_epoch"
_INTERVAL: Final = "trainer.val_check_interval"


class Translation(NamedTuple):
    """The options that a script sets, ``trainer.val_check_interval`` in optimiser steps; and its other arguments."""

    settings: dict[str, Any]
    notes: list[str]


def translate(calls: list[Call]) -> Translation:
    """Translate the known calls of a script.

    Args:
        calls: The calls; of several that mean the same, what they have in common is taken.
    """
    return _Translator(calls).translate()


class _Translator:
    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls
        self.found: dict[str, list[tuple[Argument, Any]]] = defaultdict(list)
        self.settings: dict[str, Any] = {}
        self.notes: set[tuple[int, str]] = set()

    def translate(self) -> Translation:
        for names, table in CALLS:
            alike = [call for call in self.calls if call.name in names]
            for argument in (argument for call in alike for argument in call.arguments):
                try:
                    path, value = _setting(argument, table.get(argument.key), alike)
                except ValueError as reason:
                    self.leave_out(argument, reason)
                    continue
                if value is not None:
                    self.found[path].append((argument, value))
        for call in self.calls:
            if call.name == "load_dataset":
                self.find_data(call)
        if "data.val" not in self.found and "data.test" in self.found:
            self.found["data.val"] = self.found.pop("data.test")  # what most scripts call their validation data
        for path, candidates in self.found.items():
            if all(value == candidates[0][1] for _, value in candidates):
                self.settings[path] = candidates[0][1]
            else:
                self.leave_out_all(path, f"the script has several values for {path}; set it by hand")
        self.settle()
        self.settle_validation()
        self.settle_targets()
        return Translation(self.settings, [text for _, text in sorted(self.notes)])

    def leave_out(self, argument: Argument, reason: object) -> None:
        self.notes.add((argument.line, f"line {argument.line}, {argument.text}: {reason}"))

    def leave_out_all(self, path: str, reason: str) -> None:
        for argument, _ in self.found[path]:
            self.leave_out(argument, reason)

    def find_data(self, call: Call) -> None:
        splits = _splits(call)
        for argument in call.arguments:
            if not splits:
                self.leave_out(argument, "set data.train by hand, to a file or to OWNER/NAME:SPLIT")
            elif argument.key not in _LOADED:
                self.leave_out(argument, "not translated; `fit --help` has every option")
        for split, data in splits.items():
            path = next((path for word, path in _SPLITS.items() if split.startswith(word)), "")
            if path:
                self.found[path].append((call.arguments[0], data))
            else:
                self.leave_out(call.arguments[0], f"set data.train, data.val or data.test to {data} by hand")

    def settle(self) -> None:
        """Set what follows from a setting, and split what is two settings here."""
        settings = self.settings
        if settings.get("trainer.max_steps", 0) > 0:
            settings["trainer.max_epochs"] = -1  # as TrainingArguments does
        if "trainer.precision" in settings:
            settings["model.dtype"] = _DTYPES[settings["trainer.precision"]]
        folder = PurePath(settings.get("run", ""))
        if folder.parent != PurePath():
            settings |= {"run": folder.name, "trainer.default_root_dir": str(folder.parent)}
        if settings.get("data.tokenizer") == settings.get("model.base"):
            settings.pop("data.tokenizer", None)  # the base's own, whichever base is taken

    def settle_validation(self) -> None:
        way, every = (self.settings.pop(path, None) for path in (_EVALUATION, _INTERVAL))
        every = every or self.settings.get("trainer.log_every_n_steps")  # as TrainingArguments does
        if way == "steps" and every:
            self.settings |= {_INTERVAL: every, _EVALUATION: None}
            return
        if way == "no":
            self.settings |= {"data.val_fraction": 0.0, "checkpoint.monitor": None}
        for path in (_INTERVAL, *([_EVALUATION] if way == "steps" else [])):
            self.leave_out_all(path, f"eval_strategy: steps and eval_steps count together; see {_INTERVAL}")

    def settle_targets(self) -> None:
        targets = self.settings.get("model.lora.target_modules", [])
        names = [targets] if isinstance(targets, str) else targets
        split = [fused for fused in PHI3_FUSED_LAYERS.values() if not all(part in names for part in fused)]
        parts = [part for fused in split for part in fused if part in names]
        if not parts:
            return  # whole layers, which both backends adapt
        reason = f"{', '.join(parts)}: parts of fused layers, which model.lora.backend: loralib adapts"
        prefix = "model.lora."
        lora = {path.removeprefix(prefix): v for path, v in self.settings.items() if path.startswith(prefix)}
        try:
            section(LoRA, lora | {"backend": "loralib"})
            self.settings["model.lora.backend"] = "loralib"
        except ConfigError as error:
            del self.settings["model.lora.target_modules"]
            reason += f", without {str(error).split(':')[0]}; the recipe's layers are adapted"
        self.leave_out_all("model.lora.target_modules", reason)


def _setting(argument: Argument, entry: Entry | None, alike: list[Call]) -> tuple[str, Any]:
    """Return what an argument sets, None for what is so here anyway; a ValueError says why it cannot."""
    if entry is None:
        raise ValueError("not translated; `fit --help` has every option")
    if isinstance(entry, str):
        if argument.value is None or argument.value is False:
            return "", None  # switched off, as it is here
        raise ValueError(entry)
    path, kind = entry
    if argument.value is NOT_LITERAL:
        raise ValueError(f"no literal; set {path} by hand")
    if not all(any(other[2:] == argument[2:] for other in call.arguments) for call in alike):
        raise ValueError(f"not alike in all such calls; set {path} by hand")
    try:
        value = _among(kind, argument.value) if isinstance(kind, Mapping) else kind(argument.value)
        for prefix, dataclass in _SECTIONS.items():
            if path.startswith(prefix):
                section(dataclass, {path.removeprefix(prefix): value})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{error}; see {path}") from None
    return path, value


def _among(values: Mapping[Any, Any], value: Any) -> Any:
    alone = value[0] if isinstance(value, list) and len(value) == 1 else value  # report_to=["tensorboard"]
    if not isinstance(alone, str | bool) or alone not in values:
        raise ValueError("not taken")
    return values[alone]


def _splits(call: Call) -> dict[str, Any]:
    """Return the data of each split that a call of load_dataset reads; none unless literals say it all."""
    values = {argument.key: argument.value for argument in call.arguments}
    name, files, split = values.get("path", values.get("argument 1")), values.get("data_files"), values.get("split", "")
    if not isinstance(name, str) or not isinstance(split, str) or values.keys() & _OTHERWISE_LOADED:
        return {}
    if name in ("json", "csv", "parquet", "arrow") and isinstance(files, str | list | dict):
        data = files if isinstance(files, dict) else {"train": files}
        return {word: file for word, file in data.items() if split in ("", word)}
    if files is None and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        return {word: f"{name}:{word}" for word in ([split] if split else call.items)}
    return {}
