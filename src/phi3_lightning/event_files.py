"""TensorBoard's event files of a run that was interrupted and resumed: which values led to its model.

A run that is killed has logged steps after its last checkpoint, and trains them again. TensorBoard drops the first
values of such steps where it reads an event ``SessionLog.START``; in files without one, the first event of training is
the start.
"""

from collections.abc import Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

Series = list[tuple[int, float]]

TRAINING_PREFIXES = ("config/", "train/")
"""Prefixes of the tags that only a fit logs, from its first step."""

MAX_CURVE_POINTS = 1000


def event_files(folder: Path) -> list[Path]:
    """Return the event files of a run's ``tensorboard`` folder, which need not exist, oldest first."""
    files = [(next(read_events(path), None), path) for path in sorted(folder.glob("events.out.tfevents.*"))]
    return [path for _, path in sorted((first.wall_time, path) for first, path in files if first is not None)]


def read_events(path: Path) -> Iterator[Event]:
    """Yield the events of a file, up to one that is truncated."""
    yield from map(Event.FromString, RawEventFileLoader(str(path)).Load())


def tag_of(event: Event) -> str | None:
    """Return the tag of an event, which has one value where torch has written it; None: it has no value."""
    return event.summary.value[0].tag if event.HasField("summary") and event.summary.value else None


def read_scalars(folder: Path) -> dict[str, Series]:
    """Return the curves of a run, by tag: steps and values that led to its model.

    Each step has one value, the last. Values that a restart has trained again are left out, and so are those that
    ``validate`` and ``test`` have logged. The run's ``tensorboard`` folder need not exist.
    """
    curves: dict[str, dict[int, float]] = {}
    for path in event_files(folder):
        own: dict[str, dict[int, float]] = {}
        start: int | None = None
        for event in read_events(path):
            tag = tag_of(event)
            starts = event.session_log.status == SessionLog.START
            if starts or (start is None and tag is not None and tag.startswith(TRAINING_PREFIXES)):
                start = event.step
                curves, own = _before(start, curves), _before(start, own)
            if tag is not None and event.summary.value[0].HasField("simple_value"):
                own.setdefault(tag, {})[event.step] = event.summary.value[0].simple_value
        if start is not None:
            for tag, values in own.items():
                curves[tag] = curves.get(tag, {}) | values
    return {tag: _thin_out(sorted(values.items())) for tag, values in curves.items() if values}


def _before(step: int, curves: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    return {tag: {at: value for at, value in points.items() if at < step} for tag, points in curves.items()}


def _thin_out(points: Series) -> Series:
    """Every n-th point of a long curve, counted from the last one, which stays."""
    stride = -(-len(points) // MAX_CURVE_POINTS)
    return points[::-stride][::-1] if stride > 1 else points
