"""Curves of a run over optimiser steps as an SVG picture."""

from phi3_lightning.event_files import Series
from phi3_lightning.pages import render

COLOURS = {"train/loss": "#9aa5b1", "val/loss": "#d9480f"}
OTHER_COLOUR = "#1c7ed6"
WIDTH, HEIGHT, MARGIN = 640, 320, 48

MAX_DOTS = 20
"""A curve of at most this many points, such as validations, has a dot at each."""


def draw(series: dict[str, Series]) -> str:
    """Return an SVG picture of curves by name, at least one of which has a point."""
    points = [point for curve in series.values() for point in curve]
    last = max(step for step, _ in points)
    low, high = min(value for _, value in points), max(value for _, value in points)

    def place(step: int, value: float) -> tuple[str, str]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * step / (last or 1)
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - low) / (high - low or 1.0)
        return f"{x:.1f}", f"{y:.1f}"

    curves = [
        (name, COLOURS.get(name, OTHER_COLOUR), [place(step, value) for step, value in curve])
        for name, curve in series.items()
    ]
    frame = {"width": WIDTH, "height": HEIGHT, "left": MARGIN, "right": WIDTH - MARGIN, "top": MARGIN}
    axes = {"bottom": HEIGHT - MARGIN, "last_step": last or 1, "low": f"{low:.3g}", "high": f"{high:.3g}"}
    return render("curves.svg", curves=curves, max_dots=MAX_DOTS, **frame, **axes)
