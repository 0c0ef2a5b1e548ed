"""``check``: proofs on the user's own model, data, settings and device, before hours are spent on them."""

import sys
import tempfile
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from phi3_lightning.checks.overfit import OVERFIT_STEPS
from phi3_lightning.checks.overfit_diagnosis import (
    GOOD_ROWS_GOOD_SETTINGS,
    GOOD_ROWS_MY_SETTINGS,
    MY_ROWS_GOOD_SETTINGS,
    MY_ROWS_MY_SETTINGS,
)
from phi3_lightning.checks.result import Outcome, Result
from phi3_lightning.checks.shared_base import SharedBase
from phi3_lightning.checks.suite import Suite
from phi3_lightning.commands.parser import Parser, command_parser, prepare
from phi3_lightning.commands.quiet import quieten_trainers
from phi3_lightning.commands.single_device import single_device_trainer
from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.module import Phi3LoRAModule
from phi3_lightning.preferences import check_data
from phi3_lightning.progress import phase_progress

DESCRIPTION = "Prove on your own model, data, settings and device that training will do what it should."

STYLES: dict[Outcome, str] = {"ok": "green", "FAIL": "bold red", "skipped": "dim"}


def parser() -> Parser:
    """Return the parser of ``check``, which takes the configuration of ``fit`` as it is."""
    classes = {"model": Phi3LoRAModule, "data": ChatDataModule}
    keys = "accelerator, devices (the first of them), precision and gradient_clip_val"
    result = command_parser("check", DESCRIPTION, classes, {"trainer": keys})
    result.accept_rest_of_run()
    return result


def main(args: list[str]) -> None:
    """Run the command with the arguments after ``check``; exit with 1 where a check fails."""
    options = parser()
    config = options.parse_args(args)
    prepare(config)
    quieten_trainers()
    classes = options.instantiate_classes(config)
    clip = config.trainer.get("gradient_clip_val")
    with (
        tempfile.TemporaryDirectory(prefix="phi3-lightning-check-") as folder,
        phase_progress("checking", OVERFIT_STEPS) as (on_begin, on_step),
    ):
        on_begin("loading the base")
        classes.data.validate_sources()
        check_data(classes.model.objective, classes.data)
        shared_base = SharedBase(classes.model, partial(single_device_trainer, config.trainer, folder))
        suite = Suite(classes.data.options, shared_base, clip, Path(folder), on_begin, on_step)
        results = list(suite.run())
    _report(results)
    sys.exit(any(result.outcome == "FAIL" for result in results))


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
    """A sentence for a user whose loss does not fall."""
    failed = [name for name, outcome in outcomes.items() if outcome == "FAIL"]
    if not failed:
        return "All is sound: a loss that does not fall in the run itself needs more steps, or a longer warm-up."
    where = {
        GOOD_ROWS_GOOD_SETTINGS: "the base or this machine: not even good rows are learnt with good settings",
        MY_ROWS_GOOD_SETTINGS: "your data, or with a base too small for them: good rows are learnt with these settings",
        GOOD_ROWS_MY_SETTINGS: "your settings: good settings learn the same rows",
        MY_ROWS_MY_SETTINGS: "your data and your settings together: each is learnt with alone",
    }
    causes = [where[name] for name in failed if name in where]
    return f"The fault lies with {'; and with '.join(causes)}." if causes else f"Fix first: {', '.join(failed)}."
