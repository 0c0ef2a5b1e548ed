"""Metrics of preferences; each adds up sums, so that neither batch size nor ranks change it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from phi3_lightning.metrics.tokens import TokenMean
from phi3_lightning.objectives import AnswerScores


class MeanDifference(Metric):
    """Mean of a quantity over chosen answers less that over rejected ones; NaN where either are missing."""

    totals: Tensor
    counts: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("totals", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, chosen: Tensor, rejected: Tensor) -> None:
        """Add the quantity of chosen and of rejected answers, shapes (answers,)."""
        self.totals = self.totals + torch.stack([chosen.double().sum(), rejected.double().sum()])
        self.counts = self.counts + self.counts.new_tensor([len(chosen), len(rejected)])

    def compute(self) -> Tensor:
        """Return the difference of the means so far, a float32 scalar."""
        means = self.totals / self.counts
        return (means[0] - means[1]).float()


class RankingByLabel(Metric):
    """The fraction of all pairs of a good and a bad answer of which the good one is ranked higher; a tie counts half.

    It is the area under the ROC curve (Hanley and McNeil 1982, https://doi.org/10.1148/radiology.143.1.7063747). NaN
    where either are missing.
    """

    good: list[Tensor]
    bad: list[Tensor]
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("good", [], dist_reduce_fx="cat")
        self.add_state("bad", [], dist_reduce_fx="cat")

    def update(self, good: Tensor, bad: Tensor) -> None:
        """Add the quantity by which answers are ranked, shapes (answers,)."""
        self.good.append(good.double())
        self.bad.append(bad.double())

    def compute(self) -> Tensor:
        """Return the fraction over all answers so far, a float32 scalar."""
        good, bad = dim_zero_cat(self.good), dim_zero_cat(self.bad).sort().values
        below, not_above = (torch.searchsorted(bad, good, side=side) for side in ("left", "right"))
        return ((below + not_above).double().sum() / (2 * len(good) * len(bad))).float()  # 0 / 0 is NaN


class PreferenceMetrics(nn.Module):
    """Loss, accuracies, reward margin and log-probabilities of preferences.

    ``loss`` is the mean over pairs. ``preference_accuracy`` is the fraction of pairs of which the chosen answer has the
    higher reward, ``ranking_accuracy`` of which it has the higher mean log-probability, whatever the reference; a tie
    counts half. ``reward_margin`` is the mean reward of chosen answers less that of rejected ones, ``chosen_logp`` and
    ``rejected_logp`` the mean log-probability of an answer. For KTO, whose answers are not paired, ``loss`` is the mean
    over answers, ``preference_accuracy`` the fraction whose reward is above 0 for a good answer and below 0 for a bad
    one, and ``ranking_accuracy`` a :class:`RankingByLabel`.

    Args:
        paired: Whether answers come in pairs.
    """

    def __init__(self, paired: bool) -> None:
        super().__init__()
        self.loss = TokenMean()
        self.preference_accuracy = TokenMean()
        self.ranking_accuracy: TokenMean | RankingByLabel = TokenMean() if paired else RankingByLabel()
        self.reward_margin = MeanDifference()
        self.chosen_logp, self.rejected_logp = TokenMean(), TokenMean()

    def update(self, loss_sum: Tensor, weight: Tensor, scores: tuple[AnswerScores, AnswerScores] | None) -> None:
        """Add a batch.

        Args:
            loss_sum: Sum of the losses, a scalar.
            weight: Their number, a scalar.
            scores: Those of the chosen and the rejected answers; None where a subclass's loss has none.
        """
        self.loss.update(loss_sum, weight)
        if scores is None:
            return
        chosen, rejected = scores
        if isinstance(self.ranking_accuracy, RankingByLabel):
            self.ranking_accuracy.update(chosen.mean_logps, rejected.mean_logps)
            signs = torch.cat([chosen.rewards, -rejected.rewards]).sign()
        else:
            self.ranking_accuracy.update(*_ahead((chosen.mean_logps - rejected.mean_logps).sign()))
            signs = (chosen.rewards - rejected.rewards).sign()
        self.preference_accuracy.update(*_ahead(signs))
        self.reward_margin.update(chosen.rewards, rejected.rewards)
        for metric, answers in ((self.chosen_logp, chosen), (self.rejected_logp, rejected)):
            metric.update(answers.logps.double().sum(), torch.tensor(len(answers.logps), device=weight.device))

    def by_name(self) -> dict[str, Metric]:
        """Return the metrics that have seen a batch, by name."""
        metrics: dict[str, Any] = dict(self.named_children())
        return {name: metric for name, metric in metrics.items() if metric.update_called}

    def log(self, log: Callable[..., Any], stage: str) -> None:
        """Log each metric by the method of a LightningModule, under ``stage/``."""
        for name, metric in self.by_name().items():
            log(f"{stage}/{name}", metric, prog_bar=name == "loss")


def _ahead(signs: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of 1 for each positive sign and a half for each zero, and the number of signs."""
    return (signs.double() + 1).sum() / 2, torch.tensor(len(signs), device=signs.device)
