"""Which room may import which, and what the package shows to others."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import phi3_lightning

PACKAGE = Path(phi3_lightning.__file__).parent
NAME = "phi3_lightning"
ROOMS = ("data", "model", "adapters")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str) -> set[str]:
    """The package's own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name == NAME or name.startswith(f"{NAME}.")}


IMPORTS = {module_name(path): imports_of(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def within(name: str, room: str) -> bool:
    return name == f"{NAME}.{room}" or name.startswith(f"{NAME}.{room}.")


def importers(room: str) -> set[str]:
    """Modules outside ``room`` that import something of it."""
    return {
        name for name, imported in IMPORTS.items() if not within(name, room) and any(within(i, room) for i in imported)
    }


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_never_import_each_other(room):
    others = {name for name in importers(room) if any(within(name, other) for other in ROOMS)}
    assert others == set()


def test_only_the_command_line_and_the_package_see_the_data():
    seen = {name for name in importers("data") if not (within(name, "commands") or within(name, "checks"))}
    assert seen == {NAME, f"{NAME}.cli"}


def test_the_room_of_checks_is_the_command_s_alone():
    assert {name for name in importers("checks") if not within(name, "commands")} == set()


def test_nothing_but_commands_imports_the_command_line():
    assert {name for name in importers("cli") if not within(name, "commands")} == set()


def test_the_module_uses_both_of_its_rooms():
    assert {"model", "adapters"} <= {room for room in ROOMS if f"{NAME}.module" in importers(room)}


@pytest.mark.parametrize("base", ["errors", "config", "batch"])
def test_what_all_share_imports_no_room(base):
    assert IMPORTS[f"{NAME}.{base}"] <= {f"{NAME}.errors", f"{NAME}.errors.ConfigError"}


def test_no_import_goes_unseen():
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
