"""Reads the literals that a script passes to TRL, PEFT, transformers and datasets; it is parsed and never run."""

import ast
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from phi3_lightning.errors import ConfigError

NOT_LITERAL: Final = object()
"""The value of what only running the script would tell."""

_ENUMERATIONS = ("torch", "TaskType")  # torch.float16 and TaskType.CAUSAL_LM stand for the word after the dot
_CHANGES = ("append", "clear", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update")


class Argument(NamedTuple):
    """An argument of a call or a key of a dictionary: where it stands, how it is spelt, its name and its value.

    The first argument without a name is called ``argument 1``; the value is NOT_LITERAL where only running tells it.
    """

    line: int
    text: str
    key: str
    value: Any


class Call(NamedTuple):
    """A known call or dictionary, its arguments, and the words that its result is indexed with."""

    name: str
    arguments: list[Argument]
    items: list[str]


def read_script(path: Path, known: Collection[str]) -> list[Call]:
    """Read the known calls of a script. A name that is bound once and never changed stands for its value.

    Args:
        path: A Python file.
        known: Names of functions, classes and dictionaries.

    Raises:
        ConfigError: If the file cannot be parsed, or has no known call.
    """
    if path.suffix != ".py":
        raise ConfigError(f"--from: {path} is no .py file; `jupyter nbconvert --to script` makes one of a notebook")
    try:
        calls = _Reader(ast.parse(path.read_text(encoding="utf-8-sig")), known).read()
    except OSError as error:
        raise ConfigError(f"--from: {path} cannot be read ({error})") from error
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ConfigError(f"--from: {path} cannot be parsed ({error})") from error
    if not calls:
        raise ConfigError(f"--from: {path} has none of {', '.join(known)}; give the script that trains")
    return calls


class _Reader:
    def __init__(self, tree: ast.Module, known: Collection[str]) -> None:
        self.nodes = list(ast.walk(tree))
        assigned = [pair for node in self.nodes for pair in _assignments(node)]
        bound = Counter(name for node in self.nodes for name in _bindings(node))
        self.values = {name: value for name, value in assigned if bound[name] == 1}
        self.calls = {node: name for node in self.nodes if isinstance(node, ast.Call) and (name := _name(node, known))}
        self.results = {name for name, value in assigned if value in self.calls}
        self.dictionaries = {name: value for name, value in assigned if name in known and _is_dictionary(value)}
        self.spread: set[str] = set()
        attributes = [node for node in self.nodes if isinstance(node, ast.Attribute)]
        self.changed = {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}  # config.max_steps = 5

    def read(self) -> list[Call]:
        calls = [
            Call(name, list(self._arguments(name, self._pairs(node))), list(self._items(node)))
            for node, name in self.calls.items()
        ]
        for name in self.dictionaries.keys() - self.spread:
            place = ast.copy_location(ast.Name(name), self.dictionaries[name])
            calls.append(Call(name, list(self._arguments(name, self._pairs(place))), []))
        return calls

    def _items(self, call: ast.Call) -> Iterator[str]:
        for node in self.nodes:
            match node:
                case ast.Subscript(value=whole, slice=ast.Constant(value=str(word))):
                    if call is (self.values.get(whole.id) if isinstance(whole, ast.Name) else whole):
                        yield word

    def _pairs(self, node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
        """Yield the arguments of a call, or the keys of a dictionary that is written out or that a name stands for."""
        if isinstance(node, ast.Name) and _is_dictionary(self.values.get(node.id)):
            self.spread.add(node.id)
            node = self.values[node.id]
        match node:
            case ast.Dict(keys=keys, values=values):
                words = list(zip(map(_word, keys), values, strict=True))
            case ast.Call() if node in self.calls or _is_dictionary(node):
                words = [(f"argument {number}", value) for number, value in enumerate(node.args, 1)]
                words += [(word.arg, word.value) for word in node.keywords]
            case _:
                words = [(f"**{ast.unparse(node)}", node)]
        for word, value in words:
            yield from self._pairs(value) if word is None else [(word, value)]

    def _arguments(self, call: str, pairs: Iterator[tuple[str, ast.expr]]) -> Iterator[Argument]:
        for key, node in dict(pairs).items():  # of two keys in a dictionary the later wins
            origin = node.value if isinstance(node, ast.Subscript) else node
            if origin in self.calls or (isinstance(origin, ast.Name) and origin.id in self.results):
                continue  # read where it is made
            try:
                value = NOT_LITERAL if key in self.changed else self._value(node)
            except (ValueError, TypeError):
                value = NOT_LITERAL
            yield Argument(node.lineno, f"{call}: {key} = {ast.unparse(node)}", key, value)

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Name(id=name) if name in self.values:
                return self._value(self.values[name])
            case ast.Attribute(value=ast.Name(id=name), attr=word) if name in _ENUMERATIONS:
                return word
            case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
                return [self._value(part) for part in parts]
            case ast.Dict():
                return {key: self._value(value) for key, value in self._pairs(node)}
        value = ast.literal_eval(node)
        if not isinstance(value, str | int | float | None):
            raise ValueError("YAML has no such value")
        return value


def _name(call: ast.Call, known: Collection[str]) -> str:
    dotted = f".{ast.unparse(call.func)}" if isinstance(call.func, ast.Name | ast.Attribute) else ""
    return next((name for name in known if dotted.endswith(f".{name}")), "")


def _word(key: ast.expr | None) -> str | None:
    if isinstance(key, ast.Constant):
        return str(key.value)
    return None if key is None else f"[{ast.unparse(key)}]"


def _is_dictionary(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Dict) or (isinstance(node, ast.Call) and ast.unparse(node.func) == "dict")


def _assignments(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    match node:
        case ast.Assign(targets=[target], value=value) | ast.AnnAssign(target=target, value=ast.expr() as value):
            parts = target.elts if isinstance(target, ast.Tuple) and isinstance(value, ast.Call) else [target]
            yield from ((part.id, value) for part in parts if isinstance(part, ast.Name))


def _bindings(node: ast.AST) -> Iterator[str]:
    """Yield the name that a node binds, or whose value it changes."""
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()) | ast.arg(arg=name):
            yield name
        case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
            yield name
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)) if method in _CHANGES:
            yield name
