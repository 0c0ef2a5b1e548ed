"""Training speed, memory and loss: this package beside its peers, alternating in one run.

All train the same rows (ready tokens: chats of 110 tokens in the median, or yours with --chats) with the same LoRA
(rank 16 on the four projections) and the same AdamW, in bfloat16; a step reads one packed row, or as many padded rows
as fill one. Each run is a process of its own that takes a few optimiser steps; importing, loading and the first step
are not timed. Afterwards one function judges all adapters on held-out rows. docs/performance.md says more.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from contenders import chats, environments, machine, models
from contenders.catalogue import CONTENDERS, Contender
from contenders.clock import Step
from contenders.report import COLUMNS, Measured, alternating, cells, markdown
from contenders.servers import HERE, Servers, python_path
from contenders.task import Task, read_rows, write_rows

WORKLOADS = {"real": "a real model of 134.5 M parameters", "random": "Phi-3-mini's shapes", "full": "Phi-3-mini"}
LONGEST, HELD_OUT = 512, 32
"""Tokens of a chat at most; rows that judge the adapters."""


def ask(module: str, argument: str) -> Any:
    """Return what a module of the contenders prints, in a process of its own."""
    command = [sys.executable, "-m", f"contenders.{module}", argument]
    env = os.environ | {"PYTHONPATH": python_path(), "PYTHONWARNINGS": "ignore"}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout)


def base_of(workload: str, given: argparse.Namespace) -> Path:
    if workload == "real":
        return given.real or models.convert_real(given.cache / "real")
    if workload == "random":
        return models.write_random(given.cache / f"random-{given.layers}", given.layers)
    if given.device != "cuda" and not given.full:
        raise RuntimeError("the full size is measured on a GPU, and there is none")
    return given.full or models.write_random(given.cache / "random-32", 32)


def prepare(base: Path, given: argparse.Namespace, work: Path) -> tuple[Task, dict[str, str]]:
    """Write the rows of a workload; return the task, and what to say about it."""
    tokenizer = chats.tokenizer_of(str(base))
    file = given.chats
    if file is None:
        file = work / "chats.jsonl"
        chats.write_chats(file, 2_000, tokenizer)
    rows = chats.encode(str(file), str(base), min(LONGEST, given.row_tokens), work / "cache")
    lengths = sorted(len(row.input_ids) for row in rows)
    mean = sum(lengths) / len(lengths)
    accumulate = max(1, round(0.9 * given.row_tokens / mean / given.micro_batch))
    steps = 1 if given.same_rows else given.steps
    chosen, held_out = chats.choose(rows, steps, given.micro_batch * accumulate, given.row_tokens, HELD_OUT)
    write_rows(work / "rows.jsonl", chosen)
    write_rows(work / "held_out.jsonl", held_out)
    task = Task(
        base=str(base), rows=str(work / "rows.jsonl"), pad=tokenizer.pad_token_id, row_tokens=given.row_tokens,
        micro_batch=given.micro_batch, accumulate=accumulate, steps=given.steps, warmup=given.warmup,
        device=given.device, out=str(work),
    )  # fmt: skip
    tokens = sum(len(row.input_ids) for row in chosen)
    median, tenth = lengths[len(lengths) // 2], lengths[len(lengths) * 9 // 10]
    over = "each" if given.same_rows else "in all"
    said = {
        "rows": f"{file.name}: {median} tokens in the median, {tenth} at the ninth decile, {lengths[-1]} at most",
        "a run": f"{given.steps} optimiser steps, {given.warmup} not timed; {over} over "
        f"{len(chosen)} rows, {tokens:,} tokens",
        "a step": f"a packed row of {given.row_tokens} tokens, or {accumulate} x {given.micro_batch} padded rows",
        "adapter": f"LoRA r {task.r}, alpha {task.alpha}, dropout {task.dropout}; AdamW, lr {task.lr:g}, constant",
    }
    return task, said


def measure(
    contenders: list[Contender], task: Task, given: argparse.Namespace, servers: Servers
) -> dict[str, Measured]:
    """Run all contenders in turn, as often as asked."""
    console = Console(stderr=True)
    found = {contender.name: Measured(contender.trains) for contender in contenders}
    adapters: dict[str, str] = {}
    for repeat, contender in alternating(contenders, given.repeats):
        measured = found[contender.name]
        if measured.error is not None:
            continue
        out = Path(task.out) / f"{contenders.index(contender)}-{repeat}"
        out.mkdir()
        result = servers.order(contender, dataclasses.replace(task, out=str(out)))
        measured.error = result.get("error")
        if measured.error is None:
            steps = [Step(**step) for step in result["steps"]]
            measured.steps += steps
            measured.peak_bytes.append(result["peak_bytes"])
            adapters[contender.name] = str(out)
            said = ", ".join(f"{step.real} tokens in {step.seconds:.1f} s" for step in steps)
        console.print(
            f"{repeat + 1} of {given.repeats}, {contender.name}: {measured.error or said}",
            highlight=False,
            markup=False,
        )
    if adapters:
        order = {"base": task.base, "rows": str(Path(task.out) / "held_out.jsonl"), "adapters": adapters}
        losses = ask("heldout", json.dumps(order | {"device": task.device}))
        for name in adapters:
            found[name].loss = losses[name]
        found["base model"] = Measured(loss=losses.get(""))
    return found


def compare(workload: str, given: argparse.Namespace, servers: Servers, work: Path) -> str:
    """Measure all contenders on a model; print a table and return it in Markdown."""
    title = WORKLOADS[workload] + (f", {given.layers} of 32 layers" if workload == "random" else "")
    try:
        base = base_of(workload, given)
    except RuntimeError as error:
        print(f"{title}: not measured: {error}")
        return f"## {title}\n\nNot measured: {error}.\n"
    chosen = [contender for contender in CONTENDERS if not contender.gpu_only or given.device == "cuda"]
    if given.only:
        chosen = [contender for contender in chosen if any(word in contender.name for word in given.only)]
    task, said = prepare(base, given, work)
    before = ask("ceiling", given.device)
    found = measure(chosen, task, given, servers)
    reference = found.pop("base model", Measured())
    peaks = (before, ask("ceiling", given.device))
    said["bf16 peak"] = f"{max(peaks) / 1e12:.2f} TFLOP/s, the fastest matrix product before and after the run"
    if reference.loss is not None:
        said["held-out loss"] = (
            f"{reference.loss:.4f} before training, on {len(read_rows(work / 'held_out.jsonl'))} rows"
        )
    rows = [cells(name, each, task.base, max(peaks)) for name, each in found.items()]
    table = Table(*COLUMNS, title=title)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=170).print(table)
    return f"## {title}\n\n" + "".join(f"- {key}: {text}\n" for key, text in said.items()) + f"\n{markdown(rows)}"


def write(path: Path, facts: dict[str, str], sections: list[str], servers: Servers, given: argparse.Namespace) -> None:
    facts = facts | {"threads": str(torch.get_num_threads()), "repeats": str(given.repeats)}
    used = {name or "phi3_lightning, transformers + peft": python for name, python in servers.pythons.items()}
    releases = {
        name: ", ".join(f"{key} {value}" for key, value in environments.versions(python).items())
        for name, python in used.items()
    }
    head = (
        "# Training beside peers\n\nWritten by `benchmarks/training.py`; docs/performance.md says what is measured.\n\n"
    )
    lines = [f"- {key}: {value}\n" for key, value in facts.items()]
    lines += [f"- environment {name}: {text}\n" for name, text in releases.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + "".join(lines) + "\n" + "\n".join(sections))
    print(f"written to {path}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(WORKLOADS), choices=WORKLOADS, help="what is trained")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders whose names hold one of these")
    parser.add_argument("--real", type=Path, help="folder of the real model; else it is converted")
    parser.add_argument("--full", type=Path, help="folder of a full Phi-3-mini; else random weights")
    parser.add_argument("--layers", type=int, default=3, help="layers of the model of Phi-3-mini's shapes")
    parser.add_argument("--chats", type=Path, help="file of chats, in any format; else generated ones")
    parser.add_argument("--row-tokens", type=int, default=1024, help="length of a packed row; one is a step")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows of a padded micro-batch")
    parser.add_argument("--steps", type=int, default=3, help="optimiser steps of a run")
    parser.add_argument("--warmup", type=int, default=1, help="the first of them, which are not timed")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contender")
    parser.add_argument("--same-rows", action="store_true", help="the same rows in every step: order cannot matter")
    parser.add_argument("--quick", action="store_true", help="tiny: rows of 512 tokens, two steps, one run, one layer")
    parser.add_argument("--peers", type=Path, default=environments.FOLDER, help="where peers' environments are kept")
    parser.add_argument("--cache", type=Path, default=environments.CACHE / "models", help="where base models are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "training.md", help="the Markdown file")
    given = parser.parse_args()
    if given.quick:
        given.row_tokens, given.steps, given.repeats, given.layers = 512, 2, 1, 1
    if not 1 <= given.warmup < given.steps:
        parser.error(f"--warmup {given.warmup}: at least 1, and less than --steps {given.steps}")
    return given


def main() -> None:
    given = arguments()
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"the machine is not idle (load {load:.1f}): these figures say little", file=sys.stderr)
    facts = machine.provenance()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        servers = Servers(given.peers, given.device == "cuda", work)
        sections = []
        try:
            for workload in given.models:
                (work / workload).mkdir()
                sections.append(compare(workload, given, servers, work / workload))
        finally:
            servers.close()
        write(given.output, facts, sections, servers, given)


if __name__ == "__main__":
    main()
