"""Saved loop positions are adjusted so that a run resumes exactly."""

import copy

import pytest

from phi3_lightning.checkpoint.resume import repeat_validation, rewind_to_window_start


def loops(ready: int, total: int, is_last_batch: bool = False) -> dict:
    states = ("ready", "started", "processed", "completed")
    return {
        "fit_loop": {
            "epoch_loop.batch_progress": {
                "current": dict.fromkeys(states, ready),
                "total": dict.fromkeys(states, total),
                "is_last_batch": is_last_batch,
            }
        }
    }


@pytest.mark.parametrize(
    ("ready", "total", "expected"),
    [(4, 14, (4, 14)), (6, 16, (4, 14)), (3, 13, (0, 10)), (8, 8, (8, 8)), (0, 10, (0, 10))],
)
def test_a_partial_accumulation_window_is_rewound_to_its_start(ready, total, expected):
    position = loops(ready, total)
    rewind_to_window_start(position, 4)
    assert position == loops(*expected)


def test_a_short_last_window_of_an_epoch_is_not_rewound():
    position = loops(6, 16, is_last_batch=True)
    rewind_to_window_start(position, 4)
    assert position == loops(6, 16, is_last_batch=True)


def test_without_accumulation_nothing_is_rewound():
    for ready in range(5):
        position = loops(ready, ready)
        rewind_to_window_start(position, 1)
        assert position == loops(ready, ready)


def test_repeating_a_validation_leaves_training_progress_alone():
    position = loops(3, 3)
    position["fit_loop"]["epoch_loop.val_loop.batch_progress"] = loops(2, 12)["fit_loop"]["epoch_loop.batch_progress"]
    training = copy.deepcopy(position["fit_loop"]["epoch_loop.batch_progress"])
    repeat_validation(position)
    validation = position["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    assert set(validation["current"].values()) == {0}
    assert validation["total"]["ready"] > validation["total"]["completed"]
    assert position["fit_loop"]["epoch_loop.batch_progress"] == training
