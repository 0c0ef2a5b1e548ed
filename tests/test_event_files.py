"""Which values of event files belong to the starts that led to a run's model."""

import time
from pathlib import Path

import pytest
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard import SummaryWriter

from phi3_lightning.event_files import MAX_CURVE_POINTS, event_files, read_scalars


def write(folder: Path, *logged: tuple[str, float, int], start: int | None = None, config: int | None = None) -> None:
    """Write the event file of one start of a run."""
    writer = SummaryWriter(str(folder))
    if start is not None:
        writer.file_writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), start)
    if config is not None:
        writer.add_text("config", "a: 1", config)
    for tag, value, step in logged:
        writer.add_scalar(tag, value, step)
    writer.close()
    time.sleep(0.01)  # files are ordered by the time of their start


def losses(steps: range, value: float) -> list[tuple[str, float, int]]:
    return [("train/loss", value, step) for step in steps]


@pytest.mark.parametrize("kind", ["marked", "by its configuration", "by its first step"])
def test_values_logged_after_the_last_checkpoint_are_left_out(tmp_path, kind):
    marks = {"marked": {"start": 4}, "by its configuration": {"config": 4}, "by its first step": {}}[kind]
    write(tmp_path, *losses(range(7), 1.0), ("val/loss", 1.0, 2), ("val/loss", 1.0, 5), config=0)
    write(tmp_path, *losses(range(4, 6), 2.0), **marks)
    expected = [(step, 1.0) for step in range(4)] + [(4, 2.0), (5, 2.0)]
    assert read_scalars(tmp_path) == {"train/loss": expected, "val/loss": [(2, 1.0)]}


def test_the_last_value_logged_for_a_step_wins(tmp_path):
    write(tmp_path, *losses(range(4), 1.0), ("val/loss", 1.0, 3))
    write(tmp_path, ("val/loss", 2.0, 3), *losses(range(4, 6), 1.0), config=4)
    assert read_scalars(tmp_path)["val/loss"] == [(3, 2.0)]
    assert [step for step, _ in read_scalars(tmp_path)["train/loss"]] == list(range(6))


def test_a_start_that_logged_nothing_still_replaces_later_values(tmp_path):
    write(tmp_path, *losses(range(7), 1.0))
    write(tmp_path, start=3)
    assert read_scalars(tmp_path)["train/loss"] == [(step, 1.0) for step in range(3)]


def test_two_starts_in_one_file(tmp_path):
    write(tmp_path, *losses(range(6), 1.0))
    writer = SummaryWriter(str(tmp_path))
    for start, value in ((2, 2.0), (4, 3.0)):
        writer.file_writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), start)
        for step in range(start, start + 3):
            writer.add_scalar("train/loss", value, step)
    writer.close()
    expected = [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 3.0), (5, 3.0), (6, 3.0)]
    assert read_scalars(tmp_path)["train/loss"] == expected


def test_values_of_an_evaluation_are_no_points_of_the_run(tmp_path):
    write(tmp_path, *losses(range(4), 1.0), ("val/loss", 1.0, 3))
    write(tmp_path, ("val/loss", 9.0, 0), ("epoch", 0.0, 0))
    write(tmp_path, ("test/loss", 9.0, 0))
    assert read_scalars(tmp_path) == {"train/loss": [(step, 1.0) for step in range(4)], "val/loss": [(3, 1.0)]}


def test_a_long_curve_is_thinned_and_keeps_its_end(tmp_path):
    count = 2 * MAX_CURVE_POINTS + 1
    write(tmp_path, *losses(range(count), 1.0))
    curve = read_scalars(tmp_path)["train/loss"]
    assert len(curve) <= MAX_CURVE_POINTS
    assert curve[-1] == (count - 1, 1.0)
    assert curve == sorted(set(curve))


def test_a_truncated_file_gives_its_whole_records(tmp_path):
    write(tmp_path, *losses(range(7), 1.0))
    (path,) = event_files(tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    assert [step for step, _ in read_scalars(tmp_path)["train/loss"]] == list(range(6))
    (tmp_path / "events.out.tfevents.0000000001.empty").touch()
    assert event_files(tmp_path) == [path]


def test_a_folder_without_event_files_has_no_curves(tmp_path):
    assert read_scalars(tmp_path / "absent") == read_scalars(tmp_path) == {}
