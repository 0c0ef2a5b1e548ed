"""What pairs of a chosen and a rejected answer teach.

In the formulas x is the prompt, y+ the chosen and y- the rejected answer, |y| the number of an answer's tokens, s the
logistic function, and h(y) = log p(y | x) - log p_ref(y | x) the log-ratio to the reference. The reward of an answer is
beta * h(y), or, without a reference, beta * log p(y | x) / |y|.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from phi3_lightning.config import Objective
from phi3_lightning.objectives.answers import Answers, PreferenceLoss, preference_loss
from phi3_lightning.objectives.supervised import mean_token_loss


def dpo(chosen: Answers, rejected: Answers, objective: Objective) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290).

    The loss of a pair is L(m) = -log s(m), with the margin m = beta * (h(y+) - h(y-)). With ``label_smoothing`` e it is
    ((1 - e) L(m) - e L(-m)) / (1 - 2 e): where a part e of the pairs is the wrong way round, its expectation is that of
    L over pairs that are right (robust DPO, Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409).
    """
    margins = objective.beta * (chosen.log_ratios - rejected.log_ratios)
    flipped = objective.label_smoothing
    return (flipped * F.logsigmoid(-margins) - (1 - flipped) * F.logsigmoid(margins)) / (1 - 2 * flipped)


def ipo(chosen: Answers, rejected: Answers, objective: Objective) -> Tensor:
    """Identity preference optimisation (Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17).

    The loss of a pair is (h(y+) / |y+| - h(y-) / |y-| - 1 / (2 beta))^2: the margin is to be 1 / (2 beta), and not as
    large as possible. Log-ratios are means over tokens, as in TRL, whose authors have it from those of the paper.
    """
    better, worse = (answers.log_ratios / answers.tokens.clamp(min=1) for answers in (chosen, rejected))
    return (better - worse - 1 / (2 * objective.beta)) ** 2


def orpo(chosen: Answers, rejected: Answers, objective: Objective) -> Tensor:
    """Odds ratio preference optimisation (Hong et al. 2024, https://arxiv.org/abs/2403.07691), without a reference.

    With log q(y) = log p(y | x) / |y| and odds(y) = q(y) / (1 - q(y)), the loss of a pair is
    -log q(y+) - beta * log s(log odds(y+) - log odds(y-)).
    """
    better, worse = (answers.mean_logps - _log1mexp(answers.mean_logps) for answers in (chosen, rejected))
    return mean_token_loss(chosen) - objective.beta * F.logsigmoid(better - worse)


def simpo(chosen: Answers, rejected: Answers, objective: Objective) -> Tensor:
    """Simple preference optimisation (Meng et al. 2024, https://arxiv.org/abs/2405.14734), without a reference.

    The loss of a pair is -log s(beta * (log p(y+ | x) / |y+| - log p(y- | x) / |y-|) - simpo_gamma).
    """
    return -F.logsigmoid(objective.beta * (chosen.mean_logps - rejected.mean_logps) - objective.simpo_gamma)


PAIRWISE: dict[str, Callable[[Answers, Answers, Objective], Tensor]] = {
    "dpo": dpo,
    "ipo": ipo,
    "orpo": orpo,
    "simpo": simpo,
}
"""The objectives that learn from pairs, by name; each returns the losses, shape (pairs,)."""


def preference(chosen: Answers, rejected: Answers, objective: Objective) -> PreferenceLoss:
    """Return what pairs teach by an objective of :data:`PAIRWISE`.

    ``sft_weight`` adds that many times the mean token loss of each chosen answer.
    """
    losses = PAIRWISE[objective.name](chosen, rejected, objective)
    if objective.sft_weight > 0:
        losses = losses + objective.sft_weight * mean_token_loss(chosen)
    return preference_loss(losses, chosen, rejected, objective)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0, exact on both sides of -log 2.

    See Mächler 2012, https://cran.r-project.org/web/packages/Rmpfr/vignettes/log1mexp-note.pdf. The branch that is not
    taken gets a value of its own domain, since its gradient could be a NaN.
    """
    near = x > -0.6931472
    near_zero = torch.log(-torch.expm1(torch.where(near, x, -0.5)))
    return torch.where(near, near_zero, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))
