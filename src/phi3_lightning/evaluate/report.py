"""The results of ``test``: base and tuned model compared in metrics and in answers."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from phi3_lightning.contracts import Origin
from phi3_lightning.evaluate.bootstrap import (
    LEVEL_PERCENT,
    MIN_SIGNIFICANT_ROWS,
    Comparison,
    Estimate,
    Statistics,
    compare,
)
from phi3_lightning.event_files import Series
from phi3_lightning.metrics import Answer
from phi3_lightning.metrics.answers import Score, total

FORMAT_VERSION = 1
"""Version of the layout of test.json."""

TITLES = {
    "loss": "token loss",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "ranking_accuracy": "ranking accuracy",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "bleu": "BLEU",
    "chrf": "chrF",
    "exact_match": "exact match",
    "stop_rate": "stop rate",
    "answer_tokens": "answer length, tokens",
}
"""The metrics, in the order of the report; the user's own follow by their names."""

TOKEN_SCORES: dict[str, Callable[[list[float]], float]] = {
    "loss": lambda total: total[0] / total[2],
    "perplexity": lambda total: float(np.exp(total[0] / total[2])),  # inf where it is too large for a float
    "token_accuracy": lambda total: total[1] / total[2],
}
"""Functions of the sums of losses, of correct tokens and of tokens."""

SHOWN_ROWS = 10
"""Rows that the report shows in each list."""


@dataclass(frozen=True)
class AnswerPair:
    """The answers of both models to a row."""

    row: int
    """Id of the document."""
    prompt: str
    """The prompt, special tokens included."""
    base: Answer
    tuned: Answer
    base_statistics: Mapping[str, list[float]]
    """Statistics of the base model's answer, by metric."""
    tuned_statistics: Mapping[str, list[float]]
    own: Sequence[str] = ()
    """Names of the user's own metrics."""

    @property
    def rouge(self) -> tuple[float, float]:
        """ROUGE-L of base and tuned model."""
        return self.base_statistics["rougeL"][0], self.tuned_statistics["rougeL"][0]

    def content(self) -> dict[str, Any]:
        """Return the row for JSON."""
        models = {
            model: {"answer": answer.text, "tokens": answer.tokens, "finished": answer.finished}
            | {name: statistics[name][0] for name in ("rougeL", *self.own)}
            for model, answer, statistics in (
                ("base", self.base, self.base_statistics),
                ("tuned", self.tuned, self.tuned_statistics),
            )
        }
        return {"row": self.row, "prompt": self.prompt, "reference": self.tuned.reference} | models


@dataclass(frozen=True)
class Report:
    """The results of ``test``."""

    run: str
    checkpoint: str | None
    """The tested checkpoint; None: the module as it was in memory."""
    step: int | None
    """Optimiser steps of the checkpoint; None: not known."""
    data: Mapping[str, Any]
    """``source``, a description of the test data, and ``statistics`` of the splits."""
    metrics: Mapping[str, Comparison]
    """Base and tuned model, by metric."""
    rows: int
    """Number of rows with token losses."""
    left_out: Mapping[str, int]
    """Rows that could not be answered or scored, by reason."""
    generation: Mapping[str, Any]
    resamples: int
    """Bootstrap draws of each interval."""
    answers: Sequence[AnswerPair]
    """The rows that were answered, in order."""
    origins: Mapping[int, Origin]
    """Where these rows came from."""
    scores: Mapping[str, Score] = field(default_factory=dict)
    """How answers were scored, by the name of the metric."""
    curves: Mapping[str, Series] = field(default_factory=dict)
    """Steps and values that the run has logged, by tag."""
    config: str = ""
    """The run's configuration, as YAML."""
    certificates: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The certificates of exports in the run's folder, by path."""

    @property
    def most_different(self) -> list[AnswerPair]:
        """The rows whose ROUGE-L tuning has changed most, for better or worse; not those whose answers are equal."""
        changed = [pair for pair in self.answers if pair.base.text != pair.tuned.text]
        return sorted(changed, key=lambda pair: -abs(pair.rouge[1] - pair.rouge[0]))[:SHOWN_ROWS]

    def place(self, pair: AnswerPair) -> str:
        """Return where a row came from."""
        return self.origins[pair.row].place

    def facts(self) -> dict[str, str]:
        """Return what was tested and how, as text by name."""
        step = "" if self.step is None else f", after {self.step} optimiser steps"
        facts = {"run": self.run, "checkpoint": f"{self.checkpoint or 'the module in memory'}{step}"}
        facts["data"] = str(self.data["source"])
        facts["rows"] = f"{self.rows} with token losses, {len(self.answers)} answered"
        if self.left_out:
            reasons = ", ".join(f"{count} ({reason})" for reason, count in self.left_out.items())
            facts["not answered, by reason"] = reasons
        if self.answers:
            facts["generation"] = ", ".join(f"{name} {value}" for name, value in self.generation.items())
            # all kinds of ROUGE have one signature
            facts |= {f"{_title(name).partition('-')[0]} by": text for name, text in self.signatures().items()}
        facts["intervals"] = (
            f"{LEVEL_PERCENT:g}% of {self.resamples} bootstrap draws of the rows, the same for both models"
        )
        if any(comparison.too_few for comparison in self.metrics.values()):
            facts["differences"] = f"too few rows to tell: with fewer than {MIN_SIGNIFICANT_ROWS} none is marked"
        return facts

    def signatures(self) -> dict[str, str]:
        """Return the library and tokenization, or the function, of the scores that have one, by name."""
        return {name: score.signature for name, score in self.scores.items() if score.signature}

    def content(self) -> str:
        """Return test.json."""
        content = {
            "format": FORMAT_VERSION,
            "run": self.run,
            "checkpoint": self.checkpoint,
            "step": self.step,
            "data": dict(self.data),
            "metrics": {name: asdict(comparison) for name, comparison in self.metrics.items()},
            "signatures": self.signatures() if self.answers else {},
            "interval": {"level": LEVEL_PERCENT / 100, "resamples": self.resamples},
            "left_out": dict(self.left_out),
            "generation": dict(self.generation),
            "answers": [self.origins[pair.row].content() | pair.content() for pair in self.answers],
        }
        return json.dumps(_without_nan(content), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def table(metrics: Mapping[str, Comparison], *, intervals: bool = True) -> list[tuple[str, str, str, str]]:
    """Return a row for each metric: title, base, tuned, and the difference with an asterisk where it is significant.

    Only the difference has an interval where ``intervals`` is false.
    """
    rows = []
    for name in [*(name for name in TITLES if name in metrics), *(name for name in metrics if name not in TITLES)]:
        comparison = metrics[name]
        base, tuned = (
            _with_interval(estimate) if intervals else _number(estimate.value)
            for estimate in (comparison.base, comparison.tuned)
        )
        mark = " *" if comparison.significant else ""
        rows.append((_title(name), base, tuned, _with_interval(comparison.difference, "+") + mark))
    return rows


def _title(name: str) -> str:
    return TITLES.get(name, name)


def measure_tokens(base: Statistics, tuned: Statistics, resamples: int) -> dict[str, Comparison]:
    """Compare sums of losses, correct tokens and tokens of each row, shape (rows, 3)."""
    return {name: compare(base, tuned, value, resamples) for name, value in TOKEN_SCORES.items()}


def answer_values(scores: Mapping[str, Score], statistics: Sequence[Mapping[str, list[float]]]) -> dict[str, float]:
    """Return every score of answers, from the statistics of each, at least one."""
    return {name: score.value(total(each[name] for each in statistics)) for name, score in scores.items()}


def measure_answers(pairs: Sequence[AnswerPair], scores: Mapping[str, Score], resamples: int) -> dict[str, Comparison]:
    """Compare answers by every score; without answers the result is empty."""

    def comparison(name: str, score: Score) -> Comparison:
        base = np.array([pair.base_statistics[name] for pair in pairs])
        tuned = np.array([pair.tuned_statistics[name] for pair in pairs])
        return compare(base, tuned, score.value, resamples)

    return {name: comparison(name, score) for name, score in scores.items()} if pairs else {}


def _with_interval(estimate: Estimate, sign: str = "") -> str:
    value, low, high = (_number(number, sign) for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.{4 if abs(value) < 10 else 2}f}"


def _without_nan(value: Any) -> Any:
    """Content for JSON, which has no NaN or infinity: null in their place."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
