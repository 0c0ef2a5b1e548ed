"""In an environment without extras every module imports, and what an extra brings is refused by the extra's name.

    python scripts/check_bare_install.py configs/quickstart.yaml   # of `phi3-lightning init configs`

Part of `make dist`; it leans on nothing but the package, whose own warnings are errors.
"""

import contextlib
import importlib
import io
import pkgutil
import sys
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

EXTRAS = {"loralib": "loralib", "qlora": "bitsandbytes", "eval": "rouge_score", "gguf": "gguf"}
"""A package of each extra."""

OF_AN_EXTRA = {
    "phi3_lightning.adapters.loralib_backend": "loralib",
    "phi3_lightning.adapters.loralib_layers": "loralib",
    "phi3_lightning.export.gguf": "gguf",
    "phi3_lightning.export.gguf_model": "gguf",
}
"""Modules that only the extra's own option imports, and what they miss."""

REFUSED = {
    "loralib": ["fit", "--run=loralib", "--model.lora.backend=loralib"],
    "qlora": ["fit", "--run=qlora", "--model.quantization=nf4"],
    "eval": ["test", "--run=eval"],
}
"""What asks for each extra."""


def main() -> None:
    """Check the environment that this runs in."""
    present = [extra for extra, package in EXTRAS.items() if find_spec(package) is not None]
    if present:
        sys.exit(f"not a bare environment: it has the extras {', '.join(present)}")
    modules = import_all()
    names = [f"{module.__name__}.{name}" for module in modules for name in public(module)]
    for extra, (command, *options) in REFUSED.items():
        told = refusal([command, "--config", sys.argv[1], *options])
        if f"phi3-lightning[{extra}]" not in told:
            sys.exit(f"{' '.join([command, *options])}: the extra {extra} is not named: {told!r}")
    print(
        f"{len(modules)} modules, {len(names)} public names; without extras: {', '.join(REFUSED)} are refused by name"
    )


def import_all() -> list:
    """Import every module of the installed package."""
    warnings.filterwarnings("error", module=r"phi3_lightning(\.|$)")
    package = importlib.import_module("phi3_lightning")
    if not Path(package.__file__).is_relative_to(sys.prefix):
        sys.exit(f"{package.__file__} is not in {sys.prefix}: this is not the installed package")
    if package.__version__ != version("phi3-lightning"):
        sys.exit(f"the package is {package.__version__}, its metadata say {version('phi3-lightning')}")
    found = [package]
    for module in pkgutil.walk_packages(package.__path__, "phi3_lightning."):
        missing = OF_AN_EXTRA.get(module.name)
        try:
            found.append(importlib.import_module(module.name))
        except ModuleNotFoundError as error:
            if missing is None or error.name != missing:
                raise
        else:
            if missing is not None:
                sys.exit(f"{module.name} imports without {missing}: take it out of OF_AN_EXTRA")
    return found


def public(module: object) -> list[str]:
    """The names of a module's ``__all__``, each of which has to be there."""
    names = getattr(module, "__all__", [])
    for name in names:
        getattr(module, name)
    return names


def refusal(command: list[str]) -> str:
    """What the command line says on its way out."""
    from phi3_lightning.cli import main as cli

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            cli(command)
        except SystemExit as end:
            return said.getvalue() if end.code == 1 else ""
    return ""


if __name__ == "__main__":
    main()
