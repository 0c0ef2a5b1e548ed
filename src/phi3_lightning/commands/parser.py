"""The argument parser of every command: it says which key was meant."""

import difflib
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings  # type: ignore[attr-defined]
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from phi3_lightning.renamed import OPTIONS

# Lightning lets jsonargparse open each text that looks like an address
set_parsing_settings(docstring_parse_attribute_docstrings=True, config_read_mode_fsspec_enabled=False)

ELSEWHERE = {
    "--optimizer": "the optimiser is --model.optimizer.name, .lr, .weight_decay",
    "--lr_scheduler": "the schedule is --model.schedule.name, .warmup",
}
"""LightningCLI's own options that have another place here."""

RUN_OPTIONS = (
    "run", "seed_everything", "trainer", "model", "data", "checkpoint", "evaluation", "monitor", "ckpt_path", "resume",
    "weights_only", "return_predictions", "verbose",
)  # fmt: skip
"""What the configuration of a run may hold."""


class RunConfig(ActionConfigFile):
    """Takes one configuration over another, key by key, also in sections of which a command knows few keys.

    Such a section is a dictionary to the parser, and jsonargparse puts a later dictionary in the place of the former.
    """

    @staticmethod
    @override
    def apply_config(parser: ArgumentParser, cfg: Namespace, dest: str, value: Any) -> None:
        before = {name: cfg.get(name) for name in RUN_OPTIONS if isinstance(cfg.get(name), dict)}
        ActionConfigFile.apply_config(parser, cfg, dest, value)
        for name, section in before.items():
            cfg[name] = {**section, **cfg[name]}


class Parser(LightningArgumentParser):
    """Says which key was meant, and takes none for another."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        hints = [hint for option, hint in ELSEWHERE.items() if re.search(rf"{option}\b(?!\.)", message)]
        if re.search(r"\b(model|data)\.(class_path|init_args)", message):
            hints.append("options stand directly under model: and data:, without class_path and init_args")
        for key in _keys_in(message):
            new = OPTIONS.get(key)
            hints += (
                [f"{key} is called {new} now"] if new else [f"did you mean {meant}?" for meant in self._nearest(key)]
            )
        super().error("\n".join([message, *dict.fromkeys(hints)]), ex)

    def accept_rest_of_run(self) -> None:
        """Accept what the configuration of a run holds beside the options that have been added, and ignore it."""
        for name in RUN_OPTIONS:
            if not any(action.dest.partition(".")[0] == name for action in self._actions):
                self.add_argument(f"--{name}", type=Any, default=None, help="Of a run; it has no say here.")

    def _nearest(self, key: str) -> list[str]:
        known = [action.dest for action in self._actions]
        if key in known:
            return []
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        leaf = key.rpartition(".")[2]
        return near or [name for name in known if name.rpartition(".")[2] == leaf][:3]


def model_defaults(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Name the arguments of a module by their whole key paths, as a parser's defaults.

    Args:
        arguments: The arguments; sections are mappings.
    """
    sections = {name: value for name, value in arguments.items() if isinstance(value, Mapping)}
    result = {f"model.{name}": value for name, value in arguments.items() if name not in sections}
    for name, section in sections.items():
        result |= {f"model.{name}.{key}": value for key, value in section.items()}
    return result


def _keys_in(message: str) -> list[str]:
    return re.findall(r"--([\w.]+)", message) + re.findall(r"(?:[Kk]ey|[Oo]ption) ['\"]([\w.]+)['\"]", message)
