"""What a batch teaches: pure functions from the log-probabilities of its answers to a loss."""

from phi3_lightning.objectives.answers import Answers, AnswerScores, PreferenceLoss
from phi3_lightning.objectives.kto import kto
from phi3_lightning.objectives.preference import PAIRWISE, preference

__all__ = ["PAIRWISE", "AnswerScores", "Answers", "PreferenceLoss", "kto", "preference"]
