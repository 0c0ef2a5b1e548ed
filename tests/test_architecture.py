"""Which room may import which, and what an import of the package loads."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import phi3_lightning

PACKAGE = Path(phi3_lightning.__file__).parent
NAME = "phi3_lightning"
ROOMS = ("data", "model", "adapters", "objectives")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str) -> set[str]:
    """The full names of everything that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_of(source: str) -> set[str]:
    """The package's own modules that a file imports, and the names in them."""
    names = imported(source)
    names |= {name.rpartition(".")[0] for name in names}
    return {name for name in names if name == NAME or name.startswith(f"{NAME}.")}


SOURCES = {module_name(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
IMPORTS = {name: imports_of(source) for name, source in SOURCES.items()}
PROJECT = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {
    re.match(r"[\w-]+", requirement)[0].replace("-", "_")
    for requirements in PROJECT["optional-dependencies"].values()
    for requirement in requirements
}


def files_of(source: str, files: Collection[str]) -> set[str]:
    """The files that a file imports; ``from x import y`` imports ``x.y`` where that is a file, else ``x``."""
    return {name if name in files else name.rpartition(".")[0] for name in imported(source)} & set(files)


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """The files that each file imports."""
    return {name: files_of(source, sources) - {name} for name, source in sources.items()}


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """A cycle of files that import each other; empty if there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_import_cycle_among_files():
    assert cycle(graph(SOURCES)) == []


def rooms(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The rooms that each room imports; a top-level file is a room of its own."""
    room = {name: ".".join(name.split(".")[:2]) for name in edges}
    result: dict[str, set[str]] = {}
    for name, imported_files in edges.items():
        result.setdefault(room[name], set()).update({room[file] for file in imported_files} - {room[name]})
    return result


def test_no_import_cycle_among_rooms():
    assert cycle(rooms(graph(SOURCES))) == []


def test_a_cycle_of_rooms_is_found_where_files_have_none():
    sources = {
        "phi3_lightning.a.one": "from phi3_lightning.b import one",
        "phi3_lightning.b.one": "import torch",
        "phi3_lightning.b.two": "from phi3_lightning.a.two import X",
        "phi3_lightning.a.two": "",
    }
    assert cycle(graph(sources)) == []
    assert set(cycle(rooms(graph(sources)))) == {"phi3_lightning.a", "phi3_lightning.b"}


@pytest.mark.parametrize(
    "last",
    [
        "import phi3_lightning.a",
        "from phi3_lightning.a import X",
        "from phi3_lightning import a",
        "def late():\n    from phi3_lightning.a import X",
        "if TYPE_CHECKING:\n    from phi3_lightning.a import X",
    ],
)
def test_a_cycle_is_found_whatever_closes_it(last):
    sources = {
        "phi3_lightning": "from phi3_lightning.a import X",
        "phi3_lightning.a": "from phi3_lightning.room import b",
        "phi3_lightning.room": "",
        "phi3_lightning.room.b": "import torch",
    }
    assert cycle(graph(sources)) == []
    found = cycle(graph(sources | {"phi3_lightning.room.b": last}))
    assert set(found) == {"phi3_lightning.a", "phi3_lightning.room.b"}


def top_level(source: str) -> str:
    """A file without the bodies of its functions."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    return ast.unparse(tree)


def need_an_extra(sources: dict[str, str], extras: set[str]) -> set[str]:
    """Files that can be imported only with an extra installed."""
    tops = {name: top_level(source) for name, source in sources.items()}
    edges = graph(tops)
    found: set[str] = set()
    for name in TopologicalSorter(edges).static_order():
        packages = {whole.split(".")[0] for whole in imported(tops[name])}
        if packages & extras or edges[name] & found:
            found.add(name)
    return found


def late_imports(sources: dict[str, str], extras: set[str]) -> set[tuple[str, str]]:
    """Imports of the package's own files within functions, except of files that need an extra."""
    exempt = need_an_extra(sources, extras)
    return {
        (name, file)
        for name, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for file in files_of(ast.unparse(node), sources) - exempt
    }


def test_no_function_imports_a_file_of_the_package():
    assert late_imports(SOURCES, EXTRAS) == set()


def test_an_import_within_a_function_is_found_unless_its_file_needs_an_extra():
    sources = {
        "phi3_lightning.a": "class A:\n    async def f(self):\n        from phi3_lightning import b, c, d",
        "phi3_lightning.b": "import torch\ndef f():\n    import loralib",
        "phi3_lightning.c": "from phi3_lightning.d import layer",
        "phi3_lightning.d": "import loralib",
    }
    assert late_imports(sources, {"loralib"}) == {("phi3_lightning.a", "phi3_lightning.b")}
    assert late_imports(sources, set()) == {("phi3_lightning.a", f"phi3_lightning.{file}") for file in "bcd"}


def within(name: str, room: str) -> bool:
    return name == f"{NAME}.{room}" or name.startswith(f"{NAME}.{room}.")


def importers(room: str) -> set[str]:
    """Modules outside ``room`` that import from it."""
    return {
        name for name, imported in IMPORTS.items() if not within(name, room) and any(within(i, room) for i in imported)
    }


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_never_import_each_other(room):
    others = {name for name in importers(room) if any(within(name, other) for other in ROOMS)}
    assert others == set()


def test_only_the_command_line_and_the_package_import_the_data():
    seen = {name for name in importers("data") if not (within(name, "commands") or within(name, "checks"))}
    assert seen == {NAME, f"{NAME}.cli"}


def test_only_its_command_imports_the_checks():
    assert {name for name in importers("checks") if not within(name, "commands")} == set()


def test_nothing_but_commands_imports_the_command_line():
    assert {name for name in importers("cli") if not within(name, "commands")} == set()


def test_the_module_uses_both_of_its_rooms():
    assert {"model", "adapters"} <= {room for room in ROOMS if f"{NAME}.module" in importers(room)}


@pytest.mark.parametrize("base", ["errors", "hub", "config", "batch"])
def test_shared_modules_import_no_room(base):
    files = graph(SOURCES)
    others = {file for name in files if within(name, base) for file in files[name] if not within(file, base)}
    assert others <= {f"{NAME}.errors", f"{NAME}.files", f"{NAME}.hub", f"{NAME}.renamed"}


INSERTED = ("base_layer", "original_module", "lora_A", "lora_B", "lora_embedding", "lora_magnitude")
"""Texts that the backends insert into the names of parameters."""


def key_names(source: str) -> set[str]:
    """The names of adapters' keys that a file spells, as text (in docstrings too) or as an attribute."""
    spelled = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            spelled |= {name for name in INSERTED if name in node.value}
        elif isinstance(node, ast.Attribute):
            spelled |= {name for name in INSERTED if node.attr == name}
    return spelled


def test_only_the_adapters_spell_their_key_names():
    spelled = {name: keys for name in SOURCES if not within(name, "adapters") if (keys := key_names(SOURCES[name]))}
    assert spelled == {f"{NAME}.optim": {"lora_A", "lora_B"}}  # as roles, after which parameter groups are named


def test_only_one_file_spells_the_names_of_quantised_weights():
    assert [name for name, source in SOURCES.items() if '"SCB"' in source] == [f"{NAME}.checkpoint.identity"]


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ('name.replace(".base_layer", "")', "base_layer"),
        ("layer.base_layer.weight", "base_layer"),
        ('f"{path}.original_module.weight"', "original_module"),
        ('hasattr(module, "lora_A")', "lora_A"),
        ('".lora_B" in name and ".embed_tokens." not in name', "lora_B"),
    ],
)
def test_the_name_of_a_key_is_found(source, key):
    assert key in key_names(source)
    assert key_names("model.embed_tokens.weight; adapter.lora_AB(target); 'model.embed_tokens.weight'") == set()


def test_every_import_is_analysed():
    source = "def late():\n    from phi3_lightning.data.template import x\n    import phi3_lightning.cli\n"
    found = imports_of(source)
    assert {"phi3_lightning.data.template", "phi3_lightning.cli"} <= found


RECORDER = """
import sys
frame = sys._getframe(1)
while "importlib" in frame.f_globals["__name__"]:
    frame = frame.f_back
IMPORTER = frame.f_globals["__name__"]
__version__ = "9.9.9"
"""
FRESH = """
import sys
sys.path.insert(0, {extras!r})
{statement}
import json
print(json.dumps({{name: vars(module).get("IMPORTER") for name, module in sys.modules.items()}}))
"""


def loaded_after(statement: str, extras: Path) -> dict[str, str | None]:
    """All modules that a fresh interpreter has after ``statement``; for a stand-in of an extra, who imported it."""
    for extra in ("bitsandbytes", "loralib", "rouge_score", "sacrebleu"):
        (extras / f"{extra}.py").write_text(RECORDER, encoding="utf-8")
    code = FRESH.format(extras=str(extras), statement=statement)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return json.loads(result.stdout.splitlines()[-1])


def test_importing_the_package_loads_neither_the_command_line_nor_an_extra(tmp_path):
    loaded = loaded_after(f"import {NAME}", tmp_path)
    assert f"{NAME}.module" in loaded
    assert not loaded.keys() & {f"{NAME}.cli", "jsonargparse"}
    for extra in ("bitsandbytes", "loralib", "rouge_score", "sacrebleu"):
        # PEFT itself looks for quantised layers where bitsandbytes is installed
        assert extra not in loaded or loaded[extra].startswith("peft.")


def test_an_import_of_an_extra_would_be_seen(tmp_path):
    assert loaded_after("import loralib", tmp_path)["loralib"] == "__main__"
