"""What the panel costs: the time of a training step with its callbacks, beside that without.

Two Trainers take turns on the same data, a round of some optimiser steps each, so that a busy machine slows both; the
medians over all steps are compared. Validations are timed by themselves: how long the general chats and the samples
take beside the validation data.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.callbacks import AdapterStatistics, BadRows, BaseDrift, Samples, TensorBoardSamples, Throughput
from phi3_lightning.callbacks.monitor import GENERAL

ASSETS = GENERAL.parent


def timed(callback: pl.Callback, seconds: dict[tuple[str, bool], float]) -> pl.Callback:
    """Adds up what a callback's hooks take, in training and in validation."""
    name = type(callback).__name__
    for hook in (
        "on_train_batch_start", "on_train_batch_end", "on_before_optimizer_step", "on_before_zero_grad",
        "on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end",
    ):  # fmt: skip
        method = getattr(callback, hook)

        def wrapped(
            *args: Any, method: Any = method, key: tuple[str, bool] = (name, "validation" in hook), **kw: Any
        ) -> None:
            start = time.perf_counter()
            method(*args, **kw)
            seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - start

        setattr(callback, hook, wrapped)
    return callback


class Clock(pl.Callback):
    """Seconds of each optimiser step, and of the validation without the panel's part."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.validation = 0.0
        self._mark = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._mark = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(time.perf_counter() - self._mark)

    def on_validation_start(self, *_: Any) -> None:
        self._mark = time.perf_counter()

    def on_validation_epoch_end(self, *_: Any) -> None:
        self.validation += time.perf_counter() - self._mark


def run(args: argparse.Namespace, panel: bool, folder: Path) -> tuple[Clock, dict[tuple[str, bool], float]]:
    """Train ``args.steps`` steps and validate once."""
    pl.seed_everything(0, verbose=False)
    seconds: dict[tuple[str, bool], float] = {}
    options = {"tokenizer": args.base, "max_length": args.max_length, "num_workers": 0, "batch_size": args.batch_size}
    data = ChatDataModule(train=args.train, val=args.val, **options)
    clock = Clock()
    callbacks: list[pl.Callback] = [clock]
    if panel:
        general = ChatDataModule(val=str(GENERAL), truncation="truncate_end", **options)
        shown = [
            Throughput(args.max_length),
            BadRows(),
            AdapterStatistics(),
            BaseDrift(general),
            Samples(),
            TensorBoardSamples(),
        ]
        callbacks += [timed(callback, seconds) for callback in shown]
    trainer = pl.Trainer(
        max_steps=args.steps, val_check_interval=args.steps, precision="bf16-mixed", accelerator=args.accelerator,
        devices=1, logger=TensorBoardLogger(folder, name="", version=str(time.monotonic_ns())), log_every_n_steps=1,
        callbacks=callbacks, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(Phi3LoRAModule(args.base, gradient_checkpointing="none"), data)
    return clock, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(ASSETS / "tiny_phi3"), help="a folder or hub id")
    parser.add_argument("--train", default=str(ASSETS / "tiny_phi3/chats_train.jsonl"))
    parser.add_argument("--val", default=str(ASSETS / "tiny_phi3/chats_val.jsonl"))
    parser.add_argument(
        "--steps", type=int, default=25, help="optimiser steps of a round: one measurement of the adapter"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-panel"))
    args = parser.parse_args()

    steps: dict[bool, list[float]] = {False: [], True: []}
    hooks: dict[tuple[str, bool], float] = {}
    validation = 0.0
    for _ in range(args.rounds):
        for panel in (False, True):
            clock, seconds = run(args, panel, args.out)
            steps[panel] += clock.steps[1:]  # the first allocates
            for key, value in seconds.items():
                hooks[key] = hooks.get(key, 0.0) + value / args.rounds
            validation += 0.0 if panel else clock.validation / args.rounds
    step = statistics.median(steps[False])
    console = Console()
    console.print(
        f"{torch.get_num_threads()} threads; a step without the panel {step * 1e3:.1f} ms, "
        f"with it {statistics.median(steps[True]) * 1e3:.1f} ms; validation data {validation:.2f} s"
    )
    total = 0.0
    for (name, validating), value in sorted(hooks.items()):
        if validating:
            console.print(f"  {name}: {value:.3f} s a validation, {value / validation:.0%} of the validation data's")
        else:
            share = value / args.steps / step
            total += share
            console.print(f"  {name}: {value / args.steps * 1e3:.3f} ms a step, {share:.2%}")
    console.print(f"  in all: {total:.2%} of a step")


if __name__ == "__main__":
    main()
