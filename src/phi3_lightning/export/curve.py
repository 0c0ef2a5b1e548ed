"""The losses of a run as a small picture."""

from xml.sax.saxutils import escape

from phi3_lightning.event_files import Series

COLOURS = {"train/loss": "#9aa5b1", "val/loss": "#d9480f"}
WIDTH, HEIGHT, MARGIN = 640, 320, 48


def draw(series: dict[str, Series]) -> str:
    """Return an SVG picture of curves over optimiser steps.

    Args:
        series: Points of each curve, by name; at least one curve has a point.
    """
    points = [point for curve in series.values() for point in curve]
    last = max(step for step, _ in points) or 1
    low, high = min(value for _, value in points), max(value for _, value in points)
    span = high - low or 1.0

    def place(step: int, value: float) -> str:
        x = MARGIN + (WIDTH - 2 * MARGIN) * step / last
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - low) / span
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _line(MARGIN, HEIGHT - MARGIN, WIDTH - MARGIN, HEIGHT - MARGIN),
        _line(MARGIN, MARGIN, MARGIN, HEIGHT - MARGIN),
        _text(WIDTH - MARGIN, HEIGHT - MARGIN + 16, f"step {last}", "end"),
        _text(MARGIN - 4, MARGIN + 4, f"{high:.3g}", "end"),
        _text(MARGIN - 4, HEIGHT - MARGIN, f"{low:.3g}", "end"),
    ]
    for index, (name, curve) in enumerate(series.items()):
        colour = COLOURS.get(name, "#1c7ed6")
        path = " ".join(place(step, value) for step, value in curve)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{path}"/>')
        parts += [f'<circle r="2.5" fill="{colour}" cx="{x}" cy="{y}"/>' for x, y in _dots(path)]
        parts.append(_text(WIDTH - MARGIN, MARGIN + 16 * index, name, "end", colour))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _dots(path: str) -> list[list[str]]:
    """The points themselves where they are few, such as validations."""
    points = [point.split(",") for point in path.split()]
    return points if len(points) <= 20 else []


def _line(x1: int, y1: int, x2: int, y2: int) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#495057"/>'


def _text(x: int, y: int, text: str, anchor: str, colour: str = "#495057") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
