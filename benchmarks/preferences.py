"""Preference tuning by DPO: speed and memory of this package beside TRL's DPOTrainer, alternating in one run.

All train the same pairs with the same LoRA (rank 16 on the four projections) and the same AdamW, in bfloat16, four
pairs a step, with the base as the reference; ours in a packed row, TRL's in a padded micro-batch. Each run is a process
of its own that takes a few optimiser steps; importing, loading, the first step and TRL's pass that computes the
reference beforehand are not timed. We compute the reference in the first epoch, and later epochs have a row of their
own; a run of three epochs, TRL's default, is calculated from both. Set A has prompts of about 100 tokens and answers of
150, set B prompts of 600 and answers of 100.
"""

import argparse
import dataclasses
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from contenders import chats, environments, machine, models
from contenders.catalogue import Contender
from contenders.clock import Step
from contenders.report import Measured, alternating, markdown
from contenders.servers import HERE, Servers
from contenders.task import Task

PAIRS = 4
"""Pairs of a step."""
VARIATION = 0.06
"""How much lengths vary: so little that a packed row always holds ``PAIRS`` pairs and never one more."""

COLUMNS = ("contender", "pairs/s", "lowest to highest", "times TRL's defaults", "times TRL's best", "peak GB")
OBJECTIVE = {"objective": {"name": "dpo", "beta": 0.1}}
DEFAULTS = "TRL, defaults"
FIRST, LATER = "phi3_lightning, first epoch", "phi3_lightning, later epochs"
EPOCHS = 3
"""Of a run, as TRL's ``DPOConfig`` has it by default."""


class Set(NamedTuple):
    """Tokens of a prompt and of each answer."""

    prompt: int
    answer: int

    @property
    def row_tokens(self) -> int:
        """Tokens of a packed row, with room for half a pair beside ``PAIRS`` of them."""
        return int((PAIRS + 0.5) * 2 * (self.prompt + self.answer))


SETS = {"A": Set(100, 150), "B": Set(600, 100)}


def contenders(row_tokens: int, rows_of_a_step: Path) -> list[Contender]:
    """Return who runs, and with which settings; an epoch of the pairs of one step has one step."""
    data = {"format": "preference", "max_length": row_tokens // 2}  # of each answer of a pair
    plain = {"model": OBJECTIVE | {"gradient_checkpointing": "none"}, "data": data}
    later = plain | {"data": data | {"train": str(rows_of_a_step)}}
    return [
        Contender(FIRST, "ours", None, plain),
        Contender(LATER, "ours", None, later),
        Contender("phi3_lightning, first epoch, each prompt twice", "ours", None, plain | {"share_prompts": False}),
        Contender(DEFAULTS, "trl_dpo", "trl"),
        Contender("TRL, no checkpointing", "trl_dpo", "trl", {"gradient_checkpointing": False}),
        Contender("TRL, padding-free, no checkpointing", "trl_dpo", "trl", {
            "gradient_checkpointing": False, "padding_free": True,
        }),
        Contender("TRL, reference beforehand, no checkpointing", "trl_dpo", "trl", {
            "gradient_checkpointing": False, "precompute_ref_log_probs": True,
        }),
    ]  # fmt: skip


def write_pairs(path: Path, count: int, lengths: Set, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> None:
    """Write pairs of common words, whose lengths in tokens vary by ``VARIATION``."""
    rng = random.Random(seed)

    def say(tokens: int) -> str:
        target = tokens * rng.uniform(1 - VARIATION, 1 + VARIATION) - 5  # role and end
        ids = tokenizer(" ".join(rng.choices(chats.WORDS, k=tokens)), add_special_tokens=False).input_ids
        return tokenizer.decode(ids[: round(target)]).strip()

    with path.open("w") as file:
        for _ in range(count):
            row = {"prompt": [{"role": "user", "content": say(lengths.prompt)}]}
            row |= {side: [{"role": "assistant", "content": say(lengths.answer)}] for side in ("chosen", "rejected")}
            file.write(json.dumps(row) + "\n")


def measure(name: str, base: Path, given: argparse.Namespace, servers: Servers, work: Path) -> dict[str, Measured]:
    """Run all contenders in turn on a set, as often as asked."""
    lengths = SETS[name]
    for file, steps in (("rows.jsonl", given.steps), ("rows_of_a_step.jsonl", 1)):
        write_pairs(work / file, PAIRS * steps, lengths, chats.tokenizer_of(str(base)))
    task = Task(
        base=str(base), rows=str(work / "rows.jsonl"), pad=-1, row_tokens=lengths.row_tokens, micro_batch=PAIRS,
        accumulate=1, steps=given.steps, warmup=given.warmup, device=given.device, out=str(work), dropout=0.0, lr=5e-6,
    )  # fmt: skip
    chosen = contenders(lengths.row_tokens, work / "rows_of_a_step.jsonl")
    if given.only:
        chosen = [contender for contender in chosen if any(word in contender.name for word in given.only)]
    console = Console(stderr=True)
    measured = {contender.name: Measured() for contender in chosen}
    for repeat, contender in alternating(chosen, given.repeats):
        result = measured[contender.name]
        if result.error is not None:
            continue
        out = work / f"{chosen.index(contender)}-{repeat}"
        out.mkdir()
        answer = servers.order(contender, dataclasses.replace(task, out=str(out)))
        result.error = answer.get("error")
        if result.error is None:
            steps = [Step(**step) for step in answer["steps"]]
            result.steps += steps
            result.peak_bytes.append(answer["peak_bytes"])
        shown = result.error or ", ".join(f"{step.seconds:.1f} s" for step in steps)
        line = f"{repeat + 1} of {given.repeats}, set {name}, {contender.name}: {shown}"
        console.print(line, highlight=False, markup=False)
    return measured


def speeds(measured: Measured) -> list[float]:
    """Return the pairs a second of each timed step."""
    return [PAIRS / step.seconds for step in measured.steps if step.seconds]


def cells(name: str, measured: Measured, peers: tuple[float, ...]) -> list[str]:
    """Return a row of the table: medians over the steps of all runs; ``peers`` are TRL's pairs a second."""
    if measured.error is not None:
        return [name, f"did not run: {measured.error}", *[""] * (len(COLUMNS) - 2)]
    own = speeds(measured)
    median = statistics.median(own)
    ratios = [f"{median / peer:.2f}" for peer in peers] or ["", ""]
    memory = f"{statistics.median(measured.peak_bytes) / 1e9:.2f}"
    return [name, f"{median:.3f}", f"{min(own):.3f} to {max(own):.3f}", *ratios, memory]


def compare(name: str, base: Path, given: argparse.Namespace, servers: Servers, work: Path) -> str:
    """Measure all contenders on a set; print a table and return it in Markdown."""
    results = measure(name, base, given, servers, work)
    trl = {name: statistics.median(speeds(measured)) for name, measured in results.items()
           if name.startswith("TRL") and measured.error is None}  # fmt: skip
    peers = (trl[DEFAULTS], max(trl.values())) if DEFAULTS in trl else ()
    rows = [cells(contender, measured, peers) for contender, measured in results.items()]
    if results.keys() >= {FIRST, LATER} and results[FIRST].error is None and results[LATER].error is None:
        first, later = (statistics.median(speeds(results[contender])) for contender in (FIRST, LATER))
        whole = EPOCHS / (1 / first + (EPOCHS - 1) / later)
        ratios = [f"{whole / peer:.2f}" for peer in peers] or ["", ""]
        rows.insert(2, [f"phi3_lightning, a run of {EPOCHS} epochs", f"{whole:.3f}", "calculated", *ratios, ""])
    title = f"Set {name}: prompts of about {SETS[name].prompt} tokens, answers of {SETS[name].answer}"
    table = Table(*COLUMNS, title=title)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=150).print(table)
    return f"## {title}\n\n{markdown(rows, COLUMNS)}"


def write(path: Path, facts: dict[str, str], sections: list[str], servers: Servers, given: argparse.Namespace) -> None:
    facts = facts | {
        "threads": str(torch.get_num_threads()),
        "a run": f"{given.steps} optimiser steps of {PAIRS} pairs, {given.warmup} not timed",
        "runs of each contender": str(given.repeats),
    }
    for environment, python in servers.pythons.items():
        releases = ", ".join(f"{name} {version}" for name, version in environments.versions(python).items())
        facts[f"environment {environment or 'phi3_lightning'}"] = releases
    title = "# Preference tuning beside TRL"
    source = "Written by `benchmarks/preferences.py`, with a real model of 134.5 M parameters."
    lines = "".join(f"- {key}: {value}\n" for key, value in facts.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{title}\n\n{source}\n\n{lines}\n" + "\n".join(sections))
    print(f"written to {path}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, help="lengths of prompts and answers")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders whose names hold one of these")
    parser.add_argument("--real", type=Path, help="folder of the real model; else it is converted")
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps of a run")
    parser.add_argument("--warmup", type=int, default=1, help="the first of them, which are not timed")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each contender, in turns")
    parser.add_argument("--peers", type=Path, default=environments.FOLDER, help="where peers' environments are kept")
    parser.add_argument("--cache", type=Path, default=environments.CACHE / "models", help="where base models are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "preferences.md", help="the Markdown file")
    given = parser.parse_args()
    if not 1 <= given.warmup < given.steps:
        parser.error(f"--warmup {given.warmup}: at least 1, and less than --steps {given.steps}")
    return given


def main() -> None:
    given = arguments()
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"the machine is not idle (load {load:.1f}): these figures say little", file=sys.stderr)
    facts = machine.provenance()
    base = given.real or models.convert_real(given.cache / "real")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        servers = Servers(given.peers, given.device == "cuda", work)
        sections = []
        try:
            for name in given.sets:
                (work / name).mkdir()
                sections.append(compare(name, base, given, servers, work / name))
        finally:
            servers.close()
        write(given.output, facts, sections, servers, given)


if __name__ == "__main__":
    main()
