"""Metrics of generated answers against references, by rouge_score and sacrebleu, from statistics that add up."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from phi3_lightning.errors import ConfigError
from phi3_lightning.metrics.segments import WordTokenizer, spaced

UNSPACED_NOTE = "one character a word in scripts without spaces"
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


@dataclass(frozen=True)
class Answer:
    """A generated answer and its reference."""

    text: str
    """The answer, without special tokens."""
    reference: str
    tokens: int
    """Number of tokens of the answer, without the stop token."""
    finished: bool
    """Whether the answer ended with a stop token."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The row of the reference, for metrics that read more of it; empty where none does."""


@dataclass(frozen=True)
class Score:
    """A score computed from statistics that add up over answers."""

    count: Callable[[Answer], list[float]]
    """The statistics of one answer."""
    value: Callable[[list[float]], float]
    """The score of all answers, from the sum of their statistics."""
    width: int
    """Number of statistics."""
    signature: str = ""
    """The library and its tokenization, for scores of a library."""


class AnswerMetric(Metric):
    """A score of all answers so far; NaN where there were none."""

    total: Tensor
    answers: Tensor
    full_state_update = False

    def __init__(self, score: Score) -> None:
        super().__init__()
        self.score = score
        self.add_state("total", torch.zeros(score.width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("answers", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, statistics: Tensor) -> None:
        """Add answers, by the ``score.count`` of each, shape (answers, width), float64."""
        self.total = self.total + statistics.sum(0)
        self.answers = self.answers + len(statistics)

    def compute(self) -> Tensor:
        """Return the score of all answers so far, a float32 scalar."""
        value = self.score.value(self.total.tolist()) if self.answers > 0 else torch.nan
        return torch.tensor(value, dtype=torch.float32, device=self.device)


class AnswerMetrics(nn.Module):
    """ROUGE, BLEU, chrF, exact match, stop rate and mean length.

    Their names are ``rouge1``, ``rouge2``, ``rougeL``, ``rougeLsum`` (F1 in [0, 1], mean over answers), ``bleu``,
    ``chrf`` (in [0, 100], of all answers as one corpus), ``exact_match``, ``stop_rate`` (fractions in [0, 1]) and
    ``answer_tokens``.

    Attributes:
        by_name: The metrics.

    Raises:
        ConfigError: If the extra eval is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, AnswerMetric] = nn.ModuleDict(  # type: ignore[assignment]
            {name: AnswerMetric(score) for name, score in scores().items()}
        )

    def update(self, answers: Sequence[Answer]) -> dict[str, Tensor]:
        """Add answers to every metric.

        Returns:
            The statistics of each answer by the name of the metric, shape (answers, width), float64, on the CPU.
        """
        statistics = {}
        for name, metric in self.by_name.items():
            counts = [metric.score.count(answer) for answer in answers]
            statistics[name] = torch.tensor(counts, dtype=torch.float64).reshape(len(answers), metric.score.width)
            metric.update(statistics[name].to(metric.device))
        return statistics

    def compute(self) -> dict[str, float]:
        """Return each metric of all answers so far, over all ranks."""
        return {name: metric.compute().item() for name, metric in self.by_name.items()}


def total(statistics: Iterable[Sequence[float]]) -> list[float]:
    """Return the sum of the statistics of some answers, at least one."""
    return [sum(column) for column in zip(*statistics, strict=True)]


def scores(option: str = "evaluation.rows") -> dict[str, Score]:
    """Return all scores, by name.

    Args:
        option: What asks for answers, for the error.

    Raises:
        ConfigError: If the extra eval is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ConfigError(
            f"{option}: answers are scored with {error.name}, which is not installed; install the extra eval "
            f"(pip install 'phi3-lightning[eval]'), or set {option}: 0 to measure token losses alone"
        ) from None
    return {
        **{name: _rouge(RougeScorer([name], tokenizer=WordTokenizer()), name) for name in ROUGE},
        "bleu": _corpus(BLEU(force=True), spaced, f", {UNSPACED_NOTE}"),  # force: an answer may end in " ."
        "chrf": _corpus(CHRF(), str),
        "exact_match": mean_score(lambda answer: float(answer.text.strip() == answer.reference.strip())),
        "stop_rate": mean_score(lambda answer: float(answer.finished)),
        "answer_tokens": mean_score(lambda answer: float(answer.tokens)),
    }


def mean_score(value: Callable[[Answer], float], signature: str = "") -> Score:
    """Return a score that is the mean of a value of each answer."""
    return Score(lambda answer: [value(answer), 1.0], lambda total: total[0] / total[1], 2, signature)


def _rouge(scorer: Any, name: str) -> Score:
    score = mean_score(lambda answer: float(scorer.score(answer.reference, answer.text)[name].fmeasure))
    words = f"words of any script in lower case, no stemming, {UNSPACED_NOTE}"
    return replace(score, signature=f"rouge_score {version('rouge_score')}, {words}")


def _corpus(metric: Any, prepare: Callable[[str], str], note: str = "") -> Score:
    """A score of sacrebleu, from the statistics that its own significance tests resample."""

    def count(answer: Answer) -> list[float]:
        [statistics] = metric._extract_corpus_statistics([prepare(answer.text)], [[prepare(answer.reference)]])
        return [float(number) for number in statistics]

    def value(total: list[float]) -> float:
        return float(metric._aggregate_and_compute([[round(number) for number in total]]).score)

    width = len(count(Answer("a", "a", 1, True)))
    return Score(count, value, width, f"sacrebleu {metric.get_signature()}{note}")
