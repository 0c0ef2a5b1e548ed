"""``check``: proofs on the user's own model, data, settings and device, before hours are spent on them."""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from phi3_lightning.checks.overfit import STEPS
from phi3_lightning.checks.overfit_diagnosis import GOOD_GOOD, GOOD_MINE, MINE_GOOD, MINE_MINE
from phi3_lightning.checks.result import Outcome, Result
from phi3_lightning.checks.shared_base import SharedBase
from phi3_lightning.checks.suite import Suite
from phi3_lightning.commands.parser import Parser, RunConfig
from phi3_lightning.commands.single_device import quieten, single_device_trainer
from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.module import Phi3LoRAModule

DESCRIPTION = "Prove on your own model, data, settings and device that training will do what it should."

STYLES: dict[Outcome, str] = {"ok": "green", "FAIL": "bold red", "skipped": "dim"}


def parser() -> Parser:
    """Return the parser of ``check``, which takes the configuration of ``fit`` as it is."""
    result = Parser(prog="cli.py check", description=DESCRIPTION)
    result.add_argument("-c", "--config", action=RunConfig, help="Configuration of a run.")
    result.add_lightning_class_args(Phi3LoRAModule, "model")
    result.add_lightning_class_args(ChatDataModule, "data")
    result.add_argument(
        "--trainer", type=dict[str, Any], default={},
        help="accelerator, devices (the first of them), precision and gradient_clip_val count.",
    )  # fmt: skip
    result.add_argument("--seed_everything", type=int | bool, default=42, help="Of adapters and dropout.")
    result.accept_rest_of_run()
    return result


def main(args: list[str]) -> None:
    """Run the command; exits with 1 where a check fails.

    Args:
        args: The arguments after ``check``.

    Raises:
        ConfigError: If options cannot be used.
        DataError: If the data cannot be read.
        ModelError: If the base cannot be loaded, or cannot carry the adapter.
    """
    options = parser()
    config = options.parse_args(args)
    if config.data.tokenizer is None:
        config.data.tokenizer, config.data.revision = config.model.base, config.model.revision
    seed_everything(None if config.seed_everything is True else config.seed_everything, verbose=False)
    quieten()
    made = options.instantiate_classes(config)
    clip = config.trainer.get("gradient_clip_val")
    with tempfile.TemporaryDirectory(prefix="phi3-lightning-check-") as folder, _progress() as (on_begin, on_step):
        on_begin("loading the base")
        made.data.validate_sources()
        bench = SharedBase(made.model, partial(single_device_trainer, config.trainer, folder))
        suite = Suite(made.data.options, bench, clip, Path(folder), on_begin, on_step)
        results = list(suite.run())
    _report(results)
    sys.exit(any(result.outcome == "FAIL" for result in results))


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """Yield two functions that show what is being done, and a step of it; without a terminal, one line for each."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=STEPS)

        def begin(name: str) -> None:
            progress.reset(task, description=name)
            if progress.disable:
                print(f"checking: {name}", file=sys.stderr, flush=True)

        yield begin, lambda: progress.advance(task)


def _report(results: list[Result]) -> None:
    console = Console()
    if console.is_terminal:
        table = Table(title="check", show_lines=True)
        for column, ratio in (("check", 3), ("", 1), ("figure", 5), ("what to do", 5)):
            table.add_column(column, ratio=ratio)
        for result in results:
            remedy = result.remedy if result.outcome == "FAIL" else ""
            outcome = Text(result.outcome, STYLES[result.outcome])
            table.add_row(result.name, outcome, Text(result.figure), Text(remedy))
        console.print(table)
    else:
        for result in results:
            print(f"{result.outcome:<8}{result.name}: {result.figure}")
            if result.outcome == "FAIL":
                print(f"        what to do: {result.remedy}")
    console.print(_verdict({result.name: result.outcome for result in results}), highlight=False, soft_wrap=True)


def _verdict(outcomes: dict[str, Outcome]) -> str:
    """One sentence for somebody whose loss does not fall."""
    failed = [name for name, outcome in outcomes.items() if outcome == "FAIL"]
    if not failed:
        return "All is sound: a loss that does not fall in the run itself needs more steps, or a longer warm-up."
    where = {
        GOOD_GOOD: "the base or this machine: not even good rows are learnt with good settings",
        MINE_GOOD: "your data, or with a base too small for them: good rows are learnt with the same settings",
        GOOD_MINE: "your settings: good settings learn the same rows",
        MINE_MINE: "your data and your settings together: each is learnt with alone",
    }
    blamed = [where[name] for name in failed if name in where]
    return f"The fault lies with {'; and with '.join(blamed)}." if blamed else f"Mend first: {', '.join(failed)}."
