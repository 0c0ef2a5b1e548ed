"""Progress without a terminal: lines at intervals, and one for each phase."""

import pytest

from phi3_lightning import progress
from phi3_lightning.progress import (
    JUPYTER_COLUMNS,
    LINE_INTERVAL_SECONDS,
    LineCounter,
    count_progress,
    phase_progress,
    table_console,
)


@pytest.fixture
def lines(monkeypatch):
    logged = []
    monkeypatch.setattr(progress, "rank_zero_info", logged.append)
    return logged


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_comes_at_most_every_ten_seconds_and_at_the_end(lines, clock):
    counter = LineCounter("merging", "tensors", 4)
    counter.advance()
    assert lines == []
    clock[0] = LINE_INTERVAL_SECONDS + 1
    counter.advance()
    counter.advance()
    assert lines == ["merging: 2 of 4 tensors"]
    counter.advance()
    assert lines[1:] == ["merging: 4 of 4 tensors"]


def test_progress_of_unknown_length_has_no_last_line(lines, clock):
    with count_progress("tokenising", "rows") as advance:
        advance(512)
        clock[0] = LINE_INTERVAL_SECONDS + 1
        advance(512)
        advance(1)
    assert lines == ["tokenising: 1024 rows so far"]


def test_each_phase_is_a_line_on_stderr(capsys):
    with phase_progress("checking", 3) as (begin, step):
        begin("one thing")
        step()
        begin("another")
    assert capsys.readouterr().err == "checking: one thing\nchecking: another\n"


def test_tables_fit_into_the_cell_of_a_notebook(monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert table_console().width == JUPYTER_COLUMNS
    monkeypatch.setattr("rich.console._is_jupyter", lambda: False)
    monkeypatch.setenv("COLUMNS", "140")
    assert table_console().width == 140
