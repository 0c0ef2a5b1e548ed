"""How long a run takes to its first step: begun at row 0, and gone on at row 1,000,000 of the same data.

Each run is a call of the command line on the embedded model, over ready-made tokens that are in the cache by then, with
one row a batch. The far checkpoint is the near one with its position moved; a step at position 1,000,000 shows that the
run was there. The two take turns, and medians are compared.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import phi3_lightning
from phi3_lightning.checkpoint.io import read_checkpoint

ROOT = Path(__file__).parents[1]
TINY = Path(phi3_lightning.__file__).parent / "assets" / "tiny_phi3"


def write_rows(path: Path, rows: int) -> None:
    """Write short rows of ready-made tokens, no two of them alike."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            ids = [5 + number // 900**place % 900 for place in range(4)]
            file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")


def fit(folder: Path, run: str, steps: int) -> float:
    """Train up to a number of optimiser steps, and return the seconds from the command to its end."""
    start = time.perf_counter()
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "cli.py"), "fit", f"--model.base={TINY}", "--model.gradient_checkpointing=none",
            f"--data.train={folder}/rows.jsonl", "--data.val_fraction=0", "--data.format=tokens",
            "--data.max_length=16", "--data.packing=false", "--data.batch_size=1", "--data.num_workers=0",
            f"--data.cache_dir={folder}/cache", "--trainer.accelerator=cpu", "--trainer.devices=1",
            f"--trainer.default_root_dir={folder}", "--trainer.max_epochs=1", f"--trainer.max_steps={steps}",
            "--checkpoint.monitor=null", "--monitor.base_drift=false", "--monitor.samples=0", f"--run={run}",
        ],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)
    return time.perf_counter() - start


def move(checkpoint: dict[str, Any], rows: int) -> dict[str, Any]:
    """Return a checkpoint after one step as it would be after ``rows`` of them."""
    loops = checkpoint["loops"]["fit_loop"]
    for scope in loops["epoch_loop.batch_progress"]["total"], loops["epoch_loop.batch_progress"]["current"]:
        scope.update(dict.fromkeys(scope, rows))
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = rows
    for scope in loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"].values():
        scope.update(dict.fromkeys(scope, rows))
    return checkpoint | {"global_step": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="the row at which the far run goes on")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", args.rows + 10)
        prepared = fit(folder, "near", steps=1)
        near = folder / "runs" / "near" / "checkpoints" / "last.ckpt"
        seconds: dict[str, list[float]] = {"new": [], "near": [], "far": []}
        for turn in range(args.repeats):
            seconds["new"].append(fit(folder, f"new-{turn}", steps=1))
            for kind, row in (("near", 1), ("far", args.rows)):
                last = folder / "runs" / f"{kind}-{turn}" / "checkpoints" / "last.ckpt"
                last.parent.mkdir(parents=True)
                torch.save(move(read_checkpoint(near), row), last)
                seconds[kind].append(fit(folder, f"{kind}-{turn}", steps=row + 1))
                reached = read_checkpoint(last)
                progress = reached["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
                assert (reached["global_step"], progress["ready"]) == (row + 1, row + 1), progress
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    console = Console()
    console.print(f"{args.rows + 10:,} rows tokenised and one step: {prepared:.1f} s")
    console.print(
        f"one step from the command to its end, the data in the cache: a new run {medians['new']:.1f} s, "
        f"gone on at row 1 {medians['near']:.1f} s, at row {args.rows:,} {medians['far']:.1f} s"
    )


if __name__ == "__main__":
    main()
