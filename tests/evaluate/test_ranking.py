"""Good answers above bad ones, against all their pairs one by one."""

import numpy as np
import pytest

from phi3_lightning.evaluate.ranking import _area, measure_ranking_by_label

SCORES = np.array([0.5, -1.0, 0.5, 2.0, 0.0, -1.0])  # with ties within and across labels
GOOD = np.array([True, True, False, False, True, False])


@pytest.mark.parametrize("times", [[1, 1, 1, 1, 1, 1], [2, 0, 3, 1, 1, 4]])
def test_an_answer_that_counts_several_times_is_as_several_answers(times):
    scores, good = np.repeat(SCORES, times), np.repeat(GOOD, times)
    ahead = [(np.sign(a - b) + 1) / 2 for a in scores[good] for b in scores[~good]]
    assert _area(SCORES, GOOD, np.array(times, dtype=float)) == pytest.approx(np.mean(ahead))


def test_draws_without_a_label_are_left_out():
    answers = np.array([[0.0, 2.0, 1.0], [1.0, 1.0, 0.0]])
    compared = measure_ranking_by_label(answers, 50)["ranking_accuracy"]
    assert (compared.base.value, compared.tuned.value, compared.difference.low) == (0, 1, 1)
