"""Every benchmark, one after the other; what each prints is kept in ``results/`` with machine, releases and commit.

On two idle cores it takes an hour or more. Benchmarks that need a peer run in that peer's environment, which is made
where it is missing.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from contenders import environments, machine

HERE = Path(__file__).parent
SCRIPTS: dict[str, str | None] = {
    "products": None, "step_profile": None, "cost_per_token": None, "adapters": None, "checkpoints": None,
    "restart": None, "distributed": None, "data_preparation": "trl",
}  # fmt: skip
"""What runs before the comparisons with peers, which write their own files, and the peer whose environment it needs."""


def run(script: str, python: Path) -> tuple[int, str]:
    """Run a script, show what it prints as it comes, and return its exit status and all that it printed."""
    command = [python, str(HERE / f"{script}.py")]
    env = os.environ | {"COLUMNS": "120"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def write(script: str, text: str, facts: dict[str, str], python: Path) -> None:
    releases = ", ".join(f"{name} {version}" for name, version in environments.versions(python).items())
    said = "".join(f"- {key}: {value}\n" for key, value in facts.items())
    path = HERE / "results" / f"{script}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"# {script}\n\nWritten by `benchmarks/{script}.py`.\n\n{said}- {releases}\n\n```text\n{text}```\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=environments.FOLDER, help="where peers' environments are kept")
    parser.add_argument("--real", type=Path, help="folder of the real model; else it is converted")
    given = parser.parse_args()
    failed = []
    for script, peer in SCRIPTS.items():
        print(f"== {script}", flush=True)
        facts, start = machine.provenance(), time.perf_counter()
        try:
            python = Path(sys.executable) if peer is None else environments.make(peer, given.peers)
        except RuntimeError as error:
            print(error)
            failed.append(script)
            continue
        status, text = run(script, python)
        if status != 0:
            failed.append(script)
            continue
        write(script, text, facts | {"took": f"{time.perf_counter() - start:.0f} s"}, python)
    options = ["--peers", str(given.peers)] + (["--real", str(given.real)] if given.real else [])
    for script in ("training", "preferences"):
        print(f"== {script}", flush=True)
        if subprocess.run([sys.executable, str(HERE / f"{script}.py"), *options], check=False).returncode != 0:
            failed.append(script)
    if failed:
        sys.exit(f"these benchmarks failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
