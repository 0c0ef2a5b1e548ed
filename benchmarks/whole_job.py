"""The whole job: from the command to an adapter that others can load, beside TRL's script and LLaMA-Factory's command.

A job tokenises, loads, trains an epoch with two validations and sample answers, writes a checkpoint and exports the
adapter. Jobs take turns, each in processes of its own; seconds are by phase, imports included, and medians. Afterwards
one function judges all adapters on the validation chats. LLaMA-Factory's command answers no samples, TRL's defaults
train all tokens, and both pad where this package packs.
"""

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from contenders import ENVIRONMENT, chats, environments, machine, models
from contenders.job import Job
from contenders.phases import PHASES
from contenders.report import alternating, markdown
from contenders.servers import HERE, python_path
from contenders.task import write_rows
from training import ask

Seconds = dict[str, float]
JOBS: dict[str, tuple[str | None, str, tuple[str, ...]]] = {
    "phi3_lightning": (None, "job_ours", ("fit", "export")),
    "TRL's script": ("trl", "job_trl", ("fit",)),
    "LLaMA-Factory's command": ("llamafactory", "job_llamafactory", ("fit",)),
}
"""The peer's environment, its module, and its commands."""
COLUMNS = ("job", *PHASES, "all", "held-out loss")


def split(given: argparse.Namespace, base: Path, work: Path) -> tuple[Path, Path]:
    """Write the chats that train and those that validate."""
    source = given.chats
    if source is None:
        source = work / "chats.jsonl"
        chats.write_chats(source, given.rows + given.held_out, chats.tokenizer_of(str(base)))
    rows = [messages(json.loads(line)) for line in source.read_text(encoding="utf-8").splitlines()]
    if len(rows) < given.rows + given.held_out:
        sys.exit(f"{source}: {len(rows)} chats, {given.rows + given.held_out} are needed; lower --rows or --held-out")
    random.Random(0).shuffle(rows)
    parts = {"train": rows[: given.rows], "val": rows[given.rows : given.rows + given.held_out]}
    for name, part in parts.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in part))
    return work / "train.jsonl", work / "val.jsonl"


def messages(row: dict) -> list[dict[str, str]]:
    """Return the messages of a row, which has them or a prompt and a completion."""
    if "messages" in row:
        return row["messages"]
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def do(name: str, job: Job, python: Path, log: Path) -> Seconds:
    """Do a job; return its seconds by phase.

    Raises:
        RuntimeError: If a command fails, with the end of what it printed.
    """
    _, module, stages = JOBS[name]
    found: Seconds = {}
    env = ENVIRONMENT | {"PYTHONPATH": python_path(), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    env["HF_DATASETS_CACHE"] = f"{job.out}/datasets"  # nothing is tokenised before
    for stage in stages:
        report, start = Path(job.out) / f"{stage}.json", time.time()
        order = dataclasses.replace(job, report=str(report), stage=stage, started=start)
        command = [str(python), "-m", f"contenders.{module}", json.dumps(dataclasses.asdict(order))]
        with log.open("a") as file:
            status = subprocess.run(command, env=env, stdout=file, stderr=file, check=False).returncode
        took = time.time() - start
        if status != 0 or not report.is_file():
            raise RuntimeError(f"{stage} ended with status {status}: {log.read_text().strip().splitlines()[-1]}")
        seconds: Seconds = json.loads(report.read_text())
        last = "end" if stage == "fit" else stage
        seconds[last] = seconds.get(last, 0.0) + took - sum(seconds.values())
        for phase, value in seconds.items():
            found[phase] = found.get(phase, 0.0) + value
    return found


def cells(name: str, taken: list[Seconds], loss: float | None) -> list[str]:
    """Return a row of the table: the median seconds of each phase."""
    medians = {phase: statistics.median([seconds.get(phase, 0.0) for seconds in taken]) for phase in PHASES}
    whole = statistics.median([sum(seconds.values()) for seconds in taken])
    shown = [f"{value:.1f}" if value else "" for value in medians.values()]
    return [name, *shown, f"{whole:.1f}", "" if loss is None else f"{loss:.4f}"]


def compare(given: argparse.Namespace, work: Path) -> list[list[str]]:
    """Let the jobs take turns; return the rows of the table."""
    base = given.base or models.convert_real(environments.CACHE / "models" / "real")
    train, val = split(given, base, work)
    job = Job(
        base=str(base), train=str(train), val=str(val), out="", device=given.device, max_length=given.max_length,
        micro_batch=given.micro_batch, accumulate=given.accumulate, packed=given.packed, validations=2,
        samples=given.samples, sample_tokens=given.sample_tokens,
    )  # fmt: skip
    names = [name for name in JOBS if not given.only or any(word in name for word in given.only)]
    taken: dict[str, list[Seconds]] = {name: [] for name in names}
    errors: dict[str, str] = {}
    adapters: dict[str, str] = {}
    for turn, name in alternating(names, given.repeats):
        if name in errors:
            continue
        out = work / f"{names.index(name)}-{turn}"
        out.mkdir()
        environment = JOBS[name][0]
        try:
            python = Path(sys.executable)
            if environment is not None:
                python = environments.make(environment, given.peers, given.device == "cuda")
            taken[name].append(do(name, dataclasses.replace(job, out=str(out)), python, work / f"{name}.log"))
            adapters[name] = str(out / "adapter")
        except (RuntimeError, subprocess.CalledProcessError) as error:
            errors[name] = str(error)
        said = errors.get(name) or ", ".join(f"{phase} {value:.1f} s" for phase, value in taken[name][-1].items())
        print(f"{turn + 1} of {given.repeats}, {name}: {said}", file=sys.stderr, flush=True)
    losses: dict[str, float | None] = {}
    if adapters:
        write_rows(work / "held_out.jsonl", chats.encode(str(val), str(base), given.max_length, work / "cache"))
        order = {"base": str(base), "rows": str(work / "held_out.jsonl"), "adapters": adapters, "device": given.device}
        losses = ask("heldout", json.dumps(order))
    rows = [cells(name, seconds, losses.get(name)) for name, seconds in taken.items() if seconds]
    rows += [[name, f"did not run: {error}", *[""] * (len(COLUMNS) - 2)] for name, error in errors.items()]
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of the model; else the real one is converted")
    parser.add_argument("--chats", type=Path, help="JSON lines with messages, or prompt and completion; else generated")
    parser.add_argument("--rows", type=int, default=1000, help="chats that train")
    parser.add_argument("--held-out", type=int, default=100, help="chats that validate")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="jobs whose names hold one of these")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=4, help="chats of a padded micro-batch")
    parser.add_argument("--accumulate", type=int, default=4, help="padded micro-batches of an optimiser step")
    parser.add_argument("--packed", type=int, default=2, help="packed rows of an optimiser step of this package")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--sample-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1, help="turns of each job")
    parser.add_argument("--peers", type=Path, default=environments.FOLDER, help="where peers' environments are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "whole_job.md", help="the Markdown file")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    facts = machine.provenance()
    with tempfile.TemporaryDirectory() as work:
        rows = compare(given, Path(work))
    table = Table(*COLUMNS, title=f"Seconds of a whole job of {given.rows:,} chats")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=150).print(table)
    facts["job"] = (
        f"{given.rows:,} chats, one epoch, two validations of {given.held_out} chats, {given.samples} samples"
    )
    lines = "".join(f"- {key}: {value}\n" for key, value in facts.items())
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(
        "# The whole job beside peers\n\nSeconds by phase, medians; written by `benchmarks/whole_job.py`.\n\n"
        f"{lines}\n{markdown(rows, COLUMNS)}"
    )
    print(f"written to {given.output}")


if __name__ == "__main__":
    main()
