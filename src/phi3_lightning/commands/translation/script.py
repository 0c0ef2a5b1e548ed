"""From the literals that a script passes to TRL, PEFT, transformers and datasets to settings; the script never runs."""

import ast
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, Final, NamedTuple

from phi3_lightning.commands.translation.keys import CALLS, LOSSES, TABLE
from phi3_lightning.config.lora import PHI3_FUSED_LAYERS
from phi3_lightning.errors import ConfigError
from phi3_lightning.hub import with_revision

_NOT_LITERAL: Final = object()
_DROPOUT: Final = "model.lora.lora_dropout"
_DATA: Final = ("path", "data_files", "split", "[]", "argument 2", "name", "revision")
"""The arguments of load_dataset that name data."""
_SPLITS: Final = {"train": "data.train", "val": "data.val", "dev": "data.val", "eval": "data.val", "test": "data.test"}


class Translation(NamedTuple):
    """The options that a script sets, ``trainer.val_check_interval`` in optimiser steps, and its other arguments."""

    settings: dict[str, Any]
    notes: list[str]


class _Argument(NamedTuple):
    line: int
    text: str
    key: str
    value: Any


def translate(path: Path) -> Translation:
    """Translate the known calls of a Python file; of several calls with one name, only common arguments count."""
    if path.suffix != ".py":
        raise ConfigError(f"--from: {path} is no .py file; `jupyter nbconvert --to script` makes one of a notebook")
    try:
        reader = _Reader(list(ast.walk(ast.parse(path.read_text(encoding="utf-8-sig")))))
        calls = [(name, list(reader.arguments(call, name))) for call, name in reader.calls.items()]
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise ConfigError(f"--from: {path} cannot be read ({error})") from error
    if not calls:
        raise ConfigError(f"--from: {path} has none of {', '.join(CALLS)}; give the script that trains")
    values: dict[str, list[tuple[_Argument, Any]]] = defaultdict(list)
    notes: set[tuple[int, str]] = set()
    for name, arguments in calls:
        data = _data(arguments) if name == "load_dataset" else {}
        for option, value in data.items():
            values[option].append((arguments[0], value))
        for argument in [a for a in arguments if not data or a.key not in _DATA]:
            try:
                option, value = _setting(argument, arguments)
                if not all(any(a[2:] == argument[2:] for a in others) for other, others in calls if other == name):
                    raise ValueError(f"not alike in all such calls; set {option} by hand")
                values[option] += [] if value is None else [(argument, value)]
            except ValueError as reason:
                notes.add((argument.line, f"{argument.text}: {reason}"))
    settings = {option: pairs[0][1] for option, pairs in values.items() if pairs}
    switches = [a.value for _, arguments in calls for a in arguments if a.key == "disable_dropout"]
    if "model.objective.name" in settings and False not in switches:
        ignored = [argument for argument, value in values.pop(_DROPOUT, []) if value]
        notes |= {(a.line, f"{a.text}: not taken; TRL's preference trainers switch dropout off") for a in ignored}
        settings[_DROPOUT] = 0.0
    for option, pairs in values.items():
        if any(value != settings[option] for _, value in pairs):
            del settings[option]
            notes |= {(a.line, f"{a.text}: there are several values for {option}; set it by hand") for a, _ in pairs}
    return Translation(_completed(settings), [f"line {line}, {text}" for line, text in sorted(notes)])


class _Reader:
    def __init__(self, nodes: list[ast.AST]) -> None:
        calls = [(node, f".{ast.unparse(node.func)}") for node in nodes if isinstance(node, ast.Call)]
        self.calls = {node: name for node, dotted in calls for name in CALLS if dotted.endswith(f".{name}")}
        uses = [node for node in nodes if isinstance(node, ast.Attribute | ast.Subscript)]  # perhaps config.update()
        self.subscripts = [node for node in uses if isinstance(node, ast.Subscript)]
        self.attributes = {n.attr for n in uses if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        targets = [n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)]
        bindings = Counter([*targets, *(n.arg for n in nodes if isinstance(n, ast.arg))])
        assignments = [pair for node in nodes for pair in _assignments(node)]
        aliases = {v.id for v in [*(n.value for n in uses), *(v for _, v in assignments)] if isinstance(v, ast.Name)}
        self.values = {
            name: value
            for name, value in assignments
            if bindings[name] == 1 and (name not in aliases or isinstance(value, ast.Constant) or value in self.calls)
        }

    def resolved(self, node: ast.expr) -> ast.expr:
        return self.resolved(self.values[node.id]) if isinstance(node, ast.Name) and node.id in self.values else node

    def arguments(self, call: ast.Call, name: str) -> Iterator[_Argument]:
        losses = {f"{name}.loss_type"} if name in LOSSES else set()  # by default
        for key, node in dict(self.pairs(call)).items():  # of two keys in a dictionary the later wins
            origin = self.resolved(node)
            if (self.resolved(origin.value) if isinstance(origin, ast.Subscript) else origin) in self.calls:
                continue  # read where it is made
            word = CALLS[name] if key == "argument 1" else key
            value = _NOT_LITERAL if word in self.attributes else self.value(node)  # set later: config.max_steps = 5
            own = f"{name}.{word}"
            losses.discard(own)
            yield _Argument(node.lineno, f"{name}: {word} = {ast.unparse(node)}", own if own in TABLE else word, value)
        for own in losses:
            value = _NOT_LITERAL if "loss_type" in self.attributes else LOSSES[name]
            yield _Argument(call.lineno, f"{name}: loss_type = {LOSSES[name]!r}", own, value)
        for item in self.subscripts:
            if self.resolved(item.value) is call and isinstance(item.slice, ast.Constant):
                yield _Argument(item.lineno, f"{name}: {ast.unparse(item)}", "[]", item.slice.value)

    def pairs(self, node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
        """Yield the arguments of a call, or the items of a dictionary, including those of ``**``."""
        words: list[tuple[str | None, ast.expr]] = []
        if isinstance(node, ast.Dict):
            words = list(zip(map(_word, node.keys), node.values, strict=True))
        elif isinstance(node, ast.Call):
            words = [(f"argument {number}", value) for number, value in enumerate(node.args, 1)]
            words += [(word.arg, word.value) for word in node.keywords]
        for word, value in words:
            if word is None and _is_dictionary(self.resolved(value)):
                yield from self.pairs(self.resolved(value))
            else:
                yield word or f"**{ast.unparse(value)}", value

    def value(self, node: ast.expr) -> Any:
        try:
            value = ast.literal_eval(self.resolved(node))
            json.dumps(value)  # which refuses what YAML lacks
        except (ValueError, TypeError):
            return _NOT_LITERAL
        return value


def _is_dictionary(node: ast.expr) -> bool:
    return isinstance(node, ast.Dict) or (isinstance(node, ast.Call) and ast.unparse(node.func) == "dict")


def _word(key: ast.expr | None) -> str | None:
    return str(key.value) if isinstance(key, ast.Constant) else None if key is None else f"[{ast.unparse(key)}]"


def _assignments(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    match node:
        case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Call() as value) | ast.Assign(names, value):
            yield from ((name.id, value) for name in names if isinstance(name, ast.Name))


def _setting(argument: _Argument, call: list[_Argument]) -> tuple[str, Any]:
    """Return the option that an argument of a call sets and its value, None for the default.

    Raises:
        ValueError: If it sets none.
    """
    if argument.key not in TABLE:
        raise ValueError("not translated; `fit --help` has every option")
    (option, kind), value = TABLE[argument.key], argument.value
    if value is _NOT_LITERAL:
        raise ValueError(f"no literal; set {option} by hand")
    robust = any(other.value in ("robust", ["robust"]) for other in call)
    if option == "model.objective.label_smoothing" and not robust:
        raise ValueError("not taken; TRL uses it with loss_type robust alone")
    if isinstance(kind, Mapping):
        value = value[0] if isinstance(value, list) and len(value) == 1 else value  # report_to=["tensorboard"]
        if isinstance(value, str | bool) and value in kind:
            return option, kind[value]
    elif kind is object or (isinstance(value, str if kind is str else int | float) and not isinstance(value, bool)):
        whole = kind is int and value == value // 1  # num_train_epochs=3.0
        if whole or kind is not int:
            return option, int(value) if whole else value
    raise ValueError(f"not taken; see {option}")


def _data(arguments: list[_Argument]) -> dict[str, Any]:
    """Return the data of each split that a call of load_dataset reads; nothing unless literals name them all."""
    values = {argument.key: argument.value for argument in arguments}
    path, files, split = str(values.get("path", "")), values.get("data_files"), values.get("split")
    words = [str(split)] if split else [argument.value for argument in arguments if argument.key == "[]"]
    configuration, revision = values.get("argument 2", values.get("name")), values.get("revision")
    name = with_revision(f"{path}/{configuration}" if configuration else path, revision)
    data = {word: f"{name}:{word}" for word in words if not files and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path)}
    unnamed = configuration and (files or "/" not in path)  # a configuration follows owner/name
    if path in ("json", "csv", "parquet", "arrow"):
        data = files if isinstance(files, dict) else {str(split or "train"): files} if files else {}
    options = {next((_SPLITS[s] for s in _SPLITS if str(word).startswith(s)), ""): data[word] for word in data}
    partly = _NOT_LITERAL in values.values() or "" in options or (split and list(data) != [split])
    return {} if partly or unnamed or "data_dir" in values or (files and revision) else options


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Add the settings that follow from others, and split those that are two settings here."""
    if len((folder := PurePath(settings.get("run", ""))).parts) > 1:
        settings["trainer.default_root_dir"] = str(folder.parent)
    settings |= {"run": folder.name} if folder.name else {}
    if settings.get("trainer.max_steps", 0) > 0:
        settings["trainer.max_epochs"] = -1  # as TrainingArguments does
    if "trainer.precision" in settings:
        settings["model.dtype"] = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}[settings["trainer.precision"]]
    settings |= {"checkpoint.monitor": None} if "data.val_fraction" in settings else {}  # it is 0
    settings |= {"trainer.check_val_every_n_epoch": None} if "trainer.val_check_interval" in settings else {}
    if "data.val" not in settings and "data.test" in settings:
        settings["data.val"] = settings.pop("data.test")  # what most scripts call their validation data
    targets = settings.get("model.lora.target_modules")
    targets = targets if isinstance(targets, list) else [targets]
    if any(0 < sum(part in targets for part in parts) < len(parts) for parts in PHI3_FUSED_LAYERS.values()):
        settings["model.lora.backend"] = "loralib"  # which adapts parts of fused layers
    if settings.get("data.tokenizer") == settings.get("model.base"):
        settings.pop("data.tokenizer", None)  # the base's own, whichever base is taken
    return settings
