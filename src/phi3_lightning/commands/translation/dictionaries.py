"""Reads ``training_config`` and ``peft_config`` from a script, JSON or YAML; a script is parsed and never run."""

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from phi3_lightning.errors import ConfigError

NAMES = ("training_config", "peft_config")
"""The dictionaries, as the Phi-3 cookbook's sample_finetune.py calls them."""


@dataclass(frozen=True)
class Expression:
    """A value that only running the script would give."""

    source: str
    """What the script says."""


@dataclass(frozen=True)
class Dictionaries:
    """What a file holds of the two dictionaries."""

    training: dict[str, Any]
    """TrainingArguments' and SFTConfig's keys."""
    peft: dict[str, Any]
    """LoraConfig's keys."""
    unread: dict[str, str]
    """What of the file could not be read, and why."""


def read_dictionaries(path: Path) -> Dictionaries:
    """Read both dictionaries; one of them may be missing.

    Args:
        path: A file that ends in .py, .json, .yaml or .yml.

    Raises:
        ConfigError: If the file cannot be read, or has neither dictionary.
    """
    if path.suffix not in (".py", ".json", ".yaml", ".yml"):
        raise ConfigError(f"--from: {path} is no .py, .json, .yaml or .yml file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--from: {path} cannot be read ({error})") from error
    unread: dict[str, str] = {}
    try:
        if path.suffix == ".py":
            found = _from_python(ast.parse(text), unread)
        elif path.suffix == ".json":
            found = json.loads(text)
        else:
            found = yaml.safe_load(text)
    except (SyntaxError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"--from: {path} cannot be parsed ({error})") from error
    found = found if isinstance(found, Mapping) else {}
    held = {name: found[name] for name in NAMES if isinstance(found.get(name), Mapping)}
    if not held:
        raise ConfigError(
            f"--from: {path} has no dictionary called {' or '.join(NAMES)}; put TrainingArguments' keys into the first "
            "and LoraConfig's into the second"
        )
    if path.suffix != ".py":  # a script has other names for other reasons
        unread |= {str(name): "no dictionary of that name is read" for name in found if name not in held}
    training, peft = ({str(key): value for key, value in held.get(name, {}).items()} for name in NAMES)
    return Dictionaries(training, peft, unread)


def _from_python(tree: ast.Module, unread: dict[str, str]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    understood: set[ast.AST] = set()
    for statement in tree.body:
        for target, value in _assignments(statement):
            if isinstance(target, ast.Name):
                names[target.id] = _value(value, names, target.id, unread)
                understood.add(target)
            elif isinstance(changed := names.get(_changed(target)), dict):  # training_config["seed"] = 1
                key = ast.unparse(cast("ast.Subscript", target).slice)
                changed[ast.literal_eval(key)] = _value(value, names, key, unread)
                understood.add(target)
    for node in ast.walk(tree):
        name = _changed(node)
        if name in NAMES and node not in understood:
            unread[f"{name}, {_line(node)}"] = "changed there in a way that only running the script would show"
    return names


def _assignments(statement: ast.stmt) -> Iterator[tuple[ast.expr, ast.expr]]:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        yield statement.targets[0], statement.value
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        yield statement.target, statement.value


def _changed(node: ast.AST) -> str:
    """The dictionary that a part of a script sets or changes."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()):
            return name
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(), ctx=ast.Store()):
            return name
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="update" | "setdefault" | "pop")):
            return name
    return ""


def _line(node: ast.AST) -> str:
    return f"line {getattr(node, 'lineno', '?')}"


def _value(node: ast.expr, names: Mapping[str, Any], place: str, unread: dict[str, str]) -> Any:
    match node:
        case ast.Dict(keys=keys, values=values):
            pairs = [
                (None if key is None else ast.unparse(key), value) for key, value in zip(keys, values, strict=True)
            ]
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            pairs = [(None if word.arg is None else repr(word.arg), word.value) for word in keywords]
        case _:
            return _literal(node, names)
    result: dict[str, Any] = {}
    for key, value in pairs:
        found = _literal(value, names)
        if key is None and isinstance(found, dict):  # **other
            result |= found
        elif key is None or key[0] not in "'\"":
            unread[f"{place}.{key or ast.unparse(value)}"] = "only running the script would give this key"
        else:
            result[ast.literal_eval(key)] = found
    return result


def _literal(node: ast.expr, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return Expression(ast.unparse(node))
