"""Metrics on held-out rows; each adds up sums, so that neither batch size nor ranks change it."""

from phi3_lightning.metrics.answers import Answer, AnswerMetric, AnswerMetrics
from phi3_lightning.metrics.preferences import MeanDifference, PreferenceMetrics, RankingByLabel
from phi3_lightning.metrics.tokens import Perplexity, TokenMean, TokenMetrics

__all__ = [
    "Answer",
    "AnswerMetric",
    "AnswerMetrics",
    "MeanDifference",
    "Perplexity",
    "PreferenceMetrics",
    "RankingByLabel",
    "TokenMean",
    "TokenMetrics",
]
