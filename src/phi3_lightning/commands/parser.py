"""The argument parser of every command, whose errors name the key that was meant."""

import difflib
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings  # type: ignore[attr-defined]
from lightning.pytorch import seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from phi3_lightning.hardware import program
from phi3_lightning.renamed import OPTIONS

# Lightning lets jsonargparse open each text that looks like an address
set_parsing_settings(docstring_parse_attribute_docstrings=True, config_read_mode_fsspec_enabled=False)

ELSEWHERE = {
    "--optimizer": "the optimiser is --model.optimizer.name or .class_path, .lr, .weight_decay",
    "--lr_scheduler": "the schedule is --model.schedule.name, .warmup",
}
"""LightningCLI's own options that have another name here."""

RUN_OPTIONS = (
    "run", "seed_everything", "trainer", "model", "data", "checkpoint", "evaluation", "monitor", "ckpt_path", "resume",
    "weights_only", "return_predictions", "verbose",
)  # fmt: skip
"""The sections and options of the configuration of a run."""


class RunConfig(ActionConfigFile):
    """Merges configurations key by key, also in sections that are a dictionary to the parser.

    jsonargparse replaces an earlier dictionary by a later one.
    """

    @staticmethod
    @override
    def apply_config(parser: ArgumentParser, cfg: Namespace, dest: str, value: Any) -> None:
        before = {name: cfg.get(name) for name in RUN_OPTIONS if isinstance(cfg.get(name), dict)}
        ActionConfigFile.apply_config(parser, cfg, dest, value)
        for name, section in before.items():
            cfg[name] = {**section, **cfg[name]}


class Parser(LightningArgumentParser):
    """A parser without abbreviations, whose errors name the nearest key."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    @override
    def add_lightning_class_args(self, *args: Any, **kwargs: Any) -> list[str]:
        names = super().add_lightning_class_args(*args, **kwargs)
        for action in self._actions:
            if action.dest == "model.optimizer":  # which has an option class_path that names no subclass of the section
                vars(action)["basetype"] = None
        return names

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        hints = [hint for option, hint in ELSEWHERE.items() if re.search(rf"{option}\b(?!\.)", message)]
        if re.search(r"\b(model|data)\.(class_path|init_args)", message):
            hints.append("options are directly under model: and data:, without class_path and init_args")
        for key in _keys_in(message):
            if new := OPTIONS.get(key):
                hints.append(f"{key} is called {new} now")
            else:
                hints += [f"did you mean {name}?" for name in self._nearest(key)]
        super().error("\n".join([_one_line(message), *dict.fromkeys(hints)]), ex)

    def accept_rest_of_run(self) -> None:
        """Accept and ignore all other options of the configuration of a run."""
        for name in RUN_OPTIONS:
            if not any(action.dest.partition(".")[0] == name for action in self._actions):
                self.add_argument(f"--{name}", type=Any, default=None, help="Of a run; ignored here.")

    def _nearest(self, key: str) -> list[str]:
        known = [action.dest for action in self._actions]
        if key in known:
            return []
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        leaf = key.rpartition(".")[2]
        return near or [name for name in known if name.rpartition(".")[2] == leaf][:3]


def command_parser(
    name: str, description: str, classes: Mapping[str, type], sections: Mapping[str, str], **kwargs: Any
) -> Parser:
    """Return a parser for a command that is not the Trainer's, and takes configurations of runs.

    Args:
        classes: Sections whose options are the arguments of a class.
        sections: Sections of which only some keys count, with these keys.
    """
    parser = Parser(prog=f"{program()} {name}", description=description, **kwargs)
    parser.add_argument("-c", "--config", action=RunConfig, help="Configuration of a run, or a part of one.")
    for section, kind in classes.items():
        parser.add_lightning_class_args(kind, section)
    for section, keys in sections.items():
        parser.add_argument(f"--{section}", type=dict[str, Any], default={}, help=f"Keys that count: {keys}.")
    parser.add_argument("--seed_everything", type=int | bool, default=42, help="The seed; true: a random one.")
    return parser


def add_run(parser: Parser, ckpt_path_help: str) -> None:
    """Add the options that find a checkpoint."""
    parser.add_argument("--ckpt_path", type=str | None, default=None, help=ckpt_path_help)
    parser.add_argument("--run", type=str, default="phi3-lora", help="Name of the run, where no ckpt_path is given.")


def prepare(config: Namespace) -> None:
    """Use the base's tokenizer where no other is named, and set the seed."""
    if config.data.tokenizer is None:
        config.data.tokenizer, config.data.revision = config.model.get("base"), config.model.get("revision")
    seed_everything(None if config.seed_everything is True else config.seed_everything, verbose=False)


def model_defaults(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module, whose sections are mappings, by key path, as a parser's defaults."""
    sections = {name: value for name, value in arguments.items() if isinstance(value, Mapping)}
    result = {f"model.{name}": value for name, value in arguments.items() if name not in sections}
    for name, section in sections.items():
        result |= {f"model.{name}.{key}": value for key, value in section.items()}
    return result


def _one_line(message: str) -> str:
    """Return jsonargparse's message about a value in one line: key, value and reasons."""
    match = re.match(r'Parser key "([\w.]+)":\n(.*)Given value type: .*?Given value: (.*)', message, re.DOTALL)
    if match is None:
        return message
    key, reasons, value = match.groups()
    lines = [line.strip(" -") for line in reasons.rpartition("Errors:")[2].splitlines()]
    reason = "; ".join(filter(None, lines)).replace(":; ", ": ")
    return f"{key}: {' '.join(value.split())} cannot be used: {reason}"


def _keys_in(message: str) -> list[str]:
    return re.findall(r"--([\w.]+)", message) + re.findall(r"(?:[Kk]ey|[Oo]ption) ['\"]([\w.]+)['\"]", message)
