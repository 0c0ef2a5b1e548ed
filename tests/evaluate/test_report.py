"""The rows that a report shows."""

from types import SimpleNamespace

import pytest

from phi3_lightning.evaluate.report import AnswerPair, Report
from phi3_lightning.metrics import Answer


def pair(row: int, base: str, tuned: str, rouge: tuple[float, float]) -> AnswerPair:
    answers = (Answer(text, "reference", 3, True) for text in (base, tuned))
    return AnswerPair(row, "prompt", *answers, *({"rougeL": [value]} for value in rouge))


def test_rows_that_differ_most_are_the_changed_ones_by_rouge():
    pairs = [
        pair(0, "a", "a", (0.5, 0.5)),
        pair(1, "a", "b", (0.5, 0.4)),
        pair(2, "a", "c", (0.1, 0.9)),
        pair(3, "a", "d", (0.5, 0.5)),
    ]
    report = SimpleNamespace(answers=pairs)
    assert [each.row for each in Report.most_different.fget(report)] == [2, 1, 3]


@pytest.mark.parametrize("answers", [[], [pair(0, "a", "a", (1.0, 1.0))]])
def test_there_may_be_no_such_row(answers):
    assert Report.most_different.fget(SimpleNamespace(answers=answers)) == []
