"""TensorBoard's event files of a run that was interrupted and gone on with: which values belong to its line.

A run that is killed has logged steps after its last checkpoint, and trains them again. TensorBoard drops what is
overtaken where an event says ``SessionLog.START``; files without one are read by where they begin to train.
"""

from collections.abc import Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

Series = list[tuple[int, float]]

TRAINING = ("config/", "train/")
"""Beginnings of the names that only a fit logs, from the step on at which it starts."""

LONGEST = 1000
"""Points of a curve that are kept."""


def event_files(folder: Path) -> list[Path]:
    """Return the event files of a folder, oldest first.

    Args:
        folder: The run's ``tensorboard`` folder; it need not be there.
    """
    files = [(next(read_events(path), None), path) for path in sorted(folder.glob("events.out.tfevents.*"))]
    return [path for _, path in sorted((first.wall_time, path) for first, path in files if first is not None)]


def read_events(path: Path) -> Iterator[Event]:
    """Yield the events of a file, as far as it is whole.

    Args:
        path: An event file.
    """
    yield from map(Event.FromString, RawEventFileLoader(str(path)).Load())


def tag_of(event: Event) -> str | None:
    """Return the name of what an event holds, or None where it holds no value.

    Args:
        event: Any event; writers of torch put one value into each.
    """
    return event.summary.value[0].tag if event.HasField("summary") and event.summary.value else None


def read_scalars(folder: Path) -> dict[str, Series]:
    """Return step and value of what a run has logged on the way to its model; nothing without event files.

    Each step has one value, the last. What was overtaken is left out, and what ``validate`` and ``test`` have logged.

    Args:
        folder: The run's ``tensorboard`` folder.
    """
    line: dict[str, dict[int, float]] = {}
    for path in event_files(folder):
        logged: dict[str, dict[int, float]] = {}
        start: int | None = None
        for event in read_events(path):
            tag = tag_of(event)
            begins = event.session_log.status == SessionLog.START or (tag is not None and tag.startswith(TRAINING))
            if begins and (start is None or event.session_log.status == SessionLog.START):
                start = event.step
                line, logged = _before(start, line), _before(start, logged)
            if tag is not None and event.summary.value[0].HasField("simple_value"):
                logged.setdefault(tag, {})[event.step] = event.summary.value[0].simple_value
        if start is not None:
            for tag, values in logged.items():
                line[tag] = line.get(tag, {}) | values
    return {tag: _thinned(sorted(values.items())) for tag, values in line.items() if values}


def _before(step: int, values: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    return {tag: {at: value for at, value in points.items() if at < step} for tag, points in values.items()}


def _thinned(points: Series) -> Series:
    """A long curve by every so many points, the last one included."""
    stride = -(-len(points) // LONGEST)
    return points[::-stride][::-1] if stride > 1 else points
