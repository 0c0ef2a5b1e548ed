"""The verdict of a plan: fits, may not fit, does not fit, and the smallest change that helps."""

from dataclasses import fields

import pytest

from phi3_lightning.commands.plan import parser
from phi3_lightning.commands.plan_tables import FEW_STEPS, run_line, verdict
from phi3_lightning.planning.length import Length
from phi3_lightning.planning.memory import Memory
from phi3_lightning.planning.suggestions import Suggestion


def memory(gigabytes: float) -> Memory:
    """A peak of this size, all of it the base's."""
    return Memory(**{field.name: 0.0 for field in fields(Memory)} | {"base": gigabytes * 1e9})


SMALLER = [Suggestion("model.quantization: nf4", memory(4)), Suggestion("data.batch_size: 1", memory(10))]


@pytest.mark.parametrize(
    ("room", "line"),
    [
        (23.1, "fits: 12.8 of 23.1 GB"),
        (14.0, "may not fit: 12.8 of 14.0 GB; predictions are not exact; with data.batch_size: 1 it would"),
        (8.0, "does not fit: 12.8 of 8.0 GB; with model.quantization: nf4 it would"),
        (4.0, "does not fit: 12.8 of 4.0 GB; none of the changes is enough by itself"),
    ],
)
def test_the_verdict_names_the_smallest_change_that_helps(room, line):
    assert verdict(memory(12.8), room * 1e9, SMALLER) == line


@pytest.mark.parametrize(("steps", "few"), [(FEW_STEPS - 1, True), (FEW_STEPS, False)])
def test_a_run_of_few_steps_is_called_so(steps, few):
    for speed in (None, 10.0):
        assert ("optimiser steps (few; docs/choosing.md" in run_line(Length(steps, 1000), speed)) == few


@pytest.mark.parametrize("size", ["16GB", "7.5GB", "16"])
def test_a_size_to_plan_for_is_in_gigabytes(size):
    assert parser().parse_args([f"--memory={size}", "--model.base=x"]).memory == size


def test_another_unit_is_refused(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--memory=16GiB", "--model.base=x"])
    assert "memory" in capsys.readouterr().err
