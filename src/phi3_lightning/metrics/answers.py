"""Metrics of generated answers against references: by rouge_score and sacrebleu, from statistics that add up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from phi3_lightning.errors import ConfigError
from phi3_lightning.metrics.segments import WordTokenizer, spaced

UNSPACED_APART = "one character a word in scripts without spaces"
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Args:
        text: What was answered, without special tokens.
        reference: What should have been answered.
        tokens: Tokens of the answer, without the one that ended it.
        finished: Whether the answer ended by itself, with a stop token.
    """

    text: str
    reference: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class Score:
    """A score that follows from statistics which add up over answers.

    Args:
        count: The statistics of one answer.
        value: The score of all answers, from the sum of their statistics.
        width: How many statistics there are.
        signature: By which library, and how it takes texts apart; empty where there is nothing to say.
    """

    count: Callable[[Answer], list[float]]
    value: Callable[[list[float]], float]
    width: int
    signature: str = ""


class AnswerMetric(Metric):
    """A score of all answers so far; NaN where there were none.

    Args:
        score: What is counted, and what follows from it.
    """

    total: Tensor
    answers: Tensor
    full_state_update = False

    def __init__(self, score: Score) -> None:
        super().__init__()
        self.score = score
        self.add_state("total", torch.zeros(score.width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("answers", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, statistics: Tensor) -> None:
        """Add answers.

        Args:
            statistics: What ``score.count`` returned for each, shape (answers, width), float64.
        """
        self.total = self.total + statistics.sum(0)
        self.answers = self.answers + len(statistics)

    def compute(self) -> Tensor:
        """Return the score of all answers so far, a float32 scalar."""
        value = self.score.value(self.total.tolist()) if self.answers > 0 else torch.nan
        return torch.tensor(value, dtype=torch.float32, device=self.device)


class AnswerMetrics(nn.Module):
    """ROUGE, BLEU, chrF, exact match, stop rate and mean length.

    Their names are ``rouge1``, ``rouge2``, ``rougeL``, ``rougeLsum`` (F1 in [0, 1], mean over answers), ``bleu``,
    ``chrf`` (in [0, 100], of all answers as one corpus), ``exact_match``, ``stop_rate`` (shares in [0, 1]) and
    ``answer_tokens``.

    Attributes:
        by_name: The metrics.

    Raises:
        ConfigError: The extra eval is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, AnswerMetric] = nn.ModuleDict(  # type: ignore[assignment]
            {name: AnswerMetric(score) for name, score in scores().items()}
        )

    def update(self, answers: Sequence[Answer]) -> dict[str, Tensor]:
        """Add answers to every metric.

        Args:
            answers: What was generated, and what should have been.

        Returns:
            The statistics of each answer by the name of the metric, shape (answers, width), float64, on the CPU.
        """
        found = {}
        for name, metric in self.by_name.items():
            counts = [metric.score.count(answer) for answer in answers]
            found[name] = torch.tensor(counts, dtype=torch.float64).reshape(len(answers), metric.score.width)
            metric.update(found[name].to(metric.device))
        return found

    def compute(self) -> dict[str, float]:
        """Return each metric of all answers so far, over all ranks."""
        return {name: metric.compute().item() for name, metric in self.by_name.items()}


def scores() -> dict[str, Score]:
    """Return what is counted of answers, and what follows from it, by name.

    Raises:
        ConfigError: The extra eval is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ConfigError(
            f"evaluation.rows: answers are scored with {error.name}, which is not installed; install the extra eval "
            "(pip install 'phi3-lightning[eval]'), or set evaluation.rows: 0 to measure token losses alone"
        ) from None
    return {
        **{name: _rouge(RougeScorer([name], tokenizer=WordTokenizer()), name) for name in ROUGE},
        "bleu": _corpus(BLEU(force=True), spaced, f", {UNSPACED_APART}"),  # force: an answer may end in " ."
        "chrf": _corpus(CHRF(), str),
        "exact_match": _mean(lambda answer: float(answer.text.strip() == answer.reference.strip())),
        "stop_rate": _mean(lambda answer: float(answer.finished)),
        "answer_tokens": _mean(lambda answer: float(answer.tokens)),
    }


def _mean(of: Callable[[Answer], float]) -> Score:
    return Score(lambda answer: [of(answer), 1.0], lambda total: total[0] / total[1], 2)


def _rouge(scorer: Any, name: str) -> Score:
    score = _mean(lambda answer: float(scorer.score(answer.reference, answer.text)[name].fmeasure))
    words = f"words of any script in lower case, no stemming, {UNSPACED_APART}"
    return replace(score, signature=f"rouge_score {version('rouge_score')}, {words}")


def _corpus(metric: Any, prepare: Callable[[str], str], prepared: str = "") -> Score:
    """A score of sacrebleu, from the statistics that its own significance tests resample."""

    def count(answer: Answer) -> list[float]:
        [statistics] = metric._extract_corpus_statistics([prepare(answer.text)], [[prepare(answer.reference)]])
        return [float(number) for number in statistics]

    def value(total: list[float]) -> float:
        return float(metric._aggregate_and_compute([[round(number) for number in total]]).score)

    width = len(count(Answer("a", "a", 1, True)))
    return Score(count, value, width, f"sacrebleu {metric.get_signature()}{prepared}")
