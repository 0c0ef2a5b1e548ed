"""From measured steps to a table."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from contenders.ceiling import needed_flops
from contenders.clock import Step

COLUMNS = (
    "contender", "real tokens/s", "lowest to highest", "supervised tokens/s", "peak GB", "of bf16 peak", "padding",
    "tokens trained", "held-out loss",
)  # fmt: skip

Item = TypeVar("Item")


def alternating(contenders: Sequence[Item], repeats: int) -> Iterator[tuple[int, Item]]:
    """Yield each contender once before any comes again, so that a drift of the machine meets all alike."""
    for repeat in range(repeats):
        for contender in contenders:
            yield repeat, contender


@dataclass
class Measured:
    """What is known of a contender.

    Args:
        trains: Whose tokens are trained.
        steps: The timed steps of all its runs.
        peak_bytes: The most memory of each run.
        loss: On held-out rows after its last run; None if there is no adapter.
        error: Why it did not run.
    """

    trains: str = "assistant"
    steps: list[Step] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    loss: float | None = None
    error: str | None = None


def speeds(steps: Iterable[Step]) -> list[float]:
    """Return the real tokens a second of each step."""
    return [step.real / step.seconds for step in steps if step.seconds]


def cells(name: str, found: Measured, base: str, peak_flops: float) -> list[str]:
    """Return a row of the table: medians over the steps of all runs.

    Args:
        name: The contender.
        found: What was measured.
        base: Folder of the base model.
        peak_flops: Operations a second of the fastest matrix product.
    """
    if found.error is not None:
        return [name, f"did not run: {found.error}", *[""] * (len(COLUMNS) - 2)]
    real = speeds(found.steps)
    supervised = [step.supervised / step.seconds for step in found.steps if step.seconds]
    shares = [
        needed_flops(base, step.real, step.supervised) / step.seconds / peak_flops
        for step in found.steps if step.seconds
    ]  # fmt: skip
    padding = 1 - sum(step.real for step in found.steps) / sum(step.processed for step in found.steps)
    return [
        name, f"{statistics.median(real):,.0f}", f"{min(real):,.0f} to {max(real):,.0f}",
        f"{statistics.median(supervised):,.0f}", f"{statistics.median(found.peak_bytes) / 1e9:.2f}",
        f"{statistics.median(shares):.1%}", f"{padding:.0%}", found.trains,
        "" if found.loss is None else f"{found.loss:.4f}",
    ]  # fmt: skip


def markdown(rows: Iterable[Sequence[str]], columns: Sequence[str] = COLUMNS) -> str:
    """Return a Markdown table, figures to the right."""
    lines = [list(columns), ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
