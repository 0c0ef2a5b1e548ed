"""What an objective reads and returns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from phi3_lightning.config import Objective


@dataclass(frozen=True)
class Answers:
    """Some of a batch's answers, such as the chosen ones. All tensors have the shape (answers,)."""

    logps: Tensor
    """Log-probability of each answer given its prompt, summed over its supervised tokens, float32 with a graph."""
    tokens: Tensor
    """Supervised tokens of each answer, int64."""
    reference_logps: Tensor | None = None
    """The same log-probability by the reference, without a graph; None where the objective has no reference."""

    def where(self, flags: list[bool]) -> "Answers":
        """Return the answers whose flag is true."""
        places = [place for place, flag in enumerate(flags) if flag]
        index = torch.tensor(places, dtype=torch.int64, device=self.logps.device)
        reference = None if self.reference_logps is None else self.reference_logps[index]
        return Answers(self.logps[index], self.tokens[index], reference)

    @property
    def mean_logps(self) -> Tensor:
        """Mean log-probability of an answer's tokens."""
        return self.logps / self.tokens.clamp(min=1)

    @property
    def log_ratios(self) -> Tensor:
        """By how much the model makes each answer likelier than the reference does, in nats."""
        assert self.reference_logps is not None  # of an objective with a reference
        return self.logps - self.reference_logps


@dataclass(frozen=True)
class AnswerScores:
    """What metrics show of answers. All tensors have the shape (answers,) and no graph."""

    rewards: Tensor
    """beta times the log-ratio to the reference, or, without a reference, times the mean log-probability."""
    logps: Tensor
    """Log-probability of each answer."""
    mean_logps: Tensor
    """Mean log-probability of an answer's tokens."""


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of a batch of preferences, and what metrics show of its answers."""

    loss_sum: Tensor
    """Sum of the losses of pairs or, with KTO, of answers; a float32 scalar with a graph."""
    weight: Tensor
    """Number of pairs or answers, an int64 scalar."""
    chosen: AnswerScores
    """The chosen or, with KTO, the good answers."""
    rejected: AnswerScores
    """The rejected or bad answers."""


def preference_loss(losses: Tensor, chosen: Answers, rejected: Answers, objective: Objective) -> PreferenceLoss:
    """Return the sum of losses, their number, and the scores of the answers."""
    weight = torch.tensor(len(losses), device=losses.device)
    return PreferenceLoss(losses.sum(), weight, _scores(chosen, objective), _scores(rejected, objective))


def _scores(answers: Answers, objective: Objective) -> AnswerScores:
    rewarded = answers.log_ratios if objective.has_reference else answers.mean_logps
    return AnswerScores(objective.beta * rewarded.detach(), answers.logps.detach(), answers.mean_logps.detach())
