"""Install wheel and sdist where nothing else is, and use them there as a user does; `make dist` builds and calls it.

    python scripts/check_dist.py dist

The environment, its home and its working folder are temporary, outside the checkout.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from rich.console import Console

BARE = Path(__file__).with_name("check_bare_install.py")
CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"


def main() -> None:
    """Install what the command line names, one after the other, and use it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where wheel and sdist are")
    folder = parser.parse_args().folder.resolve()
    [wheel], [sdist] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as place:
        venv.create(Path(place) / "venv", with_pip=True)
        # the dependencies come once, with the wheel: they are the same for both, and take longer than all the rest
        for built, options in ((wheel, []), (sdist, ["--no-deps", "--force-reinstall"])):
            console.print(f"== {built.name} in an empty environment")
            pip = [f"{place}/venv/bin/python", "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS)]
            subprocess.run([*pip, *options, str(built)], check=True)
            use(Path(place), built.name)
    console.print(f"{wheel.name} and {sdist.name} work where nothing else is")


def use(place: Path, name: str) -> None:
    """Take what is installed through the first minutes of a user without a checkout.

    Args:
        place: The folder that holds ``venv``.
        name: Of the folder to work in.

    Raises:
        SystemExit: If no checkpoint comes of it.
        subprocess.CalledProcessError: If a command fails.
    """
    work, binaries = place / f"work-{name}", place / "venv/bin"
    work.mkdir()
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "VIRTUAL_ENV"))}
    environment = keep | {"HOME": str(work)}  # no caches, no settings

    def run(*command: str | Path) -> None:
        subprocess.run(command, cwd=work, env=environment, check=True)

    run(binaries / "phi3-lightning", "init", "configs")
    run(binaries / "phi3-lightning", "fit", "--config", "configs/quickstart.yaml", "--trainer.max_steps", "3")
    if not (work / "runs/quickstart/checkpoints/last.ckpt").is_file():
        sys.exit(f"{name}: the quickstart left no checkpoint")
    run(binaries / "python", BARE, "configs/quickstart.yaml")


if __name__ == "__main__":
    main()
