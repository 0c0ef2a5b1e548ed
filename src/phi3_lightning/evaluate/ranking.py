"""Which answers a model prefers, by the mean log-probability of their tokens."""

import math
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from phi3_lightning.batch import Batch
from phi3_lightning.evaluate.bootstrap import Comparison, Statistics, compare, compare_weighted


def reference_documents(batch: Batch) -> list[int]:
    """Return which documents of a batch have answers to imitate: those of chats, and preferred ones."""
    if "preferred" not in batch:
        return list(range(sum(map(len, batch["document_ids"]))))
    return [index for index, preferred in enumerate(chain.from_iterable(batch["preferred"])) if preferred]


def ranks(measured: Statistics) -> Statistics:
    """Return, for each pair, 1 where base and tuned model prefer the chosen answer, a half for a tie, and else 0.

    Args:
        measured: Sum of losses, correct tokens and tokens of each document, by the base and then by the tuned model,
            shape (2 * pairs, 6), chosen and rejected in turn.

    Returns:
        Shape (pairs, 2).
    """
    means = mean_logps(measured)
    return np.asarray((np.sign(means[0::2] - means[1::2]) + 1) / 2)


def mean_logps(measured: Statistics) -> Statistics:
    """Return the mean log-probability of each document's tokens by base and tuned model, shape (documents, 2)."""
    return np.asarray(-measured[:, [0, 3]] / measured[:, [2, 5]])


def measure_ranking(pairs: Statistics, resamples: int) -> dict[str, Comparison]:
    """Compare the :func:`ranks` of pairs, shape (pairs, 2); the result is empty without a pair."""
    if not len(pairs):
        return {}
    base, tuned = (np.stack([model, np.ones(len(model))], axis=1) for model in pairs.T)
    return {"ranking_accuracy": compare(base, tuned, lambda total: total[0] / total[1], resamples)}


def measure_ranking_by_label(answers: Statistics, resamples: int) -> dict[str, Comparison]:
    """Compare how often a good answer is ranked above a bad one; the result is empty where either are missing.

    Args:
        answers: The :func:`mean_logps` of each answer, and 1 for a good or 0 for a bad one; shape (answers, 3).
    """
    if not len(answers) or answers[:, 2].min() == answers[:, 2].max():
        return {}
    good = answers[:, 2] == 1

    def measure(times: Statistics) -> tuple[float, float]:
        base, tuned = (_area(scores, good, times) for scores in answers[:, :2].T)
        return base, tuned

    return {"ranking_accuracy": compare_weighted(measure, len(answers), resamples)}


def _area(scores: Statistics, good: NDArray[np.bool_], times: Statistics) -> float:
    """The fraction of all pairs of a good and a bad answer of which the good one has the higher score; ties count half.

    ``times`` is how often each answer counts; the result is NaN where all good or all bad ones count 0 times.
    """
    order = np.argsort(scores[~good])
    bad, below = scores[~good][order], np.cumsum([0, *times[~good][order]])
    lower, not_higher = (below[np.searchsorted(bad, scores[good], side)] for side in ("left", "right"))
    pairs = times[good].sum() * below[-1]
    return float(times[good] @ (lower + not_higher) / (2 * pairs)) if pairs else math.nan
