"""Hashes what the package's code does, for the keys of caches. Comments, docstrings and formatting do not count."""

import ast
import hashlib
import inspect
import sys
from functools import cache
from pathlib import Path


@cache
def code_fingerprint(module: str) -> str:
    """Return a hash of the code of a module and of the modules of its package that it imports."""
    digest = hashlib.blake2b(digest_size=16)
    for tree in package_code(module).values():
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


def package_code(module: str) -> dict[str, ast.Module]:
    """Return the code without docstrings, by name, of a module and of the modules of its package that it imports."""
    package, code, names = module.partition(".")[0], dict[str, ast.Module](), [module]
    while names:
        name = names.pop()
        if name in sys.modules and name not in code and name.startswith(f"{package}."):
            code[name] = without_docstrings(Path(inspect.getfile(sys.modules[name])).read_text(encoding="utf-8"))
            for node in code[name].body:
                if isinstance(node, ast.ImportFrom):
                    names += [f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return code


def without_docstrings(source: str) -> ast.Module:
    """Parse code, without the statements that are only a text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [each for each in node.body if not _is_text(each)]
    return tree


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
