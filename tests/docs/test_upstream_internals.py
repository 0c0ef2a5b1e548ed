"""The page of upstream internals names each one that the code depends on, with a test that would notice a change."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import phi3_lightning
from cli.conftest import REPOSITORY

PACKAGE = Path(phi3_lightning.__file__).parent
PAGE = (REPOSITORY / "docs/upstream_internals.md").read_text(encoding="utf-8")
PRIVATE = re.compile(r"_[a-zA-Z]\w*")
PROMISED = {"_exit", "_fields"}
"""``os._exit`` and ``NamedTuple._fields`` are documented."""


def own_names(nodes: list[ast.AST]) -> set[str]:
    """The names that a file defines: functions, classes, variables, and attributes of its own objects."""
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef) and not overrides(node)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names | {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


def overrides(node: ast.AST) -> bool:
    return any(ast.unparse(decorator) == "override" for decorator in getattr(node, "decorator_list", []))


def internals(source: str) -> set[str]:
    """Private names, modules among them, that a file uses and does not define, wherever they come from."""
    nodes = list(ast.walk(ast.parse(source)))
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {node.name for node in nodes if isinstance(node, ast.FunctionDef) and overrides(node)}
    used |= {node.arg for node in nodes if isinstance(node, ast.keyword) and node.arg}
    used |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            used |= {*node.module.split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            used |= {part for alias in node.names for part in alias.name.split(".")}
    return {name for name in used - own_names(nodes) - PROMISED if PRIVATE.fullmatch(name)}


def shared_attributes(cls: type, package: str = phi3_lightning.__name__) -> set[str]:
    """Private attributes of ``self`` that a class has in common with a base class of another package."""
    ours, theirs = set(), set()
    for each in cls.__mro__:
        if each.__module__.startswith(package):
            ours |= private_attributes(each)
        elif each.__module__ not in ("builtins", "typing", "abc"):
            theirs |= private_attributes(each)
    return ours & theirs


def private_attributes(cls: type) -> set[str]:
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # a class made at run time, or a built-in one
        source = ""
    names = {*re.findall(r"\bself\.(_[a-zA-Z]\w*)", source), *(name for name in vars(cls) if name in source)}
    return {name for name in names if PRIVATE.fullmatch(name) and not name.startswith(("_abc_", "_is_"))}


def classes() -> list[type]:
    names = sorted(
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
    )
    modules = [importlib.import_module(name) for name in names]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__
    ]


LISTED = set(re.findall(r"(?<!\w)(_[a-zA-Z]\w*)", PAGE))


def test_each_private_name_of_another_package_is_listed():
    files = {path: internals(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    assert {path.name: names - LISTED for path, names in files.items() if names - LISTED} == {}


def test_each_private_attribute_that_is_shared_with_a_foreign_base_class_is_listed():
    shared = {cls.__name__: shared_attributes(cls) - LISTED for cls in classes()}
    assert {name: names for name, names in shared.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch._subclasses.fake_tensor", {"_subclasses"}),
        ("from torch.utils import _pytree", {"_pytree"}),
        ("def f(trainer):\n    return trainer._signal_connector", {"_signal_connector"}),
        ("class A(B):\n    @override\n    def _get(self): ...", {"_get"}),
        ("cached_file(_raise_exceptions=False)", {"_raise_exceptions"}),
        ("setattr(model, '_attn', 1)", {"_attn"}),
        ("class A:\n    def __init__(self):\n        self._own = 1\n    def f(self):\n        return self._own", set()),
        ("def _own(): ...\n_own()", set()),
    ],
)
def test_a_private_name_is_found_wherever_it_stands(source, names):
    assert internals(source) == names


def test_a_private_attribute_of_a_base_class_is_found():
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Ours(ModelParallelStrategy):
        def setup_environment(self):
            self._data_parallel_size = 2

    assert "_data_parallel_size" in shared_attributes(Ours, package=__name__)


def rows() -> list[list[str]]:
    """The cells of each row of the page's tables."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| name", "| what"))]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:60])
def test_each_row_is_true(row):
    names, files, *_, noticed = row
    sources = [(PACKAGE / file).read_text(encoding="utf-8") for file in re.findall(r"`([\w/]+\.py)`", files)]
    assert sources
    for name in re.findall(r"(?<!\w)(_[a-zA-Z]\w*)`", names):
        assert any(name in source for source in sources), f"{name} is in none of {files}"
    assert re.search(r"\[test_\w+(\.py)?\]\(\.\./tests/[\w/]+\.py\)", noticed)
