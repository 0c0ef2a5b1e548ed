"""The test report as Markdown, and as one HTML page that needs and runs nothing else."""

import math
from collections import Counter
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from phi3_lightning.evaluate.report import SHOWN_ROWS, Report, table
from phi3_lightning.event_files import Series
from phi3_lightning.pages import render, statistics
from phi3_lightning.pages.curves import draw

LOSSES = ("train/loss", "val/loss")
"""The curves that share a picture."""

MAX_GROUP_CURVES = 12
"""Groups of more curves, such as one for each layer, are left to TensorBoard."""

METRIC_COLUMNS = ("metric", "base", "tuned", "tuned minus base")
METRIC_NOTE = "An asterisk: the interval of the difference excludes 0."


def render_markdown(report: Report) -> str:
    """Return test.md: the metrics, and the rows that differ most."""
    return render(
        "test_report.md",
        report=report,
        metric_columns=METRIC_COLUMNS,
        metric_note=METRIC_NOTE,
        metrics=table(report.metrics),
        fenced=_fenced,
    )


def render_html(report: Report) -> str:
    """Return test.html, which also has samples, curves, statistics of the data, certificates and the configuration."""
    return render(
        "test_report.html",
        report=report,
        metric_columns=METRIC_COLUMNS,
        metric_note=METRIC_NOTE,
        metrics=table(report.metrics),
        samples=report.answers[:SHOWN_ROWS],
        pictures=_pictures(report.curves),
        statistics_columns=statistics.COLUMNS,
        statistics=statistics.rows(report.data.get("statistics", {})),
        certificates={path: _flatten(certificate) for path, certificate in report.certificates.items()},
    )


def _fenced(text: str) -> str:
    """Text in a fenced block that nothing in it can close."""
    longest = max((len(list(run)) for char, run in groupby(text) if char == "`"), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _pictures(curves: Mapping[str, Series]) -> list[str]:
    """A picture of the losses, and one of each other curve that changes, is no count, and is in a small group."""
    finite = {tag: [point for point in curve if math.isfinite(point[1])] for tag, curve in curves.items()}
    losses = {tag: finite.pop(tag) for tag in LOSSES if finite.get(tag)}
    others = [tag for tag in sorted(finite) if tag != "epoch" and len({value for _, value in finite[tag]}) > 1]
    sizes = Counter(_group(tag) for tag in others)
    pictures = [losses] if losses else []
    pictures += [{tag: finite[tag]} for tag in others if sizes[_group(tag)] <= MAX_GROUP_CURVES]
    return [draw(picture) for picture in pictures]


def _group(tag: str) -> str:
    return tag.partition("/")[0]


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
