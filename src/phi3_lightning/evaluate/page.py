"""The report as one HTML page that needs nothing else, and runs nothing."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from phi3_lightning.evaluate.report import SHOWN, Answered, Report, table
from phi3_lightning.export.curve import draw

LOSSES = ("train/loss", "val/loss")
"""The curves that share a picture."""

LARGEST_GROUP = 12
"""Curves of one group that are drawn; more, such as some of each layer, are for TensorBoard."""


def render(report: Report) -> str:
    """Write the page.

    Args:
        report: What ``test`` found out.

    Returns:
        The file's content.
    """
    sections = [
        _section("Base and tuned model", _metrics(report)),
        _section("Rows that differ most", _answers(report, report.most_different)),
        _section("Samples", _answers(report, report.answers[:SHOWN])),
        _section("Curves", _curves(report)),
        _section("Data", _data(report.data.get("statistics", {}))),
        *(_section(f"Certificate of {path}", _facts(_flat(found))) for path, found in report.certificates.items()),
        _section("Configuration", f"<pre>{escape(report.config)}</pre>" if report.config else ""),
    ]
    return _PAGE.format(title=escape(f"Test of {report.run}"), facts=_facts(report.facts()), body="".join(sections))


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}\n" if content else ""


def _facts(facts: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return f"<dl>{items}</dl>"


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    def cells(kind: str, row: Iterable[Any]) -> str:
        return "".join(f"<{kind}>{escape(str(cell))}</{kind}>" for cell in row)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def _metrics(report: Report) -> str:
    head = ("metric", "base", "tuned", "tuned less base")
    note = "<p>An asterisk: the interval of the difference does not hold 0.</p>"
    return _table(head, table(report.metrics)) + note


def _answers(report: Report, answers: Iterable[Answered]) -> str:
    return "".join(_answer(report.place(answered), answered) for answered in answers)


def _answer(place: str, answered: Answered) -> str:
    texts = {
        "prompt": answered.prompt,
        "reference": answered.tuned.reference,
        "base": answered.base.text + ("" if answered.base.finished else " […cut]"),
        "tuned": answered.tuned.text + ("" if answered.tuned.finished else " […cut]"),
    }
    parts = "".join(f"<dt>{name}</dt><dd><pre>{escape(text)}</pre></dd>" for name, text in texts.items())
    scores = f"ROUGE-L {answered.rouge[0]:.3f} to {answered.rouge[1]:.3f}"
    return f"<article><h3>{escape(place)} <span>{scores}</span></h3><dl>{parts}</dl></article>"


def _curves(report: Report) -> str:
    finite = {tag: [point for point in curve if math.isfinite(point[1])] for tag, curve in report.curves.items()}
    losses = {tag: finite.pop(tag) for tag in LOSSES if finite.get(tag)}
    moving = [tag for tag in sorted(finite) if len({step for step, _ in finite[tag]}) > 1]
    sizes = Counter(map(_group, moving))
    pictures = [losses] if losses else []
    pictures += [{tag: finite[tag]} for tag in moving if sizes[_group(tag)] <= LARGEST_GROUP]
    return "".join(f"<figure>{draw(curves)}</figure>" for curves in pictures)


def _group(tag: str) -> str:
    return tag.partition("/")[0]


def _data(statistics: Mapping[str, Mapping[str, Any]]) -> str:
    head = ("split", "rows read", "documents kept", "cut", "dropped", "tokens", "trained tokens")
    rows = [
        (split, found["read"], found["kept"], found["cut"], _dropped(found["dropped"]), found["tokens"],
         found["supervised_tokens"])
        for split, found in statistics.items()
    ]  # fmt: skip
    return _table(head, rows) if rows else ""


def _dropped(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count} ({reason})" for reason, count in reasons.items()) or "0"


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; --line: light-dark(#d5d5dd, #44444f); --dim: light-dark(#666, #aaa); }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
h3 {{ font-size: .85rem; font-weight: 600; margin: 0; }} h3 span, dt, p {{ color: var(--dim); font-weight: 400; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.5rem; margin: .6rem 0; }}
dd {{ margin: 0; min-width: 0; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); }}
article {{ border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; margin: .8rem 0; }}
pre {{ font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }}
figure {{ display: inline-block; width: min(30rem, 100%); margin: .4rem; }} svg {{ width: 100%; height: auto; }}
</style></head><body>
<h1>{title}</h1>
{facts}
{body}</body></html>
"""
