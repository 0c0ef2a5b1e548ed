"""The tables of a plan."""

import math

from rich.table import Table

from phi3_lightning.commands.measure import Measurement
from phi3_lightning.commands.planned_answers import PlannedAnswers
from phi3_lightning.planning.auto import PLANNED_SHARE_OF_MEMORY
from phi3_lightning.planning.length import Length
from phi3_lightning.planning.memory import Memory
from phi3_lightning.planning.step import BatchShape
from phi3_lightning.planning.suggestions import Suggestion


def memory_table(memory: Memory, where: str) -> Table:
    """Return the predicted peak by part; ``where`` names the device."""
    table = Table(title=f"peak memory of {where}, predicted", show_footer=True)
    table.add_column("part", footer="at the peak")
    table.add_column("GB", justify="right", footer=f"{memory.total / 1e9:.2f}")
    rows = {
        "base weights": memory.base,
        "adapter, its gradients": memory.adapter,
        "optimiser state": memory.optimizer,
        "activations kept for the backward pass": memory.stored,
        "head: logits and their gradients": memory.head,
        "a layer's pass": memory.layer,
        **({"a pass without a gradient": memory.reference} if memory.reference else {}),
        "process and libraries": memory.process,
        "what the allocator cannot use": memory.fragmentation,
    }
    working = ("head: logits and their gradients", "a layer's pass", "a pass without a gradient")
    at_peak = max(working, key=lambda name: rows.get(name, 0))
    for name, size in rows.items():
        number = f"{size / 1e9:.2f}"
        table.add_row(name, f"({number})" if name in working and name != at_peak else number)
    table.caption = "in parentheses: needed at another moment, and less of it"
    return table


def suggestion_table(suggestions: list[Suggestion], memory: Memory) -> Table:
    """Return the changes, each with its peak and how much less that is."""
    table = Table(title="what would help, each by itself")
    table.add_column("change")
    table.add_column("GB", justify="right")
    table.add_column("less", justify="right")
    for suggestion in suggestions:
        total = suggestion.memory.total
        table.add_row(suggestion.change, f"{total / 1e9:.2f}", f"{1 - total / memory.total:.0%}")
    return table


def measured_table(
    memory: Memory, measurement: Measurement, shape: BatchShape, seconds: float | None, *, on_gpu: bool
) -> Table:
    """Return the prediction beside three real steps.

    Args:
        seconds: The predicted time of the micro-batch; None: unknown.
        on_gpu: Whether torch counted the memory, which leaves out the driver's.
    """
    table = Table(title="predicted and measured")
    for column in ("", "predicted", "measured", "off by"):
        table.add_column(column, justify="right" if column else "left")
    predicted = memory.total - (memory.process if on_gpu else 0)
    off = f"{predicted / measurement.peak - 1:+.1%}"
    table.add_row("peak memory, GB", f"{predicted / 1e9:.2f}", f"{measurement.peak / 1e9:.2f}", off)
    if seconds is not None:
        off = f"{measurement.seconds / seconds - 1:+.1%}"
        table.add_row("tokens/s", *(f"{shape.tokens / time:,.0f}" for time in (seconds, measurement.seconds)), off)
    return table


def answers_line(answers: PlannedAnswers) -> str:
    """Return one line about the answers of a validation."""
    every = "each validation" if answers.every == 1 else f"one validation in {answers.every}"
    return (
        f"answers: {answers.rows:,} rows in {every}, at most {_time(answers.seconds)} "
        f"(model.generation.max_new_tokens {answers.new_tokens}, evaluation.val_rows)"
    )


def verdict(memory: Memory, room: float, suggestions: list[Suggestion]) -> str:
    """Return whether a run fits into the memory of its device, and the smallest change with which it does.

    Args:
        memory: The predicted peak.
        room: Bytes of the device.
        suggestions: Changes, the most helpful first.
    """
    figures = f"{memory.total / 1e9:.1f} of {room / 1e9:.1f} GB"
    limit = PLANNED_SHARE_OF_MEMORY * room
    if memory.total <= limit:
        return f"fits: {figures}"
    line = f"does not fit: {figures}" if memory.total > room else f"may not fit: {figures}; predictions are not exact"
    smaller = [suggestion for suggestion in suggestions if suggestion.memory.total <= limit]
    if smaller:
        return f"{line}; with {smaller[-1].change} it would"
    return f"{line}; none of the changes is enough by itself"


FEW_STEPS = 100
"""Optimiser steps below which a plan says that they are few."""


def run_line(length: Length, tokens_per_second: float | None, answers: PlannedAnswers | None = None) -> str:
    """Return one line about the whole run; ``tokens_per_second`` is of all devices, None: unknown."""
    if math.isinf(length.steps):
        return "whole run: without an end; set trainer.max_epochs or trainer.max_steps"
    few = " (few; docs/choosing.md, Batch, says how to get more)" if length.steps < FEW_STEPS else ""
    line = f"whole run: {length.steps:,.0f} optimiser steps{few} over {length.tokens:,.0f} tokens"
    if tokens_per_second is None:
        return line
    seconds = length.tokens / tokens_per_second
    if answers is None:
        return f"{line}, {_time(seconds)} without validation and saving"
    times = answers.times(length.validations)
    total, counts = _time(seconds + times * answers.seconds), f"{times:,.0f} of {length.validations:,.0f}"
    return f"{line}, {total} with answers in {counts} validations, without the rest of validation and saving"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.{0 if seconds >= 10 else 1}f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
