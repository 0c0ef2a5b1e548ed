"""Progress of long work: a bar on a terminal, and elsewhere a plain line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

LINE_INTERVAL_SECONDS = 10.0
"""Minimum time between two lines."""


JUPYTER_COLUMNS = 100
"""Width of tables in a notebook, where rich assumes more than the output of a cell shows."""


def table_console() -> Console:
    """Return a console whose tables fit into a terminal, or into the output of a notebook's cell."""
    console = Console()
    if console.is_jupyter:
        console.width = JUPYTER_COLUMNS
    return console


class LineCounter:
    """Counts units of work and logs a line at most every ten seconds, and one when all are done.

    Args:
        name: The work, such as ``merging``.
        unit: What is counted, in the plural.
        total: Number of units; None: not known.
        last_line: Whether there is a line when all are done.
    """

    def __init__(self, name: str, unit: str, total: int | None = None, *, last_line: bool = True) -> None:
        self.name = name
        self.unit = unit
        self.total = total
        self.last_line = last_line
        self.done = 0
        self._time_of_line = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """Count units that are done."""
        self.done += count
        is_last = self.done == self.total
        due = time.monotonic() - self._time_of_line > LINE_INTERVAL_SECONDS
        if self.last_line if is_last else due:
            self._time_of_line = time.monotonic()
            counted = f"{self.unit} so far" if self.total is None else f"of {self.total} {self.unit}"
            rank_zero_info(f"{self.name}: {self.done} {counted}")


@contextmanager
def count_progress(name: str, unit: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes how many more units are done; see :class:`LineCounter` for the arguments."""
    console = Console()
    if not console.is_terminal:
        yield LineCounter(name, unit, total).advance
        return
    columns = [SpinnerColumn(), TextColumn("{task.description}"), *([] if total is None else [BarColumn()])]
    with Progress(*columns, MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(name, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def phase_progress(title: str, steps: int | None = None) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """Yield two functions: one takes the name of a phase that begins, the other counts a step of it.

    It is shown on stderr: a spinner on a terminal, which vanishes at the end, and else a line for each phase.

    Args:
        title: The work, such as ``checking``.
        steps: The most steps of a phase, for a bar; None: steps are not counted.
    """
    console = Console(stderr=True)
    columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}")]
    columns += [] if steps is None else [BarColumn(), MofNCompleteColumn()]
    disable = not console.is_terminal
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=disable) as bar:
        task = bar.add_task(title, total=steps)

        def begin(phase: str) -> None:
            bar.reset(task, description=f"{title}: {phase}")
            if bar.disable:
                print(f"{title}: {phase}", file=sys.stderr, flush=True)

        yield begin, lambda: bar.advance(task)
