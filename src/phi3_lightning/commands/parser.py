"""The argument parser of every command, whose errors name the key that was meant."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings  # type: ignore[attr-defined]
from lightning.pytorch import seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from phi3_lightning.hardware import program
from phi3_lightning.hub import split_revision
from phi3_lightning.renamed import OPTIONS

# Lightning lets jsonargparse open each text that looks like an address
set_parsing_settings(docstring_parse_attribute_docstrings=True, config_read_mode_fsspec_enabled=False)

ELSEWHERE = {
    "--optimizer": "the optimiser is --model.optimizer.name or .class_path, .lr, .weight_decay",
    "--lr_scheduler": "the schedule is --model.schedule.name, .warmup",
}
"""LightningCLI's own options that have another name here."""

_UNKNOWN_KEY = re.compile(r"(?:Subcommand|Group) '([\w.]+)' does not accept option '([\w.]+)'")

_WRONG_TYPE = re.compile(
    r'Parser key "(?P<key>[\w.]+)":\n *(?P<reasons>Expected [^\n]*)\. Got value: (?P<value>.*)', re.DOTALL
)
_WRONG_VALUE = re.compile(
    r'Parser key "(?P<key>[\w.]+)":\n(?P<reasons>.*)Given value type: .*?Given value: (?P<value>.*)', re.DOTALL
)

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
    """A parser without abbreviations, whose errors name the nearest key, and the line of a wrong one in a file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self._files: list[Path] = []
        """The configurations that were read."""

    @override
    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        self._files.append(Path(str(path)))
        config: Namespace = super().parse_path(path, *args, **kwargs)
        return config

    @override
    def print_usage(self, file: Any = None) -> None:
        prog = self.prog.replace(" [options]", "")
        print(f"usage: {prog} [--config FILE] [--OPTION VALUE ...]", file=file)

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
        if unknown := _UNKNOWN_KEY.search(message):
            section, key = unknown.groups()
            parser = getattr(ex, "subcommand_parser", None)  # jsonargparse's, of the command whose option it is
            key, owner = (key, parser) if isinstance(parser, Parser) else (f"{section}.{key}", self)
            message = f"{owner._place(key)}key '{key}' is not an option"
            hints = hints or owner._suggestions(key)
        else:
            for key in _keys_in(message):
                hints += self._suggestions(key)
            message = self._wrong_value(message)
        super().error("\n".join([message, *dict.fromkeys(hints)]), ex)

    def accept_rest_of_run(self) -> None:
        """Accept and ignore all other options of the configuration of a run."""
        for name in RUN_OPTIONS:
            if not any(action.dest.partition(".")[0] == name for action in self._actions):
                self.add_argument(f"--{name}", type=Any, default=None, help="Of a run; ignored here.")

    def _suggestions(self, key: str) -> list[str]:
        """Return what may have been meant by an unknown key, in words."""
        if new := OPTIONS.get(key):
            return [f"{key} is called {new} now"]
        return [f"did you mean {name}?" for name in self._nearest(key)]

    def _place(self, key: str, value: str | None = None) -> str:
        """Return file and line of a key, of the last configuration that has it, before a message.

        Args:
            value: As an error shows it; only a configuration that has this value counts.
        """
        for path in reversed(self._files):
            line, given = _line_of(path, key)
            if line is not None and value in (None, given):
                return f"{path}:{line}: "
        return ""

    def _wrong_value(self, message: str) -> str:
        """Return jsonargparse's message about a value in one line: place, key, value and reasons."""
        match = _WRONG_TYPE.match(message) or _WRONG_VALUE.match(message)
        if match is None:
            return message
        key, reasons, value = match["key"], match["reasons"], " ".join(match["value"].split())
        lines = [line.strip(" -") for line in reasons.rpartition("Errors:")[2].splitlines()]
        reason = "; ".join(filter(None, lines)).replace(":; ", ": ")
        reason = re.sub(r"<class '(\w+)'>", r"\1", reason).replace("typing.Literal", "one of ")
        place = self._place(key, value)
        return f"{place}{key if place else f'--{key}'}: {value} cannot be used: {reason}"

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
    base = config.model.get("base")
    if config.data.tokenizer is None and base is not None:
        revised = split_revision("model.base", base, config.model.get("revision"), "model.revision")
        config.data.tokenizer, config.data.revision = revised
    seed_everything(None if config.seed_everything is True else config.seed_everything, verbose=False)


def model_defaults(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module, whose sections are mappings, by key path, as a parser's defaults."""
    sections = {name: value for name, value in arguments.items() if isinstance(value, Mapping)}
    result = {f"model.{name}": value for name, value in arguments.items() if name not in sections}
    for name, section in sections.items():
        result |= {f"model.{name}.{key}": value for key, value in section.items()}
    return result


def _line_of(path: Path, key: str) -> tuple[int | None, str | None]:
    """Return the line of a key path in a YAML file and its value as written; None where there is none."""
    node, line = yaml.compose(path.read_text(encoding="utf-8")), None
    for name in key.split("."):
        entries = node.value if isinstance(node, yaml.MappingNode) else []
        entry = next(((key, value) for key, value in entries if key.value == name), None)
        if entry is None:
            return None, None
        line, node = entry[0].start_mark.line + 1, entry[1]
    return line, node.value if isinstance(node, yaml.ScalarNode) else None


def _keys_in(message: str) -> list[str]:
    return re.findall(r"--([\w.]+)", message) + re.findall(r"(?:[Kk]ey|[Oo]ption) ['\"]([\w.]+)['\"]", message)
