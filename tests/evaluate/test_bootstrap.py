"""Bootstrap intervals have their stated coverage, and rows are resampled in pairs."""

import numpy as np
import pytest
import sacrebleu
from sacrebleu.significance import PairedTest

from phi3_lightning.evaluate.bootstrap import MIN_SIGNIFICANT_ROWS as ENOUGH
from phi3_lightning.evaluate.bootstrap import compare
from phi3_lightning.metrics import Answer
from phi3_lightning.metrics.answers import scores


def mean(total: list[float]) -> float:
    return total[0] / total[1]


def rows(values) -> np.ndarray:
    return np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], axis=1)


def test_values_are_those_of_all_rows():
    found = compare(rows([1, 2, 6]), rows([2, 2, 2]), mean, 100)
    assert (found.base.value, found.tuned.value, found.difference.value) == (3, 2, -1)
    assert found.tuned.low == found.tuned.high == 2


def test_an_interval_holds_the_truth_19_times_in_20():
    """For the mean of 200 normal values, the number of 400 intervals that contain it is binomial."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        found = compare(rows(rng.normal(0.3, 1, 200)), rows(rng.normal(0, 1, 200)), mean, 200).base
        held += found.low <= 0.3 <= found.high
    # 4 deviations, and 1.5% that a percentile of 200 draws of 200 rows is too narrow by
    assert 0.95 - 0.015 - 4 * (0.95 * 0.05 / 400) ** 0.5 < held / 400 < 0.95 + 4 * (0.95 * 0.05 / 400) ** 0.5


def test_base_and_tuned_rows_are_resampled_in_pairs():
    """Each row gains a little, and rows differ much: resampled separately, the gain would not show."""
    base = np.random.default_rng(0).normal(0, 10, 50)
    gained = compare(rows(base), rows(base + 0.1), mean, 500)
    assert gained.significant
    assert gained.difference.low == pytest.approx(0.1)
    apart = compare(rows(base), rows(np.random.default_rng(1).permutation(base) + 0.1), mean, 500)
    assert not apart.significant


def test_no_change_is_not_significant():
    assert not compare(rows([1, 2, 3]), rows([1, 2, 3]), mean, 100).significant


@pytest.mark.parametrize(("count", "significant"), [(3, False), (ENOUGH - 1, False), (ENOUGH, True)])
def test_too_few_rows_are_never_significant(count, significant):
    base = np.random.default_rng(0).normal(0, 1, count)
    found = compare(rows(base), rows(base + 0.1), mean, 100)
    assert found.difference.low > 0
    assert found.significant == significant
    assert found.too_few == (not significant)


def test_the_same_rows_always_have_the_same_interval():
    values = np.random.default_rng(0).normal(0, 1, 30)
    assert compare(rows(values), rows(values), mean, 100) == compare(rows(values), rows(values), mean, 100)


def test_bleu_of_a_draw_is_the_corpus_score_of_the_drawn_rows():
    """The mean and half width are those of sacrebleu's own paired bootstrap, from other draws."""
    rng = np.random.default_rng(0)
    words = [f"word{index}" for index in range(20)]
    references = [" ".join(rng.choice(words, 12)) for _ in range(60)]
    answers = [[" ".join(w if rng.random() < share else "no" for w in text.split()) for text in references]
               for share in (0.6, 0.8)]  # fmt: skip
    bleu = scores()["bleu"]
    base, tuned = (
        np.array([bleu.count(Answer(text, reference, 1, True)) for text, reference in zip(a, references, strict=True)])
        for a in answers
    )
    found = compare(base, tuned, bleu.value, 1000)
    named = [("base", answers[0]), ("tuned", answers[1])]
    test = PairedTest(named, {"BLEU": sacrebleu.BLEU()}, [references], test_type="bs", n_samples=1000)
    theirs = test()[1]["BLEU"]
    for ours, other in zip((found.base, found.tuned), theirs, strict=True):
        assert ours.value == pytest.approx(other.score)
        # half a width from 1000 draws has a relative deviation of about 4%, on either side
        assert (ours.high - ours.low) / 2 == pytest.approx(other.ci, rel=0.25)
    assert found.significant
