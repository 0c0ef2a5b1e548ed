"""Everything that only a GPU can show, in pieces of at most eight minutes, what is least known first.

Each piece is a process with a time limit of its own. It prints as it goes; its log, its result and the table of all
results, ``summary.md``, are in the output folder as soon as it ends. The same command again runs what is missing or has
failed, so that the hour may be cut into several. With ``--dry`` each piece runs on a CPU at tiny size: nothing is
measured, but every command is known to work. docs/performance.md says how the hour is prepared.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
BENCHMARKS = REPOSITORY / "benchmarks"
TINY = REPOSITORY / "src" / "phi3_lightning" / "assets" / "tiny_phi3"
WORK = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "phi3_lightning" / "benchmarks" / "gpu_checks"
"""The base of 8 GB and what runs leave, which need not be kept."""
LIMIT = 480
"""Seconds of a piece at the most."""
TEST_LIMIT = 150

PREPARE = """
import sys
from pathlib import Path
from contenders import chats, models
base, file, layers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
if layers:
    models.write_random(base, layers)
chats.write_chats(file, 2_000 if layers else 60, chats.tokenizer_of(str(base)))
"""
"""Writes Phi-3-mini's shapes with random weights, and chats."""

STEPS: dict[str, list[str]] = {
    "none": [],
    "selective": ["--gradient_checkpointing", "selective"],
    "offload": ["--gradient_checkpointing", "offload"],
    "compiled": ["--compile", "layers"],
    "compiled, DoRA": ["--compile", "layers", "--dora"],
    "compiled, nf4": ["--compile", "layers", "--quantization", "nf4"],
}
"""A step of the full size by ``step_profile.py``, with its kernels."""
ON_A_CPU = {
    "offload": ["--gradient_checkpointing", "full"], "compiled": [], "compiled, DoRA": ["--dora"], "compiled, nf4": [],
}  # fmt: skip
"""What is left of those on a CPU, which neither offloads nor compiles, and quantises only with another package."""
PEERS = {
    "peers, TRL": ["phi3_lightning", "TRL"],
    "peers, Unsloth": ["phi3_lightning, compiled", "Unsloth"],
    "peers, others": ["phi3_lightning, compiled", "LLaMA-Factory", "LitGPT", "transformers"],
}
"""Tables of ``training.py``, each with the contenders that fit into a piece, and this package in every one."""


@dataclass(frozen=True)
class Piece:
    """A command, and the seconds after which it is ended."""

    name: str
    command: list[str]
    limit: float = LIMIT
    env: dict[str, str] = field(default_factory=dict)
    always: bool = False
    """Whether it runs in any case, as what others need; results may have been copied from another machine."""


@dataclass(frozen=True)
class Result:
    """How a piece ended."""

    name: str
    outcome: str
    """``passed``, ``failed``, or ``ended`` at its limit."""
    seconds: float
    date: str
    commit: str
    device: str


def tests(dry: bool, python: str) -> Iterator[Piece]:
    """Yield the tests of ``tests/cuda`` one by one; in the dry form file by file."""
    folder = REPOSITORY / "tests" / "cuda"
    options = ["-q"]
    if dry:
        for path in sorted(folder.glob("test_*.py")):
            yield Piece(f"tests {path.stem}", [python, "-m", "pytest", *options, str(path)], LIMIT, {"DRY_GPU": "1"})
        return
    collect = [python, "-m", "pytest", "--collect-only", "-q", str(folder)]
    found = subprocess.run(collect, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    for line in found.stdout.splitlines():
        if "::" in line:
            yield Piece(f"test {line.rpartition('::')[2]}", [python, "-m", "pytest", *options, line], TEST_LIMIT)


def pieces(out: Path, dry: bool) -> Iterator[Piece]:
    """Yield all pieces, what is least known first."""
    python = sys.executable
    base, chats = TINY if dry else WORK / "base", WORK / ("few.jsonl" if dry else "chats.jsonl")
    prepare = [python, "-c", PREPARE, str(base), str(chats), "0" if dry else "32"]
    yield Piece("base and chats", prepare, always=True)
    yield from tests(dry, python)
    row, turns = ("256", "1") if dry else ("4096", "8")
    profile = [
        python, str(BENCHMARKS / "step_profile.py"), f"--base={base}", f"--row_tokens={row}", f"--repeats={turns}"
    ]  # fmt: skip
    for name, options in STEPS.items():
        options = ON_A_CPU.get(name, options) if dry else options
        yield Piece(f"step, {name}", [*profile, *options, "--operators", "5" if dry else "40"])
    products = ["--rows", "16", "--shrink", "64", "--repeats", "1"] if dry else ["--rows", "4096"]
    yield Piece("products in 8 bits", [python, str(BENCHMARKS / "products.py"), *products])
    yield Piece("auto in a run", [python, str(REPOSITORY / "cli.py"), *auto_run(base, chats, dry)])
    small, whole = ["--row-tokens=512", "--micro-batch=1", "--steps=2"], ["--row-tokens=4096", "--steps=6"]
    table = [python, str(BENCHMARKS / "training.py"), "--models=full", f"--full={base}", "--repeats=1", "--same-rows"]
    table += [*(small if dry else whole), f"--device={'cpu' if dry else 'cuda'}"]
    for name, contenders in PEERS.items():
        if dry:
            contenders = ["phi3_lightning, checkpointing", "transformers + peft, checkpointing"]
        yield Piece(name, [*table, f"--output={out / slug(name)}.md", "--only", *contenders])
    amount = ["--rows", "4", "--max_new_tokens", "4"] if dry else ["--rows", "64", "--max_new_tokens", "128"]
    generation = [python, str(BENCHMARKS / "generation.py"), str(base), *amount, "--repeats", "1" if dry else "3"]
    yield Piece("generation", [*generation, "--prompts", str(chats)])


def auto_run(base: Path, chats: Path, dry: bool) -> list[str]:
    """Return the arguments of a short run whose sizes are all ``auto``, with a validation."""
    return [
        "fit", "--model.base", str(base), "--data.train", str(chats), "--data.max_tokens_per_batch", "auto",
        "--data.max_length", "256" if dry else "4096", "--data.val_fraction", "0.2",
        "--data.cache_dir", str(WORK / "cache"), "--trainer.accelerator", "cpu" if dry else "gpu",
        "--trainer.devices", "1", "--trainer.max_steps", "1" if dry else "4", "--trainer.val_check_interval", "1",
        "--trainer.default_root_dir", str(WORK), "--run", f"auto-{time.time_ns()}",
        "--monitor.samples", "0", "--monitor.base_drift", "false",
    ]  # fmt: skip


def slug(name: str) -> str:
    """Return a name as a file's."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def run(piece: Piece, log: Path, limit: float) -> tuple[str, float]:
    """Run a piece, showing and keeping what it prints as it comes; return how it ended, and its seconds."""
    paths = [str(REPOSITORY / "src"), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", **piece.env}
    start, late = time.monotonic(), threading.Event()
    with subprocess.Popen(
        piece.command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    ) as process, log.open("w", encoding="utf-8") as file:  # fmt: skip

        def end() -> None:
            late.set()
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.killpg(process.pid, signal.SIGKILL)  # its own processes too, which would keep the GPU's memory

        timer = threading.Timer(limit, end)
        timer.start()
        for line in process.stdout:
            print(f"    {line}", end="", flush=True)
            file.write(line)
            file.flush()
        status = process.wait()
        timer.cancel()
    outcome = "ended" if late.is_set() else "passed" if status == 0 else "failed"
    return outcome, time.monotonic() - start


def device_name() -> str:
    """Return the name of the GPU, or ``CPU``; a process of its own asks, so that this one keeps nothing on the GPU."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU')"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def commit() -> str:
    """Return the commit of the working tree, as far as git knows."""
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    return subprocess.run(git, check=False, capture_output=True, text=True).stdout.strip() or "unknown"


def earlier(out: Path) -> dict[str, Result]:
    """Return the results that are in the output folder."""
    results = (Result(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(out.glob("*.result.json")))
    return {result.name: result for result in results}


def write_summary(out: Path, names: list[str]) -> None:
    """Write the table of all results, in the order of the pieces."""
    results = earlier(out)
    lines = ["| piece | outcome | seconds | device | date | commit |", "|---|---|---:|---|---|---|"]
    for name in names:
        if (found := results.get(name)) is None:
            lines.append(f"| {name} | not run | | | | |")
        else:
            cells = (name, found.outcome, f"{found.seconds:.0f}", found.device, found.date, found.commit)
            lines.append(f"| {' | '.join(cells)} |")
    (out / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_all(every: Sequence[Piece], out: Path, device: str, seconds: float, only: Sequence[str] = ("",)) -> list[str]:
    """Run the pieces that have not passed yet; return the names of those that have not passed now.

    Args:
        every: The pieces, in their order.
        out: The output folder.
        device: Name of the device, for the results.
        seconds: After how many no piece begins, and the last one is ended.
        only: Words, of which the name of a piece that runs has one.
    """
    end, state = time.monotonic() + seconds, commit()
    chosen = [piece for piece in every if piece.always or any(word in piece.name for word in only)]
    for piece in chosen:
        before = earlier(out).get(piece.name)
        if before is not None and before.outcome == "passed" and not piece.always:
            continue
        if (left := end - time.monotonic()) <= 0:
            break
        print(f"== {piece.name}", flush=True)
        outcome, taken = run(piece, out / f"{slug(piece.name)}.log", min(piece.limit, left))
        date = time.strftime("%Y-%m-%d %H:%M")
        result = Result(piece.name, outcome, round(taken, 1), date, state, device)
        path = out / f"{slug(piece.name)}.result.json"
        path.write_text(json.dumps(asdict(result)), encoding="utf-8")
        write_summary(out, [piece.name for piece in every])
        print(f"== {piece.name}: {outcome} after {taken:.0f} s", flush=True)
    results = earlier(out)
    names = [piece.name for piece in chosen]
    return [name for name in names if name not in results or results[name].outcome != "passed"]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on a CPU at tiny size: does every piece run?")
    parser.add_argument(
        "--output", type=Path, help="folder of logs and results; default: gpu_checks, or gpu_checks-dry"
    )
    parser.add_argument("--only", nargs="+", metavar="WORD", help="pieces whose names hold one of these")
    parser.add_argument("--minutes", type=float, default=60.0, help="end after so many")
    given = parser.parse_args()
    out = (given.output or Path("gpu_checks-dry" if given.dry else "gpu_checks")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    device = "CPU" if given.dry else device_name()
    if device == "CPU" and not given.dry:
        sys.exit("no GPU: --dry runs every piece on a CPU at tiny size")
    every = list(pieces(out, given.dry))
    if missing := run_all(every, out, device, 60 * given.minutes, given.only or [""]):
        sys.exit(f"not passed: {', '.join(missing)}; logs are in {out}")
    print(f"all pieces passed: {out / 'summary.md'}")


if __name__ == "__main__":
    main()
