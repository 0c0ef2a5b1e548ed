"""An environment for each peer, on top of the one this runs in: the same torch, transformers and PEFT for all."""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "phi3_lightning" / "benchmarks"
FOLDER = CACHE / "peers"
"""Where environments are kept unless another folder is given."""

LISTS = Path(__file__).parent / "peers"
"""What pip installs for each peer, and on a GPU also the list with ``-cuda`` in its name. pip adds nothing: what else a
peer needs, the package's own environment has. docs/performance.md says how it goes without a network."""

SHOWN = ("torch", "transformers", "peft", "lightning", "trl", "llamafactory", "litgpt", "unsloth", "liger-kernel")


def make(name: str, folder: Path, cuda: bool = False) -> Path:
    """Return the Python of a peer's environment, which is made where it is missing or was made for other releases.

    Args:
        name: That of a list in ``LISTS``.
        folder: Where the environments are kept.
        cuda: Whether to install what needs a GPU as well.

    Raises:
        RuntimeError: If pip cannot install it, with pip's last words.
    """
    home = folder / name
    python = home / "bin" / "python"
    lists = [LISTS / f"{name}.txt"]
    if cuda and (more := LISTS / f"{name}-cuda.txt").is_file():
        lists.append(more)
    host = sysconfig.get_path("purelib")
    wanted = hashlib.sha256(json.dumps([[path.read_text() for path in lists], host, sys.version]).encode()).hexdigest()
    mark = home / "installed"
    if mark.is_file() and mark.read_text() == wanted:
        return python
    print(f"making the environment of {name} in {home}", file=sys.stderr)
    venv.create(home, with_pip=True, clear=True)
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    (Path(found.stdout.strip()) / "host.pth").write_text(f"import site; site.addsitedir({host!r})\n")
    pip = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
         *(word for path in lists for word in ("--requirement", path))],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if pip.returncode != 0:
        raise RuntimeError(f"pip install of {name}: {pip.stderr.strip().splitlines()[-1]}")
    mark.write_text(wanted)
    return python


def versions(python: Path) -> dict[str, str]:
    """Return the releases that an environment has of what is compared, its own before those below it."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "def of(name):\n"
        "    try: return m.version(name)\n"
        "    except m.PackageNotFoundError: return None\n"
        "print(json.dumps({name: of(name) for name in sys.argv[1:] if of(name)}))"
    )
    run = subprocess.run([python, "-c", code, *SHOWN], check=True, capture_output=True, text=True)
    return json.loads(run.stdout)
