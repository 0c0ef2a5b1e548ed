"""What ``test`` found out, as JSON and as Markdown."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from phi3_lightning.contracts import Origin
from phi3_lightning.evaluate.bootstrap import FEWEST_ROWS, LEVEL, Comparison, Estimate, Statistics, compare
from phi3_lightning.metrics import Answer
from phi3_lightning.metrics.answers import Score, scores

FORMAT = 1
"""Of test.json."""

TITLES = {
    "loss": "token loss",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
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
"""The metrics, in the order of the report."""

TOKEN_SCORES: dict[str, Callable[[list[float]], float]] = {
    "loss": lambda total: total[0] / total[2],
    "perplexity": lambda total: float(np.exp(total[0] / total[2])),  # inf where it is too large for a float
    "token_accuracy": lambda total: total[1] / total[2],
}
"""From sums of losses, of right tokens and of tokens."""

SHOWN = 10
"""Rows that the report shows of each kind."""


@dataclass(frozen=True)
class Answered:
    """A row that both models answered.

    Args:
        row: Which document of the data.
        prompt: What was asked, special tokens included.
        base: The base model's answer.
        tuned: The tuned model's answer.
        base_statistics: What the metrics count of it, by their names.
        tuned_statistics: The same of the tuned model's.
    """

    row: int
    prompt: str
    base: Answer
    tuned: Answer
    base_statistics: Mapping[str, list[float]]
    tuned_statistics: Mapping[str, list[float]]

    @property
    def rouge(self) -> tuple[float, float]:
        """ROUGE-L of base and tuned model."""
        return self.base_statistics["rougeL"][0], self.tuned_statistics["rougeL"][0]

    @property
    def change(self) -> float:
        """By how much tuning has moved the answer towards the reference."""
        return self.rouge[1] - self.rouge[0]

    def content(self) -> dict[str, Any]:
        """Return the row for JSON."""
        models = {
            name: {"answer": answer.text, "tokens": answer.tokens, "finished": answer.finished, "rougeL": rouge}
            for name, answer, rouge in zip(("base", "tuned"), (self.base, self.tuned), self.rouge, strict=True)
        }
        return {"row": self.row, "prompt": self.prompt, "reference": self.tuned.reference} | models


@dataclass(frozen=True)
class Report:
    """What ``test`` found out.

    Args:
        run: The name of the run.
        checkpoint: What was tested; None: the module as it was in memory.
        step: After how many optimiser steps it was written; None: not known.
        data: What was tested on: ``source``, and ``statistics`` of the splits.
        metrics: Base and tuned model, metric by metric.
        rows: Rows with token losses.
        left_out: Rows that were not asked, by reason.
        generation: How answers were written.
        resamples: Draws of each interval.
        answers: The rows that were answered, in order.
        origins: Where the rows that were answered came from.
        curves: Steps and values of what the run has logged.
        config: The run's configuration, as YAML.
        certificates: The certificates of exports in the run's folder, by path.
    """

    run: str
    checkpoint: str | None
    step: int | None
    data: Mapping[str, Any]
    metrics: Mapping[str, Comparison]
    rows: int
    left_out: Mapping[str, int]
    generation: Mapping[str, Any]
    resamples: int
    answers: Sequence[Answered]
    origins: Mapping[int, Origin]
    curves: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)
    config: str = ""
    certificates: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def most_different(self) -> list[Answered]:
        """The rows whose answers tuning has changed the most, for better or worse."""
        return sorted(self.answers, key=lambda answered: -abs(answered.change))[:SHOWN]

    def place(self, answered: Answered) -> str:
        """Return where a row came from."""
        return self.origins[answered.row].place

    def facts(self) -> dict[str, str]:
        """Return what was tested, by name, as text."""
        step = "" if self.step is None else f", after {self.step} optimiser steps"
        facts = {"run": self.run, "checkpoint": f"{self.checkpoint or 'the module in memory'}{step}"}
        facts["data"] = str(self.data["source"])
        facts["rows"] = f"{self.rows} with token losses, {len(self.answers)} answered"
        if self.left_out:
            listed = ", ".join(f"{count} ({reason})" for reason, count in self.left_out.items())
            facts["not answered, by reason"] = listed
        if self.answers:
            facts["generation"] = ", ".join(f"{name} {value}" for name, value in self.generation.items())
            facts |= {f"{_family(name)} by": how for name, how in signatures().items()}
        facts["intervals"] = f"{LEVEL:g}% of {self.resamples} bootstrap draws of the rows, the same for both models"
        if any(found.too_few for found in self.metrics.values()):
            facts["differences"] = f"too few rows to tell: with fewer than {FEWEST_ROWS} none is marked"
        return facts

    def content(self) -> str:
        """Return test.json."""
        content = {
            "format": FORMAT,
            "run": self.run,
            "checkpoint": self.checkpoint,
            "step": self.step,
            "data": dict(self.data),
            "metrics": {name: asdict(found) for name, found in self.metrics.items()},
            "signatures": signatures() if self.answers else {},
            "interval": {"level": LEVEL / 100, "resamples": self.resamples},
            "left_out": dict(self.left_out),
            "generation": dict(self.generation),
            "answers": [self.origins[found.row].content() | found.content() for found in self.answers],
        }
        return json.dumps(_finite(content), ensure_ascii=False, indent=1, allow_nan=False) + "\n"

    def markdown(self) -> str:
        """Return test.md."""
        lines = [f"# Test of {self.run}", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts().items()]
        lines += ["", "| metric | base | tuned | tuned less base |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in table(self.metrics)]
        lines += ["", "An asterisk: the interval of the difference does not hold 0.", ""]
        if self.answers:
            lines += ["## Rows that differ most", ""]
        for answered in self.most_different:
            lines += [f"### {self.place(answered)}: ROUGE-L {answered.rouge[0]:.3f} to {answered.rouge[1]:.3f}", ""]
            parts = {"prompt": answered.prompt, "reference": answered.tuned.reference}
            for name, text in (parts | {"base": answered.base.text, "tuned": answered.tuned.text}).items():
                lines += [f"{name}:", "", _quoted(text), ""]
        return "\n".join(lines)


def table(metrics: Mapping[str, Comparison], *, intervals: bool = True) -> list[tuple[str, str, str, str]]:
    """Return a row a metric: title, base, tuned, and tuned less base with an asterisk where it is significant.

    Args:
        metrics: The comparisons, by name.
        intervals: Whether base and tuned have their intervals too, and not only the difference.
    """
    rows = []
    for name, title in TITLES.items():
        if name in metrics:
            found = metrics[name]
            models = [_told(model) if intervals else _number(model.value) for model in (found.base, found.tuned)]
            mark = " *" if found.significant else ""
            rows.append((title, models[0], models[1], _told(found.difference, "+") + mark))
    return rows


def measure_tokens(base: Statistics, tuned: Statistics, resamples: int) -> dict[str, Comparison]:
    """Compare token losses.

    Args:
        base: Sum of losses, right tokens and tokens of each row, shape (rows, 3).
        tuned: The same by the tuned model.
        resamples: Draws of each interval.
    """
    return {name: compare(base, tuned, value, resamples) for name, value in TOKEN_SCORES.items()}


def measure_answers(answers: Sequence[Answered], resamples: int) -> dict[str, Comparison]:
    """Compare answers.

    Args:
        answers: The rows that were answered; none have nothing to compare.
        resamples: Draws of each interval.
    """

    def of(name: str, score: Score) -> Comparison:
        base = np.array([answered.base_statistics[name] for answered in answers])
        tuned = np.array([answered.tuned_statistics[name] for answered in answers])
        return compare(base, tuned, score.value, resamples)

    return {name: of(name, score) for name, score in scores().items()} if answers else {}


def signatures() -> dict[str, str]:
    """Return by which library a score is, and how that takes texts apart, by the score's name."""
    return {name: score.signature for name, score in scores().items() if score.signature}


def _family(name: str) -> str:
    """The title of a score, without the kind of ROUGE: all are by one signature."""
    return TITLES[name].partition("-")[0]


def _told(estimate: Estimate, sign: str = "") -> str:
    value, low, high = (_number(number, sign) for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.{4 if abs(value) < 10 else 2}f}"


def _quoted(text: str) -> str:
    """A text that is no Markdown, whatever it says."""
    longest = max((len(run) for run in _fences(text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _fences(text: str) -> list[str]:
    return "".join(char if char == "`" else " " for char in text).split()


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
