"""What answers teach that are good or bad by themselves."""

import torch

from phi3_lightning.config import Objective
from phi3_lightning.objectives.answers import Answers, PreferenceLoss, preference_loss


def kto(good: Answers, bad: Answers, mismatched: Answers, objective: Objective) -> PreferenceLoss:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, equation 7).

    With h(y) = log p(y | x) - log p_ref(y | x) and the logistic function s, the loss of a good answer is
    desirable_weight * (1 - s(beta * (h(y) - z))), and of a bad one undesirable_weight * (1 - s(beta * (z - h(y)))). The
    baseline z is the mean of h over the micro-batch's ``mismatched`` answers, at least 0 and without a gradient; it
    changes with the micro-batch. The reward of an answer is beta * h(y).

    Args:
        mismatched: The batch's prompts, each with the answer of another, see
            :func:`phi3_lightning.batch.mismatched.mismatched`.
    """
    ratios = mismatched.log_ratios.detach()
    baseline = (ratios.sum() / max(len(ratios), 1)).clamp(min=0)
    losses = torch.cat(
        [
            objective.desirable_weight * (1 - torch.sigmoid(objective.beta * (good.log_ratios - baseline))),
            objective.undesirable_weight * (1 - torch.sigmoid(objective.beta * (baseline - bad.log_ratios))),
        ]
    )
    return preference_loss(losses, good, bad, objective)
